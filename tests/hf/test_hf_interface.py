"""What `patch` says of itself: its settings, its result's methods, its page size, and what it is busy with."""

import inspect
import logging
from dataclasses import fields

import pytest
from tiny_models import make_model, make_prompts

from torch_rpa import chips, hf
from torch_rpa.hf.api import generate
from torch_rpa.hf.api.gate import engine_of
from torch_rpa.hf.engine.config import EngineConfig, Settings
from torch_rpa.hf.patching.patch import METHODS
from torch_rpa.pages import best_page_size

SMALL = {"page_size": 8, "max_num_seqs": 2, "token_buckets": (16,)}


def notices(caplog):
    return [record.message for record in caplog.records if "compiles a program" in record.message]


def test_the_settings_that_an_editor_shows_are_those_of_the_engine():
    assert Settings.__annotations__ == {field.name: field.type for field in fields(EngineConfig)}


@pytest.mark.parametrize("name", METHODS)
def test_the_protocol_has_the_methods_of_a_patched_model_with_their_arguments(name):
    _, *given = inspect.signature(METHODS[name]).parameters.values()
    _, *declared = inspect.signature(getattr(hf.PatchedModel, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in declared] == [(p.name, p.kind, p.default) for p in given]


def test_the_protocol_has_no_other_methods():
    assert {name for name in vars(hf.PatchedModel) if not name.startswith("_")} == set(METHODS)


def test_pages_are_large_on_a_tpu_and_small_elsewhere(xla):
    from torch_rpa.bridges.target import Target, using

    assert best_page_size("cpu") == 16
    with using(Target("cpu", None)):
        assert best_page_size(xla) == 16
    with using(Target("tpu", "v6e")):
        assert best_page_size(xla) == chips.PAGE_SIZE == 128


def test_a_page_size_is_that_of_the_device_of_the_first_use_unless_it_is_given(device):
    if device.type == "xla":
        from torch_rpa.bridges.target import Target, using

        with using(Target("tpu", "v6e")):
            assert EngineConfig().on(device).page_size == 128
    assert EngineConfig(page_size=8).on(device).page_size == 8
    model = hf.patch(make_model(), max_num_seqs=2)
    assert engine_of(model.to(device)).config.page_size == best_page_size(device)


def test_on_xla_it_is_logged_once_that_programs_are_compiled(xla, caplog):
    model = hf.patch(make_model().to(xla), **SMALL)
    for do_sample in (False, True, False):
        model.generate_batch(make_prompts(3, 5), max_new_tokens=2, do_sample=do_sample)
    (notice,) = notices(caplog)
    assert "16 tokens, greedy" in notice
    assert "warmup()" in notice


def test_after_a_warm_up_nothing_is_logged(xla, caplog):
    model = hf.patch(make_model().to(xla), **SMALL)
    model.warmup(progress_bar=False)
    model.generate_batch(make_prompts(3), max_new_tokens=2)
    assert notices(caplog) == []


def test_cpu_tensors_compile_nothing_and_say_nothing(caplog):
    caplog.set_level(logging.DEBUG)
    hf.patch(make_model(), **SMALL).generate_batch(make_prompts(3), max_new_tokens=2)
    assert notices(caplog) == []


def test_the_progress_bar_shows_what_is_compiled_and_the_tokens_so_far(xla, monkeypatch, caplog):
    shown = []

    class Bar(generate.tqdm):
        def set_postfix_str(self, text="", refresh=True):
            shown.append((text, refresh))

    monkeypatch.setattr(generate, "tqdm", Bar)
    model = hf.patch(make_model().to(xla), **SMALL)
    model.generate_batch(make_prompts(3, 5), max_new_tokens=2, progress_bar=True)
    assert shown == [("compiling: 16 tokens, greedy", True), *[(f"{n} tokens", False) for n in range(1, 5)]]
    assert notices(caplog) == []
