"""On the XLA device: what is compiled, how often something runs, and that the cache stays where it is."""

import pytest
import torch
from tiny_models import make_model, make_prompts, plain_greedy, tokens
from transformers import GenerationConfig

from torch_rpa import hf
from torch_rpa.hf.api.gate import engine_of

SETTINGS = {"page_size": 8, "max_num_seqs": 4, "token_buckets": (4, 32)}


@pytest.fixture
def model(xla):
    model = make_model().to(xla)
    return hf.patch(model, **SETTINGS)


def compile_count() -> int:
    from torch_rpa import bridges

    return bridges.of("xla").compilations()[0]


def executions() -> int:
    import torch_xla.core.xla_model as xm
    from torch_xla.debug import metrics

    xm.wait_device_ops()  # PyTorch/XLA counts an execution when it hears of its end, maybe after its result was fetched
    return metrics.metric_data("ExecuteTime")[0]


def transfers_to_host() -> int:
    from torch_xla.debug import metrics

    return metrics.metric_data("TransferFromDeviceTime")[0]


@pytest.mark.parametrize("do_sample", [False, True])
def test_other_lengths_compile_nothing(model, do_sample):
    config = GenerationConfig(do_sample=do_sample, top_k=20, top_p=0.9, max_new_tokens=6)
    before = compile_count()
    model.generate_batch(make_prompts(100, 3, 7), config, seed=0)
    first_batch = compile_count() - before
    # One for each bucket, one that zeroes a page array, and one for a step of a long prompt that samples nothing.
    assert first_batch <= len(SETTINGS["token_buckets"]) + 2
    for seed, lengths in enumerate([(1,), (100, 2, 9, 33, 4, 4, 60), (32, 32), (5, 6, 7, 8, 9)]):
        model.generate_batch(make_prompts(*lengths, seed=seed), config, max_new_tokens=seed + 3)
    assert compile_count() - before == first_batch


def test_other_temperatures_compile_nothing(model):
    prompts = make_prompts(3, 9)
    model.generate_batch(prompts, GenerationConfig(do_sample=True, temperature=0.7, top_k=5), max_new_tokens=4)
    before = compile_count()
    model.generate_batch(prompts, GenerationConfig(do_sample=True, temperature=1.5, top_p=0.5), max_new_tokens=4)
    assert compile_count() == before


def test_one_execution_and_one_fetch_a_step(model):
    model.generate_batch(make_prompts(3, 50), max_new_tokens=4)
    steps, executed, fetched = engine_of(model).num_steps, executions(), transfers_to_host()
    model.generate_batch(make_prompts(40, 2, 9, 70, 6), max_new_tokens=9)
    steps = engine_of(model).num_steps - steps
    assert steps > 9
    assert executions() - executed == steps
    assert transfers_to_host() - fetched == steps


def test_pages_stay_in_their_buffers(model):
    import torch_xla

    def pointers():
        layers = engine_of(model).runner._cache.layers
        return [torch_xla._XLAC._unsafe_buffer_pointer(layer) for layer in layers]

    model.generate_batch(make_prompts(3, 50), max_new_tokens=4)
    first = pointers()
    assert len(set(first)) == len(first)
    engine = engine_of(model)
    for index, prompt in enumerate(make_prompts(20, 3)):
        engine.add(prompt, request_id=str(index), max_new_tokens=5)
    while engine.has_work:
        engine.step()
        assert pointers() == first


def test_lazy_tensors_of_others_stay_out_of_the_program(model, xla):
    prompts = make_prompts(3, 20)
    model.generate_batch(prompts, max_new_tokens=4)
    before = compile_count()
    someone_elses = torch.ones(3, device=xla) + 1
    model.generate_batch(prompts, max_new_tokens=4)
    assert compile_count() == before
    assert someone_elses.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("xla_step", ["replay", "lazy", "openxla"])
def test_every_way_to_run_a_step_gives_the_same_tokens(xla, xla_step):
    prompts = make_prompts(3, 50, 7)
    config = GenerationConfig(do_sample=True, top_k=20, max_new_tokens=6)
    expected = [tokens(hf.patch(make_model(), **SETTINGS).generate_batch(prompts, one, seed=1, max_new_tokens=6))
                for one in (None, config)]  # fmt: skip
    model = hf.patch(make_model().to(xla), **SETTINGS, xla_step=xla_step)
    assert [tokens(model.generate_batch(prompts, one, seed=1, max_new_tokens=6)) for one in (None, config)] == expected
    after_first = engine_of(model).stats.num_compilations
    assert after_first <= 5 if xla_step == "openxla" else after_first <= 4
    model.generate_batch(make_prompts(80, 1, 2, 9, 4), max_new_tokens=7)
    assert engine_of(model).stats.num_compilations == after_first


def test_after_warm_up_nothing_is_compiled_whatever_comes(model):
    model.warmup(progress_bar=False)
    assert engine_of(model).stats.compilations_after_warm_up == 0
    before = compile_count()
    wild = GenerationConfig(do_sample=True, temperature=90.0, top_k=0, top_p=0.99, repetition_penalty=1.1)
    for config in (None, GenerationConfig(do_sample=True), wild):
        model.generate_batch(make_prompts(3, 50, 7, 120), config, max_new_tokens=6, min_new_tokens=2, eos_token_id=3)
    assert engine_of(model).stats.compilations_after_warm_up == 0
    assert compile_count() == before


def test_new_weights_are_used_without_compiling(model):
    prompts, other = make_prompts(3, 20), make_model(seed=1)
    first = tokens(model.generate_batch(prompts, max_new_tokens=4))
    before = engine_of(model).stats.num_compilations
    model.load_state_dict(other.state_dict())
    assert tokens(model.generate_batch(prompts, max_new_tokens=4)) == plain_greedy(other, prompts, 4) != first
    assert engine_of(model).stats.num_compilations == before


def test_a_module_put_in_after_the_first_step_is_run(model):
    prompts, other = make_prompts(3, 20), make_model(seed=1)
    first = tokens(model.generate_batch(prompts, max_new_tokens=4))
    model.lm_head = other.lm_head.to(model.device)
    changed = make_model()
    changed.lm_head = make_model(seed=1).lm_head
    expected = plain_greedy(changed, prompts, 4)
    assert tokens(model.generate_batch(prompts, max_new_tokens=4)) == expected != first


@pytest.mark.parametrize("xla_step", ["replay", "lazy"])
def test_value_checks_change_no_token(xla, xla_step, monkeypatch):
    """What they read while a program is traced must not become a constant of it."""
    monkeypatch.setenv("TORCH_RPA_CHECK", "1")
    model, prompts = hf.patch(make_model().to(xla), xla_step=xla_step, **SETTINGS), make_prompts(20, 3)
    assert tokens(model.generate_batch(prompts, max_new_tokens=6)) == plain_greedy(make_model(), prompts, 6)
