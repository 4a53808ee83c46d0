"""What patch changes and refuses, and that unpatch leaves nothing behind."""

import copy
import inspect
import pickle
import subprocess
import sys
import threading
import time
from pprint import pformat

import pytest
import torch
from tiny_models import FAMILIES, make_config, make_model, make_prompts, plain_greedy, tokens
from transformers import LlamaForCausalLM, MistralForCausalLM

from torch_rpa import hf
from torch_rpa.hf.api.gate import engine_of


def test_unpatch_restores_the_model():
    model, prompts = make_model(attn_implementation="eager"), make_prompts(5, 9)
    attributes, logits = set(vars(model)), model(torch.tensor(prompts[:1])).logits
    assert hf.patch(model) is model
    model.generate_batch(prompts, max_new_tokens=3)
    assert hf.unpatch(model) is model
    assert set(vars(model)) == attributes
    assert not model._forward_pre_hooks
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"eager"}
    assert torch.equal(model(torch.tensor(prompts[:1])).logits, logits)


def test_unpatch_puts_back_the_very_same_configs_and_methods():
    model = make_model()
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    model.generate_batch = own = lambda: "the user's"
    hf.unpatch(hf.patch(model))
    after = [module.config for module in model.modules() if hasattr(module, "config")]
    assert all(a is b for a, b in zip(after, configs, strict=True))
    assert model.generate_batch is own


def test_a_patch_that_fails_half_way_changes_nothing(monkeypatch):
    model = make_model()
    config, attributes = model.config, set(vars(model))

    def fail(name):
        raise RuntimeError("no")

    monkeypatch.setattr(model, "set_attn_implementation", fail)
    with pytest.raises(RuntimeError, match="no"):
        hf.patch(model)
    assert model.config is config
    assert set(vars(model)) == attributes | {"set_attn_implementation"}


def test_a_patched_model_can_be_pickled():
    model, prompts = make_model(), make_prompts(5, 9)
    hf.patch(model)
    expected = tokens(model.generate_batch(prompts, max_new_tokens=3))
    loaded = pickle.loads(pickle.dumps(model))
    assert tokens(loaded.generate_batch(prompts, max_new_tokens=3)) == expected


