"""A model that is sharded over four virtual chips writes what it writes on one."""

import copy
import threading
from collections import Counter

import numpy as np
import pytest
import torch
import torch_xla.distributed.spmd as xs
from tiny_models import make_model, make_prompts, plain_greedy, tokens
from torch_xla.debug import metrics
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import torch_rpa
from torch_rpa import bridges, hf
from torch_rpa.hf.api.gate import engine_of
from torch_rpa.sharding import sharding_of

SETTINGS = {"page_size": 8, "max_num_seqs": 4, "token_buckets": (4, 32)}
PROMPTS = make_prompts(3, 50, 7)
# Of a layer's two-dimensional weights: outputs over chips, or inputs.
COLUMNS, ROWS = "{devices=[4,1]0,1,2,3}", "{devices=[1,4]0,1,2,3}"
EXPERTS = "{devices=[4,1,1]0,1,2,3}"


@pytest.fixture
def mesh():
    """Four chips; unlike the ops' tests nobody calls use_mesh."""
    return xs.Mesh(np.arange(4), (4,), ("model",))


def sharded_model(mesh, family="llama", *, settings=None, **changes):
    model = make_model(family, **changes).to("xla")
    return hf.patch(model, mesh=mesh, **SETTINGS, **(settings or {}))


def shapes_on_chips(tensor):
    """The shape of each chip's part; the whole shape four times for a tensor that is not sharded."""
    sharded = xs.wrap_if_sharded(tensor)
    if not isinstance(sharded, xs.XLAShardedTensor):
        return [tuple(tensor.shape)] * 4
    return [tuple(shard.data.shape) for shard in sharded.local_shards]


FAMILIES = {
    "a_kv_head_per_chip": ("llama", {"num_key_value_heads": 4}),
    "chips_per_kv_head": ("llama", {}),
    "kv_heads_per_chip": ("qwen3", {"num_attention_heads": 16, "num_key_value_heads": 8}),
    "biases": ("qwen2", {"num_key_value_heads": 4}),
    "tied_embedding": ("smollm2", {"num_attention_heads": 4}),
    "window_and_soft_cap": ("gemma2", {}),
    "fused_projections": ("phi3", {}),
    "norms_over_all_heads": ("olmo2", {"num_key_value_heads": 4}),
    "sinks_and_experts": ("gpt-oss", {"num_key_value_heads": 4}),
    "experts": ("mixtral", {}),
    "experts_that_do_not_divide": ("mixtral", {"num_local_experts": 6, "num_experts": 6}),
}


@pytest.mark.parametrize(("family", "changes"), FAMILIES.values(), ids=FAMILIES)
def test_greedy_tokens_equal_one_device(mesh, family, changes):
    plain = make_model(family, **changes)
    model = sharded_model(mesh, family, **changes)
    assert tokens(model.generate_batch(PROMPTS, max_new_tokens=6)) == plain_greedy(plain, PROMPTS, 6)
    compiled, others = engine_of(model).stats.num_compilations, make_prompts(80, 1, 2, 9, 4)
    assert tokens(model.generate_batch(others, max_new_tokens=7)) == plain_greedy(plain, others, 7)
    assert engine_of(model).stats.num_compilations == compiled <= len(SETTINGS["token_buckets"])


