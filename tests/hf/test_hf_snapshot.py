"""The tokens are those of the model as it stands when a step runs, and the model is left as it is."""

import pytest
import torch
from tiny_models import make_model, make_prompts, plain_greedy, tokens

from torch_rpa import hf
from torch_rpa.hf.engine.snapshot import ModelSnapshot

SETTINGS = {"page_size": 8, "num_pages": 64, "max_num_seqs": 4, "token_buckets": (4, 32)}
PROMPTS = make_prompts(20, 3, 9)
DROPOUT = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.0}


def answers(model, **keywords) -> list[list[int]]:
    return tokens(model.generate_batch(PROMPTS, max_new_tokens=5, **keywords))


def patched(model, device):
    return hf.patch(model.to(device), **SETTINGS)


def negate(module, args, output):
    return -output


# ---- What changes the tokens ----------------------------------------------------------------------------------------


def test_a_hook_counts_from_when_it_is_added_to_when_it_is_removed(device):
    plain = make_model()
    without = plain_greedy(plain, PROMPTS, 5)
    plain.lm_head.register_forward_hook(negate)
    with_hook = plain_greedy(plain, PROMPTS, 5)
    assert with_hook != without
    model = patched(make_model(), device)
    assert answers(model) == without
    handle = model.lm_head.register_forward_hook(negate)
    assert answers(model) == with_hook
    handle.remove()
    assert answers(model) == without


def test_a_hook_that_was_there_at_the_first_call_is_gone_when_it_is_removed(device):
    model = patched(make_model(), device)
    handle = model.lm_head.register_forward_hook(negate)
    first = answers(model)
    handle.remove()
    assert answers(model) == plain_greedy(make_model(), PROMPTS, 5) != first


def change_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()


def change_attribute(model):
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.9


def change_config(model):
    model.model.layers[0].input_layernorm.variance_epsilon = 3.0


def change_weight(model):
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())


def change_method(model):
    former = model.lm_head.forward
    model.lm_head.forward = lambda hidden: -former(hidden)


@pytest.mark.parametrize("change", [change_activation, change_attribute, change_config, change_weight, change_method])
def test_what_is_changed_on_a_module_counts_from_the_next_step_on(device, change):
    plain = make_model()
    before = plain_greedy(plain, PROMPTS, 5)
    change(plain)
    expected = plain_greedy(plain, PROMPTS, 5)
    model = patched(make_model(), device)
    assert answers(model) == before
    change(model)
    assert answers(model) == expected != before


def test_autocast_counts_where_it_stands(device):
    model, plain = patched(make_model(), device), make_model()
    with torch.autocast(device.type, torch.bfloat16):
        under = answers(model)
    assert answers(model) == plain_greedy(plain, PROMPTS, 5)
    with torch.autocast(device.type, torch.bfloat16):
        assert answers(model) == under


def test_prefixes_that_another_model_filled_are_not_shared(device):
    model = patched(make_model(), device)
    answers(model, persistent_manager=True)
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: output * 3)
    plain = make_model()
    plain.model.layers[0].register_forward_hook(lambda module, args, output: output * 3)
    assert answers(model, persistent_manager=True) == plain_greedy(plain, PROMPTS, 5)
    handle.remove()
    assert answers(model, persistent_manager=True) == plain_greedy(make_model(), PROMPTS, 5)


# ---- What does not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the first call", "after it"])
def test_training_mode_changes_no_token_and_stays_as_it_was(device, when):
    expected = plain_greedy(make_model("gpt2", **DROPOUT), PROMPTS, 5)
    model = patched(make_model("gpt2", **DROPOUT), device)
    if when == "after it":
        assert answers(model) == expected
    model.train()
    assert answers(model) == expected
    assert all(module.training for module in model.modules())
    model.eval()
    assert answers(model) == expected
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("opt", {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5}),
        ("gpt-neox", {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
        ("phi", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3}),
        ("gpt2", {"resid_pdrop": 0.3, "attn_pdrop": 0.3}),
        ("mixtral", {"router_jitter_noise": 0.3}),
    ],
)
def test_training_mode_while_a_manager_runs_changes_no_token(family, changes):
    expected = plain_greedy(make_model(family, **changes), PROMPTS, 20)
    model = patched(make_model(family, **changes), "cpu")
    with model.continuous_batching_context_manager() as manager:
        ids = manager.add_requests(PROMPTS, max_new_tokens=20, streaming=True)
        manager.get_result(ids[0], timeout=60)
        model.train()
        outputs = [list(manager.request_id_iter(request_id))[-1] for request_id in ids]
    assert [output.error for output in outputs] == [None] * len(ids)
    assert [output.generated_tokens for output in outputs] == expected
    assert model.training


