"""Sampling on plain arrays against transformers' own warpers, and its seeds."""

import numpy as np
import pytest
import torch
from tiny_models import make_model, make_prompts, tokens
from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from torch_rpa import hf
from torch_rpa.hf.sampling import GREEDY, SamplingParams, filtered_probs, pack_sampling, sample, sample_greedy

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_k=10_000),
    SamplingParams(top_p=0.5),
    SamplingParams(top_p=1e-6),
    SamplingParams(temperature=1.7, top_k=40, top_p=0.9),
]


def warped_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """transformers' distribution for one row of logits."""
    scores = TemperatureLogitsWarper(params.temperature)(None, logits[None])
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores.softmax(-1)[0]


def pack(params: list[SamplingParams], uniforms: list[float] | None = None) -> torch.Tensor:
    return torch.from_numpy(pack_sampling(params, uniforms or [0.0] * len(params), len(params)))


@pytest.mark.parametrize("vocab_size", [13, 1000])
def test_distribution_equals_transformers_warpers(vocab_size, device):
    torch.manual_seed(0)
    logits = torch.randn(len(PARAMS), vocab_size) * 3
    probs, ids = (result.cpu() for result in filtered_probs(logits.to(device), pack(PARAMS).to(device)))
    by_token = torch.zeros_like(probs).scatter(-1, ids, probs)
    by_token = by_token / by_token.sum(-1, keepdim=True)
    for row, params in enumerate(PARAMS):
        expected = warped_probs(logits[row], params)
        assert torch.equal(by_token[row] > 0, expected > 0), params
        torch.testing.assert_close(by_token[row], expected)


def test_tokens_that_tie_with_the_last_of_top_k_stay():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    params = SamplingParams(top_k=2)
    probs, ids = filtered_probs(logits, pack([params]))
    assert sorted(ids[probs > 0].tolist()) == [1, 2, 3]
    assert (warped_probs(logits[0], params) > 0).nonzero()[:, 0].tolist() == [1, 2, 3]


def test_uniform_numbers_walk_through_the_distribution():
    """Evenly spaced numbers hit each token as often as its probability says, the most likely one first."""
    logits = torch.log(torch.tensor([0.1, 0.5, 0.0, 0.4])).repeat(100, 1)
    uniforms = [(i + 0.5) / 100 for i in range(100)]
    drawn = sample(logits, pack([SamplingParams()] * 100, uniforms)).tolist()
    assert drawn == [1] * 50 + [3] * 40 + [0] * 10


def test_largest_uniform_number_never_draws_a_filtered_token(device):
    torch.manual_seed(0)
    logits = torch.randn(len(PARAMS), 1000)
    uniforms = [float(np.nextafter(np.float32(1), np.float32(0)))] * len(PARAMS)
    drawn = sample(logits.to(device), pack(PARAMS, uniforms).to(device)).tolist()
    for row, params in enumerate(PARAMS):
        assert warped_probs(logits[row], params)[drawn[row]] > 0, params


def test_top_k_one_is_greedy():
    logits = torch.randn(5, 100)
    assert torch.equal(sample(logits, pack([GREEDY] * 5, [0.9] * 5)), sample_greedy(logits))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1 must be a whole number"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1"),
    ],
)
def test_parameter_out_of_range_is_a_value_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**kwargs)


SAMPLED = GenerationConfig(do_sample=True, temperature=1.2, top_k=30, top_p=0.95, max_new_tokens=10)


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(device):
    model, prompts = make_model().to(device), make_prompts(5, 40, 9, 3, 17)
    hf.patch(model, max_num_seqs=3, token_buckets=(4, 32))
    alone = tokens(model.generate_batch(prompts[:1], SAMPLED, seed=7))
    together = tokens(model.generate_batch(prompts, SAMPLED, seed=7))
    assert together[0] == alone[0]
    assert tokens(model.generate_batch(prompts, SAMPLED, seed=7)) == together


def test_other_seeds_and_no_seed_give_other_tokens():
    model, prompts = hf.patch(make_model()), make_prompts(5, 5)
    answers = [tokens(model.generate_batch(prompts, SAMPLED, seed=seed)) for seed in (0, 1, None, None)]
    assert len({str(answer) for answer in answers}) == 4


def test_same_prompt_twice_is_sampled_independently():
    model, (prompt,) = hf.patch(make_model()), make_prompts(5)
    first, second = tokens(model.generate_batch([prompt, prompt], SAMPLED, seed=0))
    assert first != second
