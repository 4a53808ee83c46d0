"""Every family writes what its plain model writes with transformers' eager attention, and compiles once."""

from functools import cache

import pytest
import torch
from family_table import attention_calls, options_that_matter, table
from tiny_models import FAMILIES, VOCAB_SIZE, make_model, make_prompts, plain_greedy, smallest_lead, tokens
from transformers import AttentionInterface

from benchmarks.readme import README, with_table
from torch_rpa import hf
from torch_rpa.hf.model import attention, experts
from torch_rpa.hf.model.cache import PagedKVCache
from torch_rpa.hf.patching.support import SUPPORTED_CLASSES

# Shorter and longer than every window (5 to 7 tokens), than a page, and than a step.
PROMPTS = make_prompts(3, 40, 9, 21)
PROMPTS_OF_OTHER_LENGTHS = make_prompts(1, 33, 14, 2, 50, seed=1)
NEW_TOKENS = 8
SETTINGS = {"page_size": 8, "max_num_seqs": 4, "token_buckets": (16,)}
# Float32 noise moves the logits, which are a few units large, by about 1e-5.
CLOSE_CALL = 3e-3


@cache
def plain_answers(family: str) -> tuple[list[list[int]], list[list[int]]]:
    """To PROMPTS and to PROMPTS_OF_OTHER_LENGTHS."""
    model = make_model(family)
    return tuple(plain_greedy(model, prompts, NEW_TOKENS) for prompts in (PROMPTS, PROMPTS_OF_OTHER_LENGTHS))


def patched_answers(model, prompts) -> list[list[int]]:
    return tokens(model.generate_batch(prompts, max_new_tokens=NEW_TOKENS))