@pytest.mark.xla
def test_what_a_forward_sets_on_its_modules_compiles_nothing_and_is_not_the_users(xla):
    model = patched(make_model(), xla)

    def count(module, args, output):
        module.seen = getattr(module, "seen", 0) + 1

    model.model.register_forward_hook(count)
    answers(model)
    compiled = model.init_continuous_batching().stats.num_compilations
    for _ in range(3):
        answers(model)
    assert model.init_continuous_batching().stats.num_compilations == compiled
    assert not hasattr(model.model, "seen")


@pytest.mark.xla
def test_a_new_trace_of_the_same_computation_compiles_nothing(xla):
    model = patched(make_model(), xla)
    first = answers(model)
    compiled = model.init_continuous_batching().stats.num_compilations
    handle = model.register_forward_hook(lambda *_: None)
    assert answers(model) == first
    handle.remove()
    assert answers(model) == first
    assert model.init_continuous_batching().stats.num_compilations == compiled


# ---- The snapshot itself --------------------------------------------------------------------------------------------


def test_a_snapshot_shares_weights_and_nothing_else():
    model = make_model().train()
    snapshot = ModelSnapshot(model)
    assert [id(p) for p in snapshot.model.parameters()] == [id(p) for p in model.parameters()]
    assert not {id(m) for m in snapshot.model.modules()} & {id(m) for m in model.modules()}
    assert not any(module.training for module in snapshot.model.modules())
    assert snapshot.is_current()


def test_modules_that_share_a_child_still_do_in_a_snapshot():
    model = make_model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    layers = ModelSnapshot(model).model.model.layers
    assert layers[0].mlp is layers[1].mlp


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.config, "output_router_logits", True),
        lambda model: setattr(model.model.layers[0], "added", 1),
        lambda model: delattr(model.model.layers[0].self_attn, "scaling"),
        lambda model: model.model.layers[0].register_forward_pre_hook(lambda *_: None),
        lambda model: model.model.register_buffer("more", torch.ones(1)),
        lambda model: model.lm_head.to(torch.bfloat16),
        lambda model: setattr(model.model, "norm", torch.nn.Identity()),
        lambda model: setattr(model.lm_head, "__class__", type("Other", (torch.nn.Linear,), {})),
    ],
)
def test_a_change_is_noticed(change):
    model = make_model()
    snapshot = ModelSnapshot(model)
    change(model)
    assert not snapshot.is_current()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: model.load_state_dict(make_model(seed=1).state_dict()),
        lambda model: model.requires_grad_(False),
        lambda model: setattr(model.generation_config, "max_new_tokens", 3),
    ],
)
def test_what_no_step_depends_on_is_no_change(change):
    model = make_model()
    snapshot = ModelSnapshot(model)
    change(model)
    assert snapshot.is_current()


# ---- When the engine looks ------------------------------------------------------------------------------------------


def test_a_request_sees_what_was_changed_before_it_and_what_runs_sees_it_within_eight_tokens():
    model = patched(make_model(), "cpu")
    with model.continuous_batching_context_manager() as manager:
        running = manager.add_request(PROMPTS[0], max_new_tokens=150, streaming=True)
        manager.get_result(running, timeout=60)
        handle = model.lm_head.register_forward_hook(negate)
        after = manager.get_result(manager.add_request(PROMPTS[1], max_new_tokens=5), timeout=60)
        handle.remove()
        manager.cancel_request(running)
    plain = make_model()
    plain.lm_head.register_forward_hook(negate)
    assert after.generated_tokens == plain_greedy(plain, [PROMPTS[1]], 5)[0]


def test_a_change_in_a_pause_counts_from_the_next_step_on():
    model, seen = patched(make_model(), "cpu"), []
    with model.continuous_batching_context_manager() as manager:
        request_id = manager.add_request(PROMPTS[1], max_new_tokens=150, streaming=True)
        manager.get_result(request_id, timeout=60)
        with manager.pause():
            before = manager.stats.num_steps
            model.register_forward_hook(lambda *_: seen.append(None))
        while manager.stats.num_steps < before + 5:
            pass
        with manager.pause():
            assert len(seen) == manager.stats.num_steps - before
        manager.cancel_request(request_id)
