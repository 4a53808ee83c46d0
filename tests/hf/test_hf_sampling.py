"""Sampling on plain arrays against transformers' own processors, and each request's parameters in the engine."""

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, make_model, make_prompts, plain_greedy, tokens
from transformers import (
    GenerationConfig,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from torch_rpa import hf
from torch_rpa.hf.api.gate import engine_of
from torch_rpa.hf.engine.sampling import (
    GREEDY,
    UNDECIDED,
    SampleInputs,
    SampleRow,
    SamplingParams,
    TokenSet,
    filtered,
    pack_sampling,
    sample,
    sample_greedy,
    unpack_sampling,
)
from torch_rpa.hf.engine.stop_strings import StopStrings


def sampled(**kwargs) -> SamplingParams:
    return SamplingParams(do_sample=True, **kwargs)


PARAMS = [
    sampled(),
    sampled(temperature=0.3),
    sampled(top_k=1),
    sampled(top_k=7),
    sampled(top_k=10_000),
    sampled(top_p=0.5),
    sampled(top_p=1e-6),
    sampled(temperature=1.7, top_k=40, top_p=0.9),
    sampled(temperature=0.7, top_k=12, top_p=0.8, repetition_penalty=1.3),
    SamplingParams(repetition_penalty=1.5),
]
SEEN = [0, 3, 5, 12]


def processed(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """transformers' scores for one row of logits."""
    scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(torch.tensor([SEEN]), logits[None].clone())
    if params.do_sample:
        scores = TemperatureLogitsWarper(params.temperature)(None, scores)
        if params.top_k:
            scores = TopKLogitsWarper(params.top_k)(None, scores)
        if params.top_p < 1:
            scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores[0]


def unpacked(rows: list[SampleRow], vocab_size: int, device="cpu") -> SampleInputs:
    arrays = pack_sampling(rows, len(rows), vocab_size)
    return unpack_sampling(*(torch.from_numpy(array).to(device) for array in arrays), vocab_size)


def rows_of(params: list[SamplingParams], vocab_size: int, uniform: float = 0.0) -> list[SampleRow]:
    return [SampleRow(one, uniform, seen=TokenSet(vocab_size, SEEN)) for one in params]


def chosen(result: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    tokens, logprobs = result.cpu()
    return tokens.int().tolist(), logprobs


@pytest.mark.parametrize(("vocab_size", "num_candidates"), [(13, 1024), (1000, 1024), (1000, 300)])
def test_distribution_equals_transformers_processors(vocab_size, num_candidates, device):
    torch.manual_seed(0)
    logits = torch.randn(len(PARAMS), vocab_size) * 3
    inputs = unpacked(rows_of(PARAMS, vocab_size), vocab_size, device)
    _, weights, is_decided = (result.cpu() for result in filtered(logits.to(device), inputs, num_candidates))
    for row, params in enumerate(PARAMS):
        if num_candidates >= vocab_size or not params.top_p < 1 or params.top_k:
            assert is_decided[row], params
        if is_decided[row]:
            expected = processed(logits[row], params).softmax(-1)
            assert torch.equal(weights[row] > 0, expected > 0), params
            torch.testing.assert_close(weights[row] / weights[row].sum(), expected)


def test_too_few_candidates_are_noticed_never_wrong():
    """Nearly flat: half of the mass takes hundreds of tokens, top_k=50 takes 50."""
    logits = torch.randn(4, 1000) * 0.01
    params = [sampled(top_p=0.5), sampled(top_k=50), sampled(top_k=10, top_p=0.9), sampled(top_p=0.02)]
    inputs = unpacked([SampleRow(one, 0.3) for one in params], 1000)
    few, _ = chosen(sample(logits, inputs, num_candidates=40))
    everything, _ = chosen(sample(logits, inputs, num_candidates=1000))
    assert few[:2] == [UNDECIDED, UNDECIDED]
    assert few[2:] == everything[2:]
    assert UNDECIDED not in everything


def test_log_probabilities_are_of_the_processed_distribution(device):
    torch.manual_seed(0)
    logits = torch.randn(len(PARAMS), 1000) * 3
    inputs = unpacked(rows_of(PARAMS, 1000, uniform=0.6), 1000, device)
    drawn, logprobs = chosen(sample(logits.to(device), inputs))
    for row, params in enumerate(PARAMS):
        expected = processed(logits[row], params).log_softmax(-1)[drawn[row]]
        torch.testing.assert_close(logprobs[row], expected, rtol=1e-4, atol=1e-5)
    greedy, logprobs = chosen(sample_greedy(logits.to(device)))
    assert greedy == logits.argmax(-1).tolist()
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


def test_tokens_that_tie_with_the_last_of_top_k_stay():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    _, weights, _ = filtered(logits, unpacked([SampleRow(sampled(top_k=2))], 5), 5)
    assert (weights[0] > 0).nonzero()[:, 0].tolist() == [1, 2, 3]


def test_every_token_of_a_bitmap_arrives(device):
    ids = torch.randperm(1000)[:300].sort().values.tolist()
    rows = [SampleRow(seen=TokenSet(1000, ids)), SampleRow(seen=TokenSet(1000, range(1000))), SampleRow()]
    inputs = unpacked(rows, 1000, device)
    assert inputs.seen[0].cpu().nonzero()[:, 0].tolist() == ids
    assert inputs.seen[1].all()
    assert not inputs.seen[2].any()
    assert not inputs.forbidden.any()


def test_forbidden_tokens_are_never_chosen(device):
    logits = torch.zeros(2, 40)
    logits[:, 33] = 9.0
    rows = [SampleRow(params, forbidden=TokenSet(40, [33, 0])) for params in (sampled(), GREEDY)]
    drawn, _ = chosen(sample(logits.to(device), unpacked(rows, 40, device)))
    assert drawn == [1, 1]


def test_uniform_numbers_walk_through_the_distribution():
    """Evenly spaced numbers hit each token as often as its probability says, in the order of token ids."""
    logits = torch.log(torch.tensor([0.1, 0.5, 0.0, 0.4])).repeat(100, 1)
    rows = [SampleRow(sampled(), (i + 0.5) / 100) for i in range(100)]
    drawn, _ = chosen(sample(logits, unpacked(rows, 4)))
    assert drawn == [0] * 10 + [1] * 50 + [3] * 40


@pytest.mark.parametrize("uniform", [0.0, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_extreme_uniform_numbers_never_draw_a_filtered_token(uniform, device):
    torch.manual_seed(0)
    logits = torch.randn(len(PARAMS), 1000)
    drawn, _ = chosen(sample(logits.to(device), unpacked(rows_of(PARAMS, 1000, uniform), 1000, device)))
    for row, params in enumerate(PARAMS):
        assert processed(logits[row], params)[drawn[row]] > -torch.inf, params


def test_a_greedy_row_takes_the_most_likely_token_whatever_its_number():
    logits = torch.randn(5, 100)
    drawn, logprobs = chosen(sample(logits, unpacked([SampleRow(GREEDY, 0.9)] * 5, 100)))
    expected, expected_logprobs = chosen(sample_greedy(logits))
    assert drawn == expected
    torch.testing.assert_close(logprobs, expected_logprobs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0 .*for greedy write do_sample=False"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1e-39}, "temperature=1e-39 must be .* in float32's range"),
        ({"temperature": 1e39}, r"temperature=1e\+39 must be"),
        ({"top_k": -1}, "top_k=-1 must be a whole number of tokens; for all of them write top_k=0"),
        ({"top_p": 1e-46}, "top_p=1e-46 must be"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty=1e-40 must be"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf must be"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 .* and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
    ],
)
def test_parameter_out_of_range_is_a_value_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**kwargs)


SMALLEST, LARGEST = 2.0**-126, 3e38


def test_the_smallest_and_the_largest_parameters_give_the_limit_that_they_mean_and_no_nan(device):
    torch.manual_seed(0)
    logits = torch.randn(1, 1000) * 30
    largest_seen = logits[0, SEEN].argmax()  # of the scores that are seen, positive ones first
    assert logits[0, SEEN].amax() > 0
    greedy, repeated, anything = [int(logits.argmax())], [SEEN[largest_seen]], range(1000)
    for params, expected in (
        (sampled(temperature=SMALLEST), greedy),
        (sampled(top_p=SMALLEST), greedy),
        (sampled(temperature=SMALLEST, top_p=SMALLEST, top_k=10**400), greedy),
        (SamplingParams(repetition_penalty=1e-30), repeated),
        (SamplingParams(repetition_penalty=SMALLEST), SEEN),
        (SamplingParams(repetition_penalty=LARGEST), set(anything) - set(SEEN)),
        (sampled(temperature=SMALLEST, repetition_penalty=SMALLEST), SEEN),
        (sampled(temperature=LARGEST), anything),
    ):
        inputs = unpacked(rows_of([params], 1000, uniform=0.5), 1000, device)
        (token,), logprobs = chosen(sample(logits.to(device), inputs))
        assert token in expected, params
        assert torch.isfinite(logprobs).all(), params


SAMPLED = GenerationConfig(do_sample=True, temperature=1.2, top_k=30, top_p=0.95, max_new_tokens=10)


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(device):
    model, prompts = make_model().to(device), make_prompts(5, 40, 9, 3, 17)
    hf.patch(model, max_num_seqs=3, token_buckets=(4, 32))
    alone = tokens(model.generate_batch(prompts[:1], SAMPLED, seed=7))
    together = tokens(model.generate_batch(prompts, SAMPLED, seed=7))
    assert together[0] == alone[0]
    assert tokens(model.generate_batch(prompts, SAMPLED, seed=7)) == together


def test_a_seed_gives_the_same_tokens_when_requests_are_preempted():
    model, prompts = make_model(), make_prompts(20, 30, 10, 25)
    hf.patch(model, page_size=8, max_num_seqs=4, token_buckets=(4, 64))
    plenty = tokens(model.generate_batch(prompts, SAMPLED, seed=7, max_new_tokens=20))
    hf.patch(model, page_size=8, num_pages=8, max_num_seqs=4, token_buckets=(4, 64))
    assert tokens(model.generate_batch(prompts, SAMPLED, seed=7, max_new_tokens=20)) == plenty
    assert engine_of(model).stats.num_preemptions > 0


def test_other_seeds_and_no_seed_give_other_tokens():
    model, prompts = hf.patch(make_model()), make_prompts(5, 5)
    answers = [tokens(model.generate_batch(prompts, SAMPLED, seed=seed)) for seed in (0, 1, None, None)]
    assert len({str(answer) for answer in answers}) == 4


def test_return_sequences_are_sampled_independently_and_named_as_transformers_names_them():
    model, (prompt,) = hf.patch(make_model()), make_prompts(5)
    outputs = model.generate_batch([prompt, prompt], SAMPLED, seed=0, num_return_sequences=2)
    assert list(outputs) == ["req_0__child#0", "req_0", "req_1__child#0", "req_1"]
    assert len({str(answer) for answer in tokens(outputs)}) == 4
    assert tokens(model.generate_batch([prompt], SAMPLED, seed=0))[0] == outputs["req_0"].generated_tokens


def test_a_nucleus_wider_than_the_candidates_is_sampled_all_the_same(monkeypatch, device):
    """The step says that it could not decide, and is sampled again from the whole vocabulary."""
    from torch_rpa.hf.engine import runner

    config = GenerationConfig(do_sample=True, temperature=50.0, top_k=0, top_p=0.9, max_new_tokens=6)
    model, prompts = hf.patch(make_model().to(device)), make_prompts(5, 9)
    expected = tokens(model.generate_batch(prompts, config, seed=3))
    hf.patch(model)
    real = runner.sample
    monkeypatch.setattr(runner, "sample", lambda logits, inputs, count=4: real(logits, inputs, count))
    assert tokens(model.generate_batch(prompts, config, seed=3)) == expected


def test_repetition_penalty_gives_transformers_tokens(device):
    model, prompts = make_model(), make_prompts(5, 40, 9)
    expected = plain_greedy(model, prompts, 12, repetition_penalty=1.8)
    assert expected != plain_greedy(model, prompts, 12)
    hf.patch(model.to(device), max_num_seqs=2, token_buckets=(4, 32))
    assert tokens(model.generate_batch(prompts, max_new_tokens=12, repetition_penalty=1.8)) == expected


def test_min_new_tokens_keeps_the_stop_token_away():
    model, prompts = make_model(), make_prompts(3, 11)
    stop = plain_greedy(model, prompts, 12)[0][2]
    expected = plain_greedy(model, prompts, 12, eos_token_id=stop, pad_token_id=0, min_new_tokens=7)
    hf.patch(model)
    answers = tokens(model.generate_batch(prompts, max_new_tokens=12, eos_token_id=stop, min_new_tokens=7))
    assert answers == [answer[: len(answers[row])] for row, answer in enumerate(expected)]
    assert all(len(answer) >= 7 and stop not in answer[:7] for answer in answers)


def test_log_probabilities_equal_plain_logits():
    model, (prompt,) = make_model(), make_prompts(9)
    answer = plain_greedy(model, [prompt], 5)[0]
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
    hf.patch(model)
    with_logprobs = ContinuousBatchingConfig(return_logprobs=True)
    (output,) = model.generate_batch([prompt], None, with_logprobs, max_new_tokens=5).values()
    torch.testing.assert_close(torch.tensor(output.logprobs), expected, rtol=1e-4, atol=1e-5)


class Letters:
    """A tokenizer: token t is the character chr(t); two of them make one character of three."""

    def decode(self, token_ids):
        return bytes(token_ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("a stop", True),
        ("a sto", False),
        ("stop it", False),  # completed before
        ("stop a stop", True),
        ("caf\u00e9", True),
    ],
)
def test_a_stop_string_ends_where_its_last_character_comes(text, ends):
    stop_strings = StopStrings(("stop", "\u00e9"), Letters())
    assert stop_strings.is_completed_by_last(list(text.encode())) == ends


def test_generation_ends_with_the_token_that_completes_a_stop_string():
    model, prompts = make_model(), make_prompts(5)
    answer = plain_greedy(model, prompts, 12)[0]
    stop = Letters().decode(answer[3:6])
    hf.patch(model)
    output = model.generate_batch(prompts, max_new_tokens=12, stop_strings=stop, tokenizer=Letters())
    assert tokens(output)[0] == answer[:6]
    assert VOCAB_SIZE <= 128  # so that each token is a character
