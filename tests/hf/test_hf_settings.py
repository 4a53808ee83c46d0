"""Nothing that a caller says is ignored in silence: each setting of the installed transformers does as its row says."""

import inspect
import logging
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from settings_table import DOCUMENT, document
from tiny_models import make_model, make_prompts, tokens
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from torch_rpa import hf
from torch_rpa.hf.api import settings
from torch_rpa.hf.api.batching_config import BatchingOptions, batching_options
from torch_rpa.hf.api.generation_config import resolve
from torch_rpa.hf.api.manager import Manager
from torch_rpa.hf.api.padded_generate import generate
from torch_rpa.hf.api.settings import BATCHING, GENERATE_KEYWORDS, GENERATION, Kind
from torch_rpa.hf.engine.config import EngineConfig
from torch_rpa.hf.patching.patch import METHODS

# Of every kind that a setting may have; the falsy ones are values like all others.
PROBES = [0, 0.0, False, "", 1, 2, 0.5, 2.5, True, "x", [1], {"a": 1}]
# For each honoured setting a value that changes what is asked for.
HONOURED = {
    "max_new_tokens": 7,
    "max_length": 7,
    "min_new_tokens": 7,
    "min_length": 7,
    "stop_strings": ["x"],
    "do_sample": True,
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.5,
    "repetition_penalty": 1.5,
    "num_return_sequences": 3,
    "eos_token_id": [3, 0],
}
TOKENIZER = SimpleNamespace(decode=str)


def asked(where: str, said: dict):
    """What a request asks for that says this as keywords, in its config, or has a model whose checkpoint says it."""
    configs = {"config": GenerationConfig(), "checkpoint": GenerationConfig()}
    if where != "keyword":
        for name, value in said.items():
            setattr(configs[where], name, value)
    model = SimpleNamespace(generation_config=configs["checkpoint"])
    return resolve(model, configs["config"], TOKENIZER, **(said if where == "keyword" else {}))


def names(table, kind):
    return [name for name, setting in table.items() if setting.kind is kind]


everywhere = pytest.mark.parametrize("where", ["keyword", "config", "checkpoint"])


def test_every_field_and_keyword_of_the_installed_transformers_has_a_row():
    generation = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert set(GENERATION) == generation
    assert set(BATCHING) == {field.name for field in fields(ContinuousBatchingConfig)}
    assert parameters(GenerationMixin.generate) <= set(GENERATE_KEYWORDS)


def parameters(function) -> set[str]:
    named = inspect.signature(function).parameters.values()
    return {p.name for p in named if p.kind is not p.VAR_KEYWORD and p.name not in ("self", "model")}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (GenerationMixin.generate_batch, METHODS["generate_batch"]),
        (GenerationMixin.init_continuous_batching, METHODS["init_continuous_batching"]),
        (GenerationMixin.continuous_batching_context_manager, METHODS["continuous_batching_context_manager"]),
        *[
            (getattr(ContinuousBatchingManager, name), getattr(Manager, name))
            for name in ("start", "stop", "add_request", "cancel_request", "get_result", "register_result_handler")
        ],
    ],
    ids=lambda function: function.__name__,
)
def test_the_other_methods_take_every_parameter_of_those_of_the_installed_transformers(theirs, ours):
    assert parameters(theirs) <= parameters(ours)


@everywhere
@pytest.mark.parametrize("name", names(GENERATION, Kind.HONOURED))
def test_an_honoured_setting_changes_what_is_asked_for(name, where):
    others = {} if name == "do_sample" else {"do_sample": True}
    without = asked(where, others)
    assert asked(where, {**others, name: HONOURED[name]}) != without
    for off in GENERATION[name].off:
        assert asked(where, {**others, name: off}) == without


@everywhere
@pytest.mark.parametrize("name", names(GENERATION, Kind.NEUTRAL))
def test_a_neutral_setting_changes_nothing_whatever_its_value(name, where):
    for value in PROBES:
        assert asked(where, {"do_sample": True, name: value}) == asked(where, {"do_sample": True})