@pytest.mark.parametrize(("num_kv_heads", "kv_sharding"), [(4, COLUMNS), (2, "")])
def test_each_chip_holds_its_share_of_weights_and_cache(mesh, num_kv_heads, kv_sharding):
    model = sharded_model(mesh, num_key_value_heads=num_kv_heads)
    model.generate_batch(PROMPTS, max_new_tokens=2)
    expected = {
        "embed_tokens": COLUMNS, "lm_head": COLUMNS, "q_proj": COLUMNS, "k_proj": kv_sharding, "v_proj": kv_sharding,
        "o_proj": ROWS, "gate_proj": COLUMNS, "up_proj": COLUMNS, "down_proj": ROWS,
    }  # fmt: skip
    for name, weight in model.named_parameters():
        sharding = expected.get(name.split(".")[-2], "")
        assert sharding_of(weight) == sharding, name
        rows, columns = (*weight.shape, 1)[:2]
        part = {COLUMNS: (rows // 4, columns), ROWS: (rows, columns // 4), "": tuple(weight.shape)}[sharding]
        assert shapes_on_chips(weight) == [part] * 4
    for pages in engine_of(model).runner._cache.layers:
        assert pages.shape[2] == 2 * 4
        assert shapes_on_chips(pages) == [(*pages.shape[:2], 2, pages.shape[3])] * 4


def test_biases_and_experts_go_with_their_weights(mesh):
    model = sharded_model(mesh, "gpt-oss", num_key_value_heads=4)
    layer = {name.removeprefix("model.layers.0."): sharding_of(p) for name, p in model.named_parameters()}
    assert {layer[f"self_attn.{x}_proj.bias"] for x in "qkv"} == {"{devices=[4]0,1,2,3}"}
    assert layer["self_attn.o_proj.bias"] == layer["self_attn.sinks"] == layer["mlp.router.weight"] == ""
    assert {layer["mlp.experts.gate_up_proj"], layer["mlp.experts.down_proj"]} == {EXPERTS}
    assert {layer["mlp.experts.gate_up_proj_bias"], layer["mlp.experts.down_proj_bias"]} == {COLUMNS}


def test_experts_that_chips_cannot_share_are_cut_themselves(mesh):
    model = sharded_model(mesh, "mixtral", num_local_experts=6, num_experts=6)
    experts = model.model.layers[0].mlp.experts
    assert sharding_of(experts.gate_up_proj) == "{devices=[1,4,1]0,1,2,3}"
    assert sharding_of(experts.down_proj) == "{devices=[1,1,4]0,1,2,3}"


def test_a_vocabulary_that_does_not_divide_stands_on_every_chip(mesh):
    plain, model = make_model(vocab_size=130), sharded_model(mesh, vocab_size=130)
    assert sharding_of(model.lm_head.weight) == sharding_of(model.model.embed_tokens.weight) == ""
    assert tokens(model.generate_batch(PROMPTS, max_new_tokens=6)) == plain_greedy(plain, PROMPTS, 6)


def test_sampled_tokens_and_log_probabilities_equal_one_device(mesh):
    config = GenerationConfig(do_sample=True, top_k=40, top_p=0.9, temperature=1.3, repetition_penalty=1.1)
    with_logprobs = ContinuousBatchingConfig(return_logprobs=True, seed=3)
    results = []
    for model in (hf.patch(make_model(), **SETTINGS), sharded_model(mesh)):
        outputs = model.generate_batch(PROMPTS, config, with_logprobs, max_new_tokens=12).values()
        results.append([(output.generated_tokens, output.logprobs) for output in outputs])
    for (expected, expected_logprobs), (chosen, logprobs) in zip(*results, strict=True):
        assert chosen == expected
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected_logprobs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("xla_step", ["replay", "lazy"])
def test_after_warm_up_nothing_is_compiled_whatever_comes(mesh, xla_step):
    model = sharded_model(mesh, settings={"xla_step": xla_step}, vocab_size=1200)
    model.warmup(progress_bar=False)
    before = bridges.of("xla").compilations()[0]
    undecided = GenerationConfig(do_sample=True, temperature=90.0, top_k=0, top_p=0.999)  # by 1024 candidates
    for config in (None, GenerationConfig(do_sample=True, top_k=5, repetition_penalty=1.1), undecided):
        model.generate_batch(make_prompts(3, 50, 7, 120), config, max_new_tokens=6, min_new_tokens=2, eos_token_id=3)
    assert engine_of(model).stats.compilations_after_warm_up == 0
    assert bridges.of("xla").compilations()[0] == before


def test_generate_and_prefix_caching(mesh):
    system = make_prompts(40)[0]
    prompts = [system + question for question in make_prompts(3, 9, 1, 30, seed=1)]
    expected = plain_greedy(make_model(), prompts, 5)
    model = sharded_model(mesh)
    assert tokens(model.generate_batch(prompts, max_new_tokens=5)) == expected
    assert tokens(model.generate_batch(prompts, max_new_tokens=5)) == expected
    assert engine_of(model).scheduler.stats.prefix_hit_rate > 0.5
    row = model.generate(torch.tensor(prompts[:1]).to("xla"), max_new_tokens=5, do_sample=False)
    assert row[0, len(prompts[0]) :].tolist() == expected[0]


def test_a_managers_thread_steps_on_the_models_own_mesh(mesh):
    expected = plain_greedy(make_model(), PROMPTS, 6)
    with sharded_model(mesh).continuous_batching_context_manager() as manager:
        ids = [manager.add_request(prompt, max_new_tokens=6) for prompt in PROMPTS]
        results = {output.request_id: output for output in (manager.get_result() for _ in ids)}
        assert manager.stats.compilations_after_warm_up == 0
    assert [results[i].generated_tokens for i in ids] == expected


def test_every_model_has_its_own_mesh_and_use_mesh_stays_as_it_was(mesh):
    other = xs.Mesh(np.arange(4), (2, 2), ("data", "tp"))
    expected = plain_greedy(make_model(), PROMPTS, 6)
    first = sharded_model(mesh)
    second = hf.patch(make_model().to("xla"), mesh=other, axis="tp", **SETTINGS)
    torch_rpa.sharding.use_mesh(other, "data")
    try:
        for _ in range(2):
            assert tokens(first.generate_batch(PROMPTS, max_new_tokens=6)) == expected
            assert tokens(second.generate_batch(PROMPTS, max_new_tokens=6)) == expected
        assert torch_rpa.sharding.current() == torch_rpa.sharding.over(other, "data")
    finally:
        torch_rpa.sharding.use_mesh(None)
    shapes = [engine_of(model).runner._cache.layers[0].shape[2] for model in (first, second)]
    assert shapes == [2 * 4, 2 * 2]  # a KV head for each of four chips; the model's two for two chips


def test_a_mesh_in_one_thread_is_not_seen_in_another(mesh):
    heads, seen = torch_rpa.sharding.over(mesh, "model"), []
    with torch_rpa.sharding.using(heads):
        thread = threading.Thread(target=lambda: seen.append(torch_rpa.sharding.current()))
        thread.start()
        thread.join()
        assert torch_rpa.sharding.current() is heads
    assert seen == [None]
    assert torch_rpa.sharding.current() is None


def test_a_step_updates_the_pages_in_place(mesh):
    """Every program of a step is compiled with as many aliased buffers as there are layers, and others with none."""
    before = aliased_buffers()
    model = sharded_model(mesh, hidden_size=128)  # of a size that no other test has compiled
    model.generate_batch(PROMPTS, max_new_tokens=2)
    assert aliased_buffers()[len(before) :].count(2.0) == len(SETTINGS["token_buckets"])


def aliased_buffers() -> list[float]:
    data = metrics.metric_data("InputOutputAliasCount")
    return [count for _, count in data[2]] if data else []


def test_copies_of_a_model_and_models_of_a_class_are_sharded_too(mesh):
    expected = plain_greedy(make_model(), PROMPTS, 4)
    model = sharded_model(mesh)
    twin = copy.deepcopy(model)
    assert tokens(twin.generate_batch(PROMPTS, max_new_tokens=4)) == expected
    assert list(map(sharding_of, twin.parameters())) == list(map(sharding_of, model.parameters()))
    hf.patch(LlamaForCausalLM, mesh=mesh, **SETTINGS)
    try:
        model = make_model().to("xla")
        assert tokens(model.generate_batch(PROMPTS, max_new_tokens=4)) == expected
        assert sharding_of(model.lm_head.weight) == COLUMNS
    finally:
        hf.unpatch(LlamaForCausalLM)
    assert not any(map(sharding_of, model.parameters()))


def test_unpatch_restores_every_weight(mesh):
    plain, model = make_model(), make_model().to("xla")
    before = list(model.parameters())
    hf.patch(model, mesh=mesh, **SETTINGS)
    model.generate_batch(PROMPTS, max_new_tokens=3)
    hf.unpatch(model)
    for former, weight, expected in zip(before, model.parameters(), plain.parameters(), strict=True):
        assert weight is former
        assert not sharding_of(weight)
        assert torch.equal(weight.cpu(), expected)
    hf.patch(model, mesh=xs.Mesh(np.arange(4), (2, 2), ("data", "model")), **SETTINGS)
    assert tokens(model.generate_batch(PROMPTS, max_new_tokens=3)) == plain_greedy(plain, PROMPTS, 3)


def test_patching_again_without_a_mesh_unshards(mesh):
    model = sharded_model(mesh)
    hf.patch(hf.patch(model, mesh=mesh, **SETTINGS), **SETTINGS)
    assert Counter(map(sharding_of, model.parameters())).keys() == {""}


def test_new_weights_stay_on_their_chips(mesh):
    model, others = sharded_model(mesh), [make_model(seed=1), make_model(seed=2)]
    model.generate_batch(PROMPTS, max_new_tokens=2)
    shardings, compiled = list(map(sharding_of, model.parameters())), []
    for other in others:
        model.load_state_dict(other.state_dict())
        assert tokens(model.generate_batch(PROMPTS, max_new_tokens=6)) == plain_greedy(other, PROMPTS, 6)
        assert list(map(sharding_of, model.parameters())) == shardings
        compiled.append(engine_of(model).stats.num_compilations)
    assert compiled[0] == compiled[1]  # no step; the first loading may have compiled what takes weights to their chips


def test_a_model_that_went_to_the_cpu_and_back_is_sharded_again(mesh):
    model = sharded_model(mesh)
    model.generate_batch(PROMPTS, max_new_tokens=2)
    before = list(map(sharding_of, model.parameters()))
    model.to("cpu")
    with pytest.raises(ValueError, match="with mesh= the model must be on the XLA device, not on cpu"):
        model.generate_batch(PROMPTS, max_new_tokens=6)
    model.to("xla")
    expected = plain_greedy(make_model(), PROMPTS, 6)
    assert tokens(model.generate_batch(PROMPTS, max_new_tokens=6)) == expected
    assert list(map(sharding_of, model.parameters())) == before
    hf.unpatch(model.to("cpu"))
    assert plain_greedy(model, PROMPTS, 6) == expected


def test_a_module_put_in_after_the_first_step_is_sharded_too(mesh):
    model, changed = sharded_model(mesh), make_model()
    model.generate_batch(PROMPTS, max_new_tokens=2)
    changed.lm_head = make_model(seed=1).lm_head
    model.lm_head = make_model(seed=1).lm_head.to("xla")
    assert tokens(model.generate_batch(PROMPTS, max_new_tokens=4)) == plain_greedy(changed, PROMPTS, 4)
    assert sharding_of(model.lm_head.weight) == COLUMNS


REFUSED = {
    "query heads": (
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
        "q has 6 heads, which cannot be shared out evenly over the 4 chips of mesh axis 'model'",
    ),
    "KV heads": (
        {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3},
        "num_kv_heads=3 cannot be shared out over the 4 chips of mesh axis 'model'",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_heads_that_the_chips_cannot_share_are_refused_before_anything_is_changed(mesh, changes, message):
    model = make_model(**changes).to("xla")
    attributes = set(vars(model))
    with pytest.raises(ValueError, match=message):
        hf.patch(model, mesh=mesh)
    assert set(vars(model)) == attributes
    assert not any(map(sharding_of, model.parameters()))


def test_a_model_without_a_plan_is_refused_by_name(mesh):
    with pytest.raises(NotImplementedError, match="GPT2LMHeadModel: transformers has no tensor parallel plan"):
        hf.patch(make_model("gpt2").to("xla"), mesh=mesh)


def test_what_patch_cannot_do_with_a_mesh_is_refused(mesh):
    with pytest.raises(ValueError, match="with mesh= the model must be on the XLA device, not on cpu"):
        hf.patch(make_model(), mesh=mesh)
    with pytest.raises(ValueError, match=r"axis must be one of the mesh's axes \('model',\), got 'tp'"):
        hf.patch(make_model().to("xla"), mesh=mesh, axis="tp")
    with pytest.raises(NotImplementedError, match='xla_step="openxla" with a mesh'):
        hf.patch(make_model().to("xla"), mesh=mesh, xla_step="openxla")
    model = make_model().to("xla")
    xs.mark_sharding(model.lm_head.weight, mesh, ("model", None))
    with pytest.raises(ValueError, match=r"lm_head\.weight is sharded already"):
        hf.patch(model, mesh=mesh)
