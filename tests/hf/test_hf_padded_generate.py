"""`model.generate` on a patched model gives what transformers' own gives."""

import pytest
import torch
from tiny_models import VOCAB_SIZE, make_model, make_prompts
from transformers import GenerationConfig

from torch_rpa import hf
from torch_rpa.hf.api.gate import engine_of


def padded(prompts: list[list[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    length = max(map(len, prompts))
    rows = [[pad] * (length - len(prompt)) + prompt for prompt in prompts]
    masks = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def both(inputs: dict, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """What the plain model gives with eager attention, and what the patched one gives."""
    model = make_model(attn_implementation="eager")
    expected = model.generate(**inputs, **kwargs)
    return expected, hf.patch(model, page_size=8, token_buckets=(8, 64)).generate(**inputs, **kwargs)


STOP = 7


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"max_new_tokens": 15},
        {"max_length": 40},
        {"max_new_tokens": 30, "eos_token_id": list(range(1, 20)), "pad_token_id": 0},
        {"max_new_tokens": 30, "eos_token_id": list(range(1, 20)), "min_new_tokens": 10},
        {"max_new_tokens": 12, "repetition_penalty": 1.7},
        {"generation_config": GenerationConfig(max_new_tokens=9)},
    ],
    ids=str,
)
def test_greedy_rows_equal_transformers(kwargs):
    expected, rows = both(padded(make_prompts(5, 20, 1, 12)), **kwargs)
    assert rows.dtype == expected.dtype
    assert rows.tolist() == expected.tolist()


def test_without_a_mask_padding_is_guessed_as_transformers_guesses_it():
    inputs = padded(make_prompts(5, 20), pad=127)
    del inputs["attention_mask"]
    expected, rows = both(inputs, max_new_tokens=5, pad_token_id=127)
    assert rows.tolist() == expected.tolist()


def test_sampled_rows_have_transformers_distribution_and_follow_the_global_seed():
    """First tokens of 1000 samples from 6 candidates, against those of transformers."""
    config = GenerationConfig(do_sample=True, top_k=6, temperature=2.0, max_new_tokens=1, num_return_sequences=1000)
    torch.manual_seed(0)
    model = make_model(attn_implementation="eager")
    inputs = padded(make_prompts(9))
    plain = model.generate(**inputs, generation_config=config)[:, -1]
    hf.patch(model, max_num_seqs=64, token_buckets=(576,))
    torch.manual_seed(5)
    rows = model.generate(**inputs, generation_config=config)[:, -1]
    counts, expected = (torch.bincount(column, minlength=VOCAB_SIZE) for column in (rows, plain))
    assert torch.equal(counts > 0, expected > 0)
    assert (counts - expected).abs().max() < 5 * (2 * expected.max()) ** 0.5  # five standard deviations
    torch.manual_seed(5)
    assert torch.equal(model.generate(**inputs, generation_config=config)[:, -1], rows)


def test_a_dict_comes_back_on_request():
    inputs = padded(make_prompts(5, 3))
    expected, output = both(inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected.sequences.tolist()


def test_rows_come_back_on_the_inputs_device(xla):
    model = hf.patch(make_model().to(xla), page_size=8, token_buckets=(32,))
    inputs = padded(make_prompts(5, 3))
    rows = model.generate(**{name: tensor.to(xla) for name, tensor in inputs.items()}, max_new_tokens=4)
    assert rows.device.type == "xla"
    assert rows.tolist() == make_model(attn_implementation="eager").generate(**inputs, max_new_tokens=4).tolist()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "one of inputs and input_ids is needed"),
        ({"inputs": torch.tensor([1, 2])}, ValueError, r"integer tensor \[batch, length\], got \(2,\)"),
        ({"inputs": [[1, 2]]}, ValueError, "got list"),
        (
            {"inputs": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 0]])},
            ValueError,
            "padding on the left",
        ),
        ({"inputs": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1]])}, ValueError, r"is \(1, 1\), inputs"),
        ({"inputs": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[0, 0]])}, ValueError, "row 0: the prompt"),
        ({"inputs": torch.tensor([[1, 2]]), "num_beams": 3}, NotImplementedError, "num_beams=3"),
        (
            {"inputs": torch.tensor([[1, 2]]), "streamer": object()},
            NotImplementedError,
            r"streamer=.*add_request\(\.\.\.",
        ),
        ({"inputs": torch.tensor([[1, 2]]), "max_tokens": 3}, TypeError, r"not take max_tokens \(write max_new_tokens"),
    ],
)
def test_what_it_cannot_do_is_refused(kwargs, error, message):
    model = hf.patch(make_model())
    with pytest.raises(error, match=message):
        model.generate(**kwargs)
    assert not engine_of(model).has_work