@everywhere
@pytest.mark.parametrize("name", names(GENERATION, Kind.REFUSED))
def test_a_refused_setting_is_refused_by_name_unless_its_value_asks_for_nothing(name, where):
    setting = GENERATION[name]
    for value in (*PROBES, *setting.off):
        if setting.is_off(value):
            assert asked(where, {"do_sample": True, name: value}) == asked(where, {"do_sample": True})
            continue
        with pytest.raises(NotImplementedError, match=f"{name}=") as error:
            asked(where, {"do_sample": True, name: value})
        assert setting.note in str(error.value)


@everywhere
@pytest.mark.parametrize("name", [name for name, setting in GENERATION.items() if setting.only_sampling])
def test_what_only_sampling_reads_changes_nothing_without_sampling(name, where):
    value = HONOURED.get(name, 0.5)
    assert asked(where, {name: value}) == asked(where, {})


def test_what_only_sampling_reads_is_warned_of_once_unless_the_checkpoint_says_it(caplog):
    with caplog.at_level(logging.WARNING, "torch_rpa.hf.api.generation_config"):
        asked("checkpoint", {"temperature": 0.612})
        asked("keyword", {"temperature": 1.0, "do_sample": False})
        assert not caplog.records
        for _ in range(2):
            asked("keyword", {"temperature": 0.613, "min_p": 0.1})
    assert [record.message for record in caplog.records] == [
        "temperature=0.613, min_p=0.1 without do_sample=True: the most likely token is taken, whatever they say"
    ]


@pytest.mark.parametrize("name", BATCHING)
def test_a_batching_setting_does_as_its_row_says(name):
    setting, patched = BATCHING[name], EngineConfig(page_size=32, num_pages=7, token_buckets=(8, 64))
    default = {field.name: field.default for field in fields(ContinuousBatchingConfig)}[name]
    agreeing = {"token_buckets": 64}.get(setting.patch, getattr(patched, setting.patch or "", None))
    assert batching_options(ContinuousBatchingConfig(), patched) == BatchingOptions()
    for value in [*PROBES, None, *setting.off, *([agreeing] if setting.patch else [])]:
        config = ContinuousBatchingConfig()
        setattr(config, name, value)
        asks_for_nothing = value == default or setting.is_off(value) or (setting.patch and value == agreeing)
        if setting.kind is Kind.REFUSED and not asks_for_nothing:
            with pytest.raises(NotImplementedError, match=f"{name}=") as error:
                batching_options(config, patched)
            assert setting.note in str(error.value)
        else:
            changes = setting.kind is Kind.HONOURED and value != default
            assert (batching_options(config, patched) != BatchingOptions()) == changes


def test_sizes_that_agree_with_those_of_patch_are_taken():
    model = hf.patch(make_model(), page_size=8, max_num_seqs=4)
    agreeing = ContinuousBatchingConfig(page_size=8, max_requests_per_batch=4)
    assert len(tokens(model.generate_batch([[1, 2]], None, agreeing, max_new_tokens=3))[0]) == 3
    other = ContinuousBatchingConfig(page_size=32)
    with pytest.raises(NotImplementedError, match=r"page_size=32 \(torch_rpa.hf.patch has page_size=\)"):
        model.generate_batch([[1, 2]], None, other, max_new_tokens=3)
    with pytest.raises(NotImplementedError, match="page_size=32"):
        model.init_continuous_batching(None, other)


def test_what_a_batching_config_does_not_define_is_refused():
    config = ContinuousBatchingConfig()
    config.max_num_seqs = 4
    with pytest.raises(NotImplementedError, match=r"max_num_seqs=4 \(torch_rpa does not know it\)"):
        batching_options(config, EngineConfig())


@pytest.mark.parametrize("name", GENERATE_KEYWORDS)
def test_a_keyword_of_generate_does_as_its_row_says(name, patched):
    setting = GENERATE_KEYWORDS[name]
    if setting.kind is Kind.HONOURED:
        assert name in inspect.signature(generate).parameters
        return
    ids, greedy = torch.tensor([[1, 2]]), GenerationConfig(max_new_tokens=2)
    expected = patched.generate(ids, greedy).tolist()
    for value in (*PROBES, None, *setting.off):
        if setting.kind is Kind.REFUSED and value is not None and not setting.is_off(value):
            with pytest.raises(NotImplementedError, match=f"{name}="):
                patched.generate(ids, greedy, **{name: value})
        else:
            assert patched.generate(ids, greedy, **{name: value}).tolist() == expected


