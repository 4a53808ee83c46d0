"""A patched model writes what the plain one writes."""

import pytest
import torch
from tiny_models import make_model, make_prompts, plain_greedy, tokens
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from torch_rpa import hf, native
from torch_rpa.hf.api.gate import engine_of


def test_prompt_longer_than_a_step_gives_the_same_tokens_as_in_one_piece():
    model, prompts = make_model(), make_prompts(200, 150, 3)
    hf.patch(model, page_size=8, token_buckets=(8, 512))
    in_one_piece = tokens(model.generate_batch(prompts, max_new_tokens=8))
    hf.patch(model, page_size=8, token_buckets=(8, 16))
    in_chunks = tokens(model.generate_batch(prompts, max_new_tokens=8))
    assert in_chunks == in_one_piece == plain_greedy(hf.unpatch(model), prompts, 8)


def test_preempted_requests_are_computed_again_and_answered_rightly(device):
    model, prompts = make_model(), make_prompts(20, 30, 10, 25, 40, 5)
    expected = plain_greedy(model, prompts, 20)
    hf.patch(model.to(device), page_size=8, num_pages=8, max_num_seqs=4, token_buckets=(4, 32))
    assert tokens(model.generate_batch(prompts, max_new_tokens=20)) == expected
    assert engine_of(model).scheduler.stats.num_preemptions > 0
    assert engine_of(model).allocator.num_free == 8


def test_a_shared_prefix_changes_no_bit_of_any_result(device):
    """With one bucket all steps are one program, and a row's bits do not depend on its company. Nor do they in the
    native kernels, where steps have just the rows that there are; torch's products round otherwise for other rows."""
    system = make_prompts(40)[0]
    prompts = [system + question for question in make_prompts(3, 9, 1, 30, 12, 7, seed=1)]
    results = []
    for prefix_caching in (False, True):
        model = make_model().to(device)
        buckets = (32,) if device.type == "xla" else None
        hf.patch(model, page_size=8, max_num_seqs=2, token_buckets=buckets, prefix_caching=prefix_caching)
        with_logprobs = ContinuousBatchingConfig(return_logprobs=True)
        outputs = model.generate_batch(prompts, None, with_logprobs, max_new_tokens=8).values()
        results.append([(output.generated_tokens, output.logprobs) for output in outputs])
        hit_rate = engine_of(model).scheduler.stats.prefix_hit_rate
        assert hit_rate > 0.4 if prefix_caching else hit_rate == 0
    assert [answer for answer, _ in results[0]] == plain_greedy(make_model(), prompts, 8)
    assert [answer for answer, _ in results[1]] == [answer for answer, _ in results[0]]
    if device.type == "xla" or native.is_available():
        assert results[1] == results[0]


def test_finished_sequences_are_replaced_in_the_next_step():
    model = make_model()
    hf.patch(model, max_num_seqs=1, token_buckets=(8,))
    model.generate_batch(make_prompts(5, 5, 5), max_new_tokens=4)
    assert engine_of(model).num_steps == 3 * 4


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_token_ends_an_answer_and_is_part_of_it(as_list):
    model, prompts = make_model(), make_prompts(3, 11)
    free_running = plain_greedy(model, prompts, 12)
    stop = free_running[0][4]
    hf.patch(model)
    config = GenerationConfig(max_new_tokens=12, eos_token_id=[stop, 0] if as_list else stop)
    outputs = model.generate_batch(prompts, config)
    for output, answer in zip(outputs.values(), free_running, strict=True):
        expected = answer[: answer.index(stop) + 1] if stop in answer else answer
        assert output.generated_tokens == expected


def test_max_length_counts_the_prompt():
    model = make_model()
    hf.patch(model)
    outputs = model.generate_batch(make_prompts(3, 8), GenerationConfig(max_length=12))
    assert [len(answer) for answer in tokens(outputs)] == [9, 4]


def test_results_are_transformers_own_in_input_order():
    model, prompts = make_model(), make_prompts(9, 2, 30, 1)
    hf.patch(model, max_num_seqs=2, token_buckets=(8,))
    outputs = model.generate_batch(prompts, max_new_tokens=3, record_timestamps=True)
    assert list(outputs) == ["req_0", "req_1", "req_2", "req_3"]
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        assert isinstance(output, GenerationOutput)
        assert output.prompt_ids == prompt
        assert output.status == RequestStatus.FINISHED
        assert output.error is None
        assert len(output.timestamps) == len(output.generated_tokens) == 3
        assert output.created_time <= output.lifespan[0] <= output.timestamps[0] <= output.lifespan[1]


def test_a_model_in_training_mode_computes_as_in_eval_mode_and_stays_in_it():
    model, prompts = make_model(attention_dropout=0.5).train(), make_prompts(4, 6)
    hf.patch(model)
    answers = tokens(model.generate_batch(prompts, max_new_tokens=6))
    assert all(module.training for module in model.modules())
    assert answers == plain_greedy(hf.unpatch(model).eval(), prompts, 6)


def test_bfloat16_model_generates(device):
    model = make_model(dtype=torch.bfloat16).to(torch.bfloat16).to(device)
    hf.patch(model)
    assert [len(answer) for answer in tokens(model.generate_batch(make_prompts(4, 20), max_new_tokens=5))] == [5, 5]
    assert engine_of(model).runner._cache.layers[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_cache_stays_close(kv_dtype, device):
    """8-bit keys and values shift the logits a little: nearly every first token is the same."""
    model, prompts = make_model(initializer_range=0.05), make_prompts(*range(3, 43))
    expected = plain_greedy(model, prompts, 1)
    hf.patch(model.to(device), kv_dtype=kv_dtype)
    answers = tokens(model.generate_batch(prompts, max_new_tokens=1))
    assert sum(answer == want for answer, want in zip(answers, expected, strict=True)) >= 35
    assert engine_of(model).runner._cache.layers[0].dtype == kv_dtype


def test_model_may_move_to_another_device_between_calls(xla):
    model, prompts = make_model(), make_prompts(4, 12)
    hf.patch(model)
    on_cpu = tokens(model.generate_batch(prompts, max_new_tokens=5))
    model.to(xla)
    assert tokens(model.generate_batch(prompts, max_new_tokens=5)) == on_cpu


def test_no_prefix_survives_a_move_of_the_model_even_if_it_is_warmed_up_first(xla):
    model, prompts = make_model(), make_prompts(40)
    hf.patch(model, page_size=8, token_buckets=(8, 32))
    expected = tokens(model.generate_batch(prompts, max_new_tokens=5, persistent_manager=True))
    model.to(xla)
    model.warmup(progress_bar=False)
    assert tokens(model.generate_batch(prompts, max_new_tokens=5)) == expected
    assert engine_of(model).stats.prefix_hit_rate == 0


def test_a_persistent_manager_keeps_prefixes_for_the_next_call():
    model, prompts = hf.patch(make_model(), page_size=8, token_buckets=(8, 32)), make_prompts(40)
    first = tokens(model.generate_batch(prompts, max_new_tokens=5, persistent_manager=True))
    assert tokens(model.generate_batch(prompts, max_new_tokens=5)) == first
    hit_rate = engine_of(model).stats.prefix_hit_rate
    assert hit_rate == 32 / 80
    model.generate_batch(prompts, max_new_tokens=5)
    assert engine_of(model).stats.prefix_hit_rate < hit_rate
