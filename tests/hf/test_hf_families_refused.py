"""What cannot work is refused at patch: by name, with every reason, and nothing is changed."""

import pytest
from tiny_models import VOCAB_SIZE, Family, make_model
from transformers import BatchEncoding

from torch_rpa import hf

_LATENT_HEADS = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8}
_LATENT_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_GEMMA4 = {"num_hidden_layers": 6, "vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
_NO_HEAD = "it has no language model head that generates"
_NO_INTERFACE = "its attention does not go through transformers' AttentionInterface"

REFUSED = [
    ("BertForMaskedLM", {}, [_NO_HEAD]),
    ("LlamaModel", {}, [_NO_HEAD]),
    ("LlamaForSequenceClassification", {}, [_NO_HEAD]),
    ("FalconForCausalLM", {"multi_query": True}, [_NO_INTERFACE]),
    ("FalconForCausalLM", {"alibi": True}, [_NO_INTERFACE, "alibi=True: a bias on the scores"]),
    ("BloomForCausalLM", {}, [_NO_INTERFACE]),
    ("T5ForConditionalGeneration", _T5, ["cross attention"]),
    ("GPT2LMHeadModel", {"add_cross_attention": True}, ["cross attention"]),
    ("DeepseekV3ForCausalLM", {**_LATENT_HEADS, **_LATENT_EXPERTS}, ["v_head_dim=8 is not.*qk_head_dim=16"]),
    ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, ["a custom mask: its tokens see later ones"]),
    ("Gemma4ForCausalLM", {**_GEMMA4, "global_head_dim": 32}, ["its layers differ in head_dim"]),
    ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}, ["layers of type conv"]),
    ("MambaForCausalLM", {"state_size": 4}, ["layers of type linear_attention"]),
    ("Llama4ForCausalLM", {}, ["layers of type chunked_attention"]),
    ("NemotronForCausalLM", {}, ["this class has not been compared with transformers' own attention"]),
    ("Gemma3ForCausalLM", {"head_dim": 264}, ["head_dim=264 is not a multiple of 8 up to 256"]),
]


@pytest.mark.parametrize(("model_class", "changes", "reasons"), REFUSED)
def test_what_cannot_work_is_refused_by_name_with_every_reason(model_class, changes, reasons):
    family = Family("", model_class, changes)
    model = family.model_type(family.config())
    attributes, implementation = set(vars(model)), model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=f"torch_rpa.hf.patch: {model_class}: {'.*'.join(reasons)}"):
        hf.patch(model)
    assert set(vars(model)) == attributes
    assert model.config._attn_implementation == implementation


def test_rope_that_depends_on_the_batch_is_refused_in_any_layer_type():
    rope = {"rope_type": "default", "rope_theta": 1e4}
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = make_model("gemma3", rope_parameters={"sliding_attention": rope, "full_attention": dynamic})
    with pytest.raises(NotImplementedError, match=r"rope_type='dynamic' scales with the longest sequence"):
        hf.patch(model)


def test_phi3_with_long_rope_is_refused():
    factors = [1.0] * 8
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    model = make_model("phi3", rope_parameters={**rope, "original_max_position_embeddings": 64})
    with pytest.raises(NotImplementedError, match=r"Phi3ForCausalLM: rope_type='longrope'"):
        hf.patch(model)


def test_weights_that_are_elsewhere_are_refused():
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM: it is on the meta device, it has no weights"):
        hf.patch(make_model().to("meta"))
    model = make_model("mixtral")
    model.lm_head.to("meta")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(NotImplementedError, match=r"several devices \(cpu, meta\).*experts are spread over several"):
        hf.patch(model)


@pytest.mark.parametrize("name", ["NemotronForCausalLM", "FalconForCausalLM", "LlamaModel", "PreTrainedModel"])
def test_a_class_is_refused_as_its_models_are(name):
    import transformers

    with pytest.raises(NotImplementedError, match=rf"{name}: .*; the table of models in .* lists") as error:
        hf.patch(getattr(transformers, name))
    assert "MistralForCausalLM" not in str(error.value), "no names of other classes"


@pytest.mark.parametrize(
    ("what", "got"),
    [
        ("LlamaForCausalLM", "a str"),
        (dict, "the class dict"),
        (None, "a NoneType"),
        (BatchEncoding(), "a BatchEncoding"),
    ],
)
def test_what_is_no_model_is_a_type_error_that_says_its_type_only(what, got):
    with pytest.raises(TypeError, match=f"model must be a transformers model or a class of them, got {got}$"):
        hf.patch(what)