@pytest.fixture(scope="module")
def patched():
    return hf.patch(make_model())


def test_a_setting_of_a_newer_transformers_is_refused_until_it_has_a_row(monkeypatch):
    monkeypatch.setattr(settings, "GENERATION", {n: s for n, s in GENERATION.items() if n != "use_mtp"})
    with pytest.raises(NotImplementedError, match=r"use_mtp=True \(torch_rpa does not know it\)"):
        asked("config", {"use_mtp": True})


ELSEWHERE = {
    "presence_penalty": 0.5,
    "frequency_penalty": 0.0,
    "logit_bias": {"5": -100},
    "n": 2,
    "stop": ["x"],
    "max_tokens": 5,
    "seed": 0,
}


@pytest.mark.parametrize(("name", "value"), ELSEWHERE.items(), ids=ELSEWHERE)
def test_what_other_servers_call_it_is_refused_wherever_it_stands(name, value):
    for where in ("config", "checkpoint"):
        with pytest.raises(NotImplementedError, match=f"{name}=.*GenerationConfig does not define it; "):
            asked(where, {name: value})
    with pytest.raises(TypeError, match=rf"does not know the keywords {name} \("):
        asked("keyword", {name: value})


def test_attributes_that_only_a_checkpoint_has_are_nobodys():
    """As in transformers: Qwen's has "chat_format". A config that was made of it has them, too."""
    assert asked("checkpoint", {"chat_format": "chatml"}) == asked("checkpoint", {})
    checkpoint = GenerationConfig(chat_format="chatml")
    model = SimpleNamespace(generation_config=checkpoint)
    assert resolve(model, GenerationConfig(chat_format="chatml")) == resolve(model, None)
    with pytest.raises(NotImplementedError, match="chat_format='raw'"):
        resolve(model, GenerationConfig(chat_format="raw"))


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma3n"])
def test_gemma_generates_as_it_ships(family):
    prompts = make_prompts(5, 9)
    plain = tokens(hf.patch(make_model(family)).generate_batch(prompts, max_new_tokens=4))
    model = make_model(family)
    model.generation_config = GenerationConfig(
        bos_token_id=2, pad_token_id=0, cache_implementation="hybrid", max_new_tokens=4, top_p=0.95, top_k=64
    )
    hf.patch(model)
    assert tokens(model.generate_batch(prompts)) == plain
    row = model.generate(torch.tensor(prompts[:1]), attention_mask=torch.ones(1, 5))
    assert row.tolist() == [prompts[0] + plain[0]]


@pytest.mark.parametrize(
    "make", [list, tuple, np.array, torch.tensor, lambda ids: ids[0], lambda ids: np.int64(ids[0])]
)
def test_stop_tokens_are_taken_as_transformers_takes_them(make, patched):
    free_running = tokens(patched.generate_batch([[1, 2]], max_new_tokens=6))[0]
    stop = make([free_running[1]])
    answer = free_running[: free_running.index(free_running[1]) + 1]
    assert tokens(patched.generate_batch([[1, 2]], max_new_tokens=6, eos_token_id=stop))[0] == answer
    row = patched.generate(torch.tensor([[1, 2]]), max_new_tokens=6, eos_token_id=stop, pad_token_id=np.int64(0))
    assert row.tolist() == [[1, 2, *answer]]


def test_numbers_of_numpy_are_numbers(patched):
    expected = tokens(
        patched.generate_batch([[1, 2]], max_new_tokens=3, do_sample=True, seed=5, temperature=0.5, top_k=7)
    )
    said = {"max_new_tokens": np.int32(3), "temperature": np.float32(0.5), "top_k": np.int64(7), "seed": np.int64(5)}
    assert tokens(patched.generate_batch([[1, 2]], do_sample=True, **said)) == expected


def test_one_seed_for_several_requests_gives_equal_prompts_equal_answers(patched):
    manager = patched.init_continuous_batching()
    ids = manager.add_requests([[1, 2]] * 2, max_new_tokens=8, do_sample=True, seed=5)
    manager.start()
    try:
        first, second = (manager.get_result(request_id).generated_tokens for request_id in ids)
    finally:
        manager.stop()
    assert first == second


def test_the_documented_table_is_what_the_rows_say():
    assert DOCUMENT.read_text() == document(), "run `make settings-table`"