def test_pickled_patched_models_run_in_another_process(tmp_path):
    models, prompts = [hf.patch(make_model(family)) for family in ("mixtral", "stablelm")], make_prompts(5, 9)
    expected = [tokens(model.generate_batch(prompts, max_new_tokens=3)) for model in models]
    (tmp_path / "models").write_bytes(pickle.dumps(models))
    code = f"""
import pickle, sys
with open(sys.argv[1], "rb") as file:
    models = pickle.load(file)
outputs = [model.generate_batch({prompts}, max_new_tokens=3).values() for model in models]
print([[output.generated_tokens for output in of_one] for of_one in outputs])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "models")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == f"{expected}\n"


def test_another_attention_put_on_a_patched_model_is_an_error():
    model = hf.patch(make_model())
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="its attention is 'eager' now"):
        model.generate_batch(make_prompts(3), max_new_tokens=2)


def test_unpatch_waits_for_a_running_call():
    model, prompts = make_model(), make_prompts(5, 9)
    expected = plain_greedy(model, prompts, 30)
    hf.patch(model)
    results = []
    call = threading.Thread(target=lambda: results.append(tokens(model.generate_batch(prompts, max_new_tokens=30))))
    call.start()
    while engine_of(model).num_steps < 3:
        time.sleep(0.001)
    hf.unpatch(model)
    call.join()
    assert results == [expected]


def test_model_may_change_its_dtype_between_calls():
    model, prompts = hf.patch(make_model()), make_prompts(5, 9)
    model.generate_batch(prompts, max_new_tokens=2)
    model.bfloat16()
    assert [len(answer) for answer in tokens(model.generate_batch(prompts, max_new_tokens=2))] == [2, 2]


def test_generate_batch_shows_its_own_signature():
    model = hf.patch(make_model())
    assert list(inspect.signature(model.generate_batch).parameters)[:2] == ["inputs", "generation_config"]
    assert "Answer all prompts" in model.generate_batch.__doc__


def test_unpatch_of_a_plain_model_changes_nothing():
    model = make_model()
    assert hf.unpatch(model) is model
    assert model.config._attn_implementation == make_model().config._attn_implementation


def test_patching_again_replaces_the_settings():
    model, prompts = make_model(), make_prompts(5, 20)
    expected = plain_greedy(model, prompts, 4)
    former = model.config._attn_implementation
    hf.patch(model, page_size=8, num_pages=20)
    model.generate_batch(prompts, max_new_tokens=4)
    hf.patch(model, page_size=32, num_pages=5, token_buckets=(8, 16))
    assert engine_of(model).allocator.num_pages == 5
    assert tokens(model.generate_batch(prompts, max_new_tokens=4)) == expected
    hf.unpatch(model)
    assert model.config._attn_implementation == former
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt-oss", "stablelm", "gemma3n", "gpt2"])
def test_unpatch_restores_every_module_of_every_kind_of_model(family):
    def state(model):
        return [
            {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")}
            for module in model.modules()
        ]

    model, prompts = make_model(family), make_prompts(5, 9)
    before = copy.deepcopy(state(model))
    configs = [id(module.config) for module in model.modules() if hasattr(module, "config")]
    for _ in range(2):  # patched twice, unpatched once
        hf.patch(model, page_size=8)
        model.generate_batch(prompts, max_new_tokens=3)
    hf.unpatch(model)
    # pformat sorts the sets that it breaks into lines, here all
    assert pformat(state(model), width=1) == pformat(before, width=1)
    assert [id(module.config) for module in model.modules() if hasattr(module, "config")] == configs


# ---- A class ------------------------------------------------------------------------------------------------------


@pytest.fixture
def patched_class():
    yield hf.patch(MistralForCausalLM, page_size=8, max_num_seqs=2, token_buckets=(16,))
    hf.unpatch(MistralForCausalLM)


def test_models_of_a_patched_class_are_patched_at_their_first_use(request):
    before, prompts = make_model("mistral-window"), make_prompts(5, 20)
    expected = plain_greedy(before, prompts, 4)
    request.getfixturevalue("patched_class")
    model = make_model("mistral-window")
    assert model.config._attn_implementation != "torch_rpa"
    assert tokens(model.generate_batch(prompts, max_new_tokens=4)) == expected
    assert engine_of(model).config.page_size == 8
    assert tokens(before.generate_batch(prompts, max_new_tokens=4)) == expected


def test_a_patched_class_leaves_others_alone(patched_class):
    other = make_model()
    assert "generate_batch" not in vars(LlamaForCausalLM)
    assert other.generate_batch.__func__ is LlamaForCausalLM.generate_batch
    assert LlamaForCausalLM.generate_batch is not MistralForCausalLM.generate_batch


def test_unpatch_of_a_class_takes_its_models_with_it():
    attributes = dict(vars(MistralForCausalLM))
    assert hf.patch(hf.patch(MistralForCausalLM), page_size=32) is MistralForCausalLM
    used, own = make_model("mistral-window"), hf.patch(make_model("mistral-window"))
    used.generate_batch(make_prompts(3), max_new_tokens=2)
    assert engine_of(used).config.page_size == 32
    assert hf.unpatch(MistralForCausalLM) is MistralForCausalLM
    assert dict(vars(MistralForCausalLM)) == attributes
    assert used.config._attn_implementation != "torch_rpa"
    assert "generate_batch" not in vars(used)
    assert own.config._attn_implementation == "torch_rpa"


def test_a_models_own_settings_go_before_its_classes(patched_class):
    model = hf.patch(make_model("mistral-window"), page_size=64)
    model.generate_batch(make_prompts(3), max_new_tokens=2)
    assert engine_of(model).config.page_size == 64


def test_a_config_that_a_class_cannot_know_is_refused_at_the_first_use(patched_class):
    model = make_model("mistral-window", head_dim=12)
    with pytest.raises(NotImplementedError, match="MistralForCausalLM: head_dim=12"):
        model.generate_batch(make_prompts(3), max_new_tokens=2)


@pytest.mark.parametrize("what", [MistralForCausalLM, None])
def test_a_bad_setting_is_refused_for_a_class_too(what):
    with pytest.raises(ValueError, match="page_size=12"):
        hf.patch(what or make_model(), page_size=12)
    with pytest.raises(TypeError, match="pages_size"):
        hf.patch(what or make_model(), pages_size=16)
    assert "generate_batch" not in vars(MistralForCausalLM)


def test_two_patched_models_and_a_plain_one_side_by_side():
    """All three share one config object, as models built from it directly do."""
    config, prompts = make_config(), make_prompts(5, 12)
    torch.manual_seed(0)
    first, second, plain = (LlamaForCausalLM(config).eval() for _ in range(3))
    expected = [plain_greedy(model, prompts, 4) for model in (first, second, plain)]
    hf.patch(first, max_num_seqs=2, token_buckets=(8,))
    hf.patch(second)
    assert tokens(first.generate_batch(prompts, max_new_tokens=4)) == expected[0]
    assert tokens(second.generate_batch(prompts, max_new_tokens=4)) == expected[1]
    hf.unpatch(first)
    assert tokens(second.generate_batch(prompts, max_new_tokens=4)) == expected[1]
    assert plain_greedy(first, prompts, 4) == expected[0]
    assert plain_greedy(plain, prompts, 4) == expected[2]


def test_deep_copy_of_a_patched_model_stands_alone():
    model, prompts = make_model(), make_prompts(5, 12)
    expected = plain_greedy(model, prompts, 4)
    hf.patch(model)
    model.generate_batch(prompts, max_new_tokens=4)
    clone = copy.deepcopy(model)
    hf.unpatch(model)
    assert tokens(clone.generate_batch(prompts, max_new_tokens=4)) == expected
    assert engine_of(clone).runner.model is clone
    assert plain_greedy(hf.unpatch(clone), prompts, 4) == expected


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_saved_config_does_not_mention_the_patch(family, tmp_path):
    hf.patch(make_model(family)).save_pretrained(tmp_path)
    assert "torch_rpa" not in (tmp_path / "config.json").read_text()
    loaded = FAMILIES[family].model_type.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation != "torch_rpa"


def test_default_pool_is_logged(caplog):
    caplog.set_level("INFO", logger="torch_rpa.hf.engine.pool")
    engine = engine_of(hf.patch(make_model(), page_size=16, max_num_seqs=3, token_buckets=(8,)))
    assert engine.allocator.num_pages == 3 * 256 // 16
    assert "chose 48 pages of 16 tokens, 3 sequences of 256 tokens" in caplog.text


def call_with_batch(model, **kwargs):
    """One hand-made step over three tokens of one sequence."""
    from torch_rpa.hf.model.attention import RaggedBatch
    from torch_rpa.hf.model.cache import PagedKVCache

    cache = PagedKVCache(model, 4, 16, model.dtype)
    batch = RaggedBatch(
        cache=cache,
        kv_lens=torch.tensor([3], dtype=torch.int32),
        page_indices=torch.tensor([[0]], dtype=torch.int32),
        cu_q_lens=torch.tensor([0, 3], dtype=torch.int32),
        num_seqs=torch.tensor([1], dtype=torch.int32),
    )
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3]]), use_cache=False, rpa_batch=batch, **kwargs)


def test_a_step_by_hand_gives_the_plain_logits():
    model = make_model(attn_implementation="eager")
    expected = model(torch.tensor([[1, 2, 3]])).logits
    torch.testing.assert_close(call_with_batch(hf.patch(model)).logits, expected)


@pytest.mark.parametrize("which", ["model", "the model inside"])
def test_call_without_batch_metadata_is_an_error(which):
    model = hf.patch(make_model())
    call = model if which == "model" else model.model
    with pytest.raises(RuntimeError, match=r"use model\.generate_batch.*unpatch"):
        call(torch.tensor([[1, 2, 3]]))


LEFT_PADDING = torch.tensor([[0, 1, 1]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", LEFT_PADDING),
        ("attention_mask", torch.zeros(1, 1, 3, 3)),
        ("attention_mask", {"full_attention": torch.zeros(1, 1, 3, 3)}),
        ("output_attentions", True),
        ("labels", torch.tensor([[1, 2, 3]])),
        ("encoder_hidden_states", torch.zeros(1, 3, 64)),
        ("is_causal", False),
        ("head_mask", torch.ones(4)),
        ("a_keyword_of_some_other_attention", 1),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_what_the_op_cannot_honour_is_refused_not_ignored(family, name, value):
    with pytest.raises(NotImplementedError, match=name):
        call_with_batch(hf.patch(make_model(family)), **{name: value})


def test_the_model_inside_refuses_a_mask_too():
    model = hf.patch(make_model())
    with pytest.raises(NotImplementedError, match="attention_mask"):
        model.model(torch.tensor([[1, 2, 3]]), attention_mask=LEFT_PADDING, rpa_batch=object())


def test_what_does_not_concern_the_attention_is_taken():
    outputs = call_with_batch(hf.patch(make_model("mixtral")), output_hidden_states=True, output_router_logits=True)
    assert len(outputs.hidden_states) == 3
    assert len(outputs.router_logits) == 2


def test_attention_refuses_dropout_and_several_rows():
    from torch_rpa.hf.model.attention import paged_attention

    q, kv = torch.zeros(2, 4, 3, 16), torch.zeros(2, 2, 5, 16)
    with pytest.raises(NotImplementedError, match=r"not 2 rows; 5 keys for 3 queries.*; dropout=0\.5 is for training"):
        paged_attention(torch.nn.Module(), q, kv, kv, None, 1.0, dropout=0.5, rpa_batch=object())


def test_all_reasons_are_listed_at_once():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = make_model(attn_implementation="eager", rope_parameters=rope, output_attentions=True, head_dim=12)
    with pytest.raises(NotImplementedError) as error:
        hf.patch(model, kv_dtype=torch.bfloat16)
    for part in ("rope_type='dynamic'", "output_attentions", "head_dim=12", "kv_dtype=torch.bfloat16"):
        assert part in str(error.value)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_size": 12}, "page_size=12 must be a power of two from 8 to 256"),
        ({"page_size": 4}, "page_size=4 must be"),
        ({"num_pages": 0}, "num_pages=0 must be None or a positive integer"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be a positive integer"),
        ({"max_seq_len": 0}, "max_seq_len=0 must be None or a positive integer"),
        ({"token_buckets": ()}, r"token_buckets=\(\) must be None or a tuple of positive integers"),
        ({"token_buckets": (8, 8)}, r"token_buckets=\(8, 8\) must rise"),
        ({"token_buckets": (4,)}, "must be at least max_num_seqs=8"),
        ({"kv_dtype": "fp8"}, "kv_dtype='fp8' must be None or a torch.dtype"),
        ({"page_size": 7, "max_num_seqs": -1}, "page_size=7.*max_num_seqs=-1"),
    ],
)
def test_bad_setting_is_named_with_its_value_and_what_was_expected(settings, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        hf.patch(model, **settings)
    assert not hasattr(model, "_torch_rpa")


def test_int8_cache_is_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match="int8 needs a k_scale and a v_scale"):
        hf.patch(make_model(), kv_dtype=torch.int8)


def test_a_mesh_without_spmd_is_refused(xla):
    with pytest.raises(RuntimeError, match=r"a mesh needs SPMD: call torch_xla\.runtime\.use_spmd\(\) first"):
        hf.patch(make_model().to(xla), mesh=object())