def compile_count(device) -> int:
    if device.type != "xla":
        return 0
    from torch_rpa import bridges

    return bridges.of("xla").compilations()[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_eager_attention_and_other_lengths_compile_nothing(family, device):
    model = hf.patch(make_model(family).to(device), **SETTINGS)
    answers, answers_to_other_lengths = plain_answers(family)
    assert patched_answers(model, PROMPTS) == answers
    compiled = compile_count(device)
    assert patched_answers(model, PROMPTS_OF_OTHER_LENGTHS) == answers_to_other_lengths
    assert compile_count(device) == compiled


# ---- That the test above can fail ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_is_a_close_call_and_answers_vary(family):
    answers, answers_to_other_lengths = plain_answers(family)
    model = make_model(family)
    assert smallest_lead(model, PROMPTS, answers) > CLOSE_CALL
    assert smallest_lead(model, PROMPTS_OF_OTHER_LENGTHS, answers_to_other_lengths) > CLOSE_CALL
    assert len({token for answer in answers for token in answer}) > VOCAB_SIZE // 10
    assert len({tuple(answer) for answer in answers + answers_to_other_lengths}) == 9


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_depend_on_the_first_of_40_tokens_unless_all_layers_are_windowed(family):
    longest = PROMPTS[1]
    other_start = [(longest[0] + 1) % VOCAB_SIZE, *longest[1:]]
    (answer,) = plain_greedy(make_model(family), [other_start], NEW_TOKENS)
    all_windowed = all(call.sliding_window is not None for call in attention_calls(family))
    assert (answer == plain_answers(family)[0][1]) == all_windowed


@pytest.fixture
def replace_attention():
    """replace_attention(function): patched models attend with it, until the end of the test."""
    yield lambda function: AttentionInterface.register(attention.NAME, function)
    AttentionInterface.register(attention.NAME, attention.paged_attention)


@pytest.mark.parametrize(
    ("family", "option"), [(family, option) for family in FAMILIES for option in options_that_matter(family)]
)
def test_an_option_of_the_attention_that_is_ignored_shows_in_the_tokens(family, option, replace_attention):
    def ignoring(module, query, *args, **kwargs):
        ignored = query.shape[-1] ** -0.5 if option == "scaling" else None
        return attention.paged_attention(module, query, *args, **{**kwargs, option: ignored})

    model = hf.patch(make_model(family), **SETTINGS)
    replace_attention(ignoring)
    assert patched_answers(model, PROMPTS) != plain_answers(family)[0]


@pytest.mark.parametrize("family", ["mistral-window", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_window_off_by_one_shows_in_the_tokens(family, change, replace_attention):
    def with_other_window(*args, sliding_window=None, **kwargs):
        window = sliding_window and sliding_window + change
        return attention.paged_attention(*args, sliding_window=window, **kwargs)

    model = hf.patch(make_model(family), **SETTINGS)
    replace_attention(with_other_window)
    assert patched_answers(model, PROMPTS) != plain_answers(family)[0]


def test_every_supported_class_has_a_family_and_every_option_a_control():
    assert {family.model_class for family in FAMILIES.values()} == set(SUPPORTED_CLASSES)
    controlled = {option for family in FAMILIES for option in options_that_matter(family)}
    assert controlled == {"sliding_window", "softcap", "s_aux", "scaling"}


# ---- Layers that share keys and values ----------------------------------------------------------------------------


def test_layers_that_share_keys_and_values_have_no_pages_of_their_own():
    cache = PagedKVCache(make_model("gemma3n"), num_pages=4, page_size=8, dtype=torch.float32)
    windowed, full = cache.layers
    assert [cache.layer_pages(layer) is pages for layer, pages in enumerate([windowed, full, windowed, full])]
    assert [cache.writes(layer) for layer in range(4)] == [True, True, False, False]


def test_sharing_with_another_layer_shows_in_the_tokens(monkeypatch):
    monkeypatch.setattr("torch_rpa.hf.model.cache.kv_source_layers", lambda config: [0, 1, 1, 0])
    model = hf.patch(make_model("gemma3n"), **SETTINGS)
    assert patched_answers(model, PROMPTS) != plain_answers("gemma3n")[0]


# ---- Experts ------------------------------------------------------------------------------------------------------

EXPERTS = [family for family, one in FAMILIES.items() if one.model_type._can_set_experts_implementation()]


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_with_static_shapes_equal_transformers_own(family):
    model = make_model(family)
    module = next(module for module in model.modules() if hasattr(module, "_apply_gate"))
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    rows = torch.randn(9, model.config.hidden_size, generator=generator)
    scores = torch.rand(9, module.num_experts, generator=generator)
    weights, index = scores.topk(2)
    with torch.no_grad():
        expected = type(module).forward.__wrapped__(module, rows, index, weights)
        torch.testing.assert_close(experts.all_experts(module, rows, index, weights), expected, atol=3e-5, rtol=3e-5)


def test_an_expert_that_overflows_on_rows_of_others_changes_nothing():
    module = next(module for module in make_model("mixtral").modules() if hasattr(module, "_apply_gate"))
    rows, index, weights = torch.ones(3, 64), torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.full((3, 2), 0.5)
    with torch.no_grad():
        expected = experts.all_experts(module, rows, index, weights)
        module.down_proj[3] = torch.inf
        assert torch.equal(experts.all_experts(module, rows, index, weights), expected)


def test_experts_on_cpu_tensors_stay_the_users():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    calls = []
    batched = ALL_EXPERTS_FUNCTIONS["batched_mm"]
    ALL_EXPERTS_FUNCTIONS.register("users_own", lambda *args: calls.append(1) or batched(*args))
    model = make_model("mixtral")
    model.set_experts_implementation("users_own")
    hf.patch(model, **SETTINGS)
    assert patched_answers(model, PROMPTS) == plain_answers("mixtral")[0]
    assert calls
    assert hf.unpatch(model).get_experts_implementation() == {"": "users_own"}


# ---- The table ----------------------------------------------------------------------------------------------------


def test_the_readme_lists_these_families():
    assert README.read_text() == with_table("families", table()), "out of date: make family-table"
