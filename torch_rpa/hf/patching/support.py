"""Which models can be patched, and every reason why one cannot."""

from transformers import PreTrainedModel

from torch_rpa.hf._transformers import can_set_attention, differing_attributes
from torch_rpa.hf.engine.config import FP8_DTYPES, EngineConfig
from torch_rpa.hf.model.heads import head_dim_of
from torch_rpa.validation import MAX_HEAD_DIM, is_head_dim

# Each writes what its eager attention writes: a test compares them (tests/hf/test_hf_families.py), and the README lists
# them. A class that is not here may do something in its attention that the op does not see.
SUPPORTED_CLASSES = (
    "ArceeForCausalLM",
    "Cohere2ForCausalLM",
    "CohereForCausalLM",
    "Ernie4_5ForCausalLM",
    "Exaone4ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3nForCausalLM",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "GlmForCausalLM",
    "GPT2LMHeadModel",
    "GPTBigCodeForCausalLM",
    "GPTNeoXForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeForCausalLM",
    "HeliumForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "LlamaForCausalLM",
    "MinistralForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "OlmoeForCausalLM",
    "OlmoForCausalLM",
    "OPTForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
)
# They recompute their frequencies from the longest position in the batch: a sequence's result would depend on
# its company, and one of them reads the position back to the host.
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
PAGED_LAYER_TYPES = ("full_attention", "sliding_attention")


def require_supported_model(model: PreTrainedModel, config: EngineConfig) -> None:
    """Raise NotImplementedError, with every reason, for a model that cannot run with `config`."""
    _refuse(type(model), [*_model_reasons(model), *_dtype_reasons(model, config), *_weight_reasons(model)])


def require_supported_architecture(model: PreTrainedModel) -> None:
    """Raise NotImplementedError, with every reason, for a model that cannot run whatever its weights and settings."""
    _refuse(type(model), _model_reasons(model))


def require_supported_class(model_class: type[PreTrainedModel]) -> None:
    """Raise NotImplementedError for a class that is not supported, with what can be said without a config."""
    _refuse(model_class, _class_reasons(model_class))


def _refuse(model_class: type, reasons: list[str]) -> None:
    if not _is_supported_class(model_class):
        reasons = reasons or ["this class has not been compared with transformers' own attention"]
        reasons = [*reasons, f"supported are {', '.join(SUPPORTED_CLASSES)}"]
    if reasons:
        raise NotImplementedError(f"torch_rpa.hf.patch: {model_class.__name__}: {'; '.join(reasons)}")


def _model_reasons(model: PreTrainedModel) -> list[str]:
    of_heads = _head_dim_reasons(model.config) if _is_supported_class(type(model)) else []
    return [*_class_reasons(type(model)), *_config_reasons(model.config), *of_heads]


def _class_reasons(model_class: type[PreTrainedModel]) -> list[str]:
    reasons = []
    if _is_supported_class(model_class):
        return reasons
    if not model_class.can_generate():
        reasons.append("it has no language model head that generates: it is an encoder, a base model or a classifier")
    if not can_set_attention(model_class):
        reasons.append("its attention does not go through transformers' AttentionInterface")
    return reasons


def _is_supported_class(model_class: type) -> bool:
    return any(
        base.__name__ in SUPPORTED_CLASSES and base.__module__.startswith("transformers.models.")
        for base in model_class.__mro__
    )


def _config_reasons(config) -> list[str]:
    """What the op cannot compute, whichever class asks for it."""
    if differing := differing_attributes(config):
        return [f"its layers differ in {', '.join(differing)}; their pages must be alike"]
    return [*_attention_reasons(config), *_position_reasons(config)]


def _attention_reasons(config) -> list[str]:
    reasons = []
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        reasons.append("cross attention: its keys belong to another sequence, which pages of this one do not hold")
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        reasons.append("a custom mask: its tokens see later ones, and only causal attention is supported")
    if config.output_attentions:
        reasons.append("config.output_attentions is True, but the probabilities are never materialised")
    v_head_dim, qk_head_dim = getattr(config, "v_head_dim", None), getattr(config, "qk_head_dim", None)
    if v_head_dim != qk_head_dim:
        reasons.append(f"{v_head_dim=} is not the head size of queries and keys, {qk_head_dim=}")
    other_types = sorted(set(getattr(config, "layer_types", None) or ()).difference(PAGED_LAYER_TYPES))
    if other_types:
        reasons.append(f"layers of type {', '.join(other_types)}; only {' and '.join(PAGED_LAYER_TYPES)} have pages")
    return reasons


def _position_reasons(config) -> list[str]:
    reasons = []
    if getattr(config, "alibi", False):
        reasons.append("alibi=True: a bias on the scores, which the op does not add")
    for rope_type in sorted(_rope_types(getattr(config, "rope_parameters", None) or {})):
        if any(kind in rope_type for kind in BATCH_DEPENDENT_ROPE):
            reasons.append(f"{rope_type=} scales with the longest sequence of the batch")
    return reasons


def _head_dim_reasons(config) -> list[str]:
    if differing_attributes(config):
        return []
    head_dim = head_dim_of(config)
    return [] if is_head_dim(head_dim) else [f"{head_dim=} is not a multiple of 8 up to {MAX_HEAD_DIM}"]


def _rope_types(rope_parameters: dict) -> set[str]:
    """The kinds of RoPE in a config: one for the model, or one for each layer type (Gemma3)."""
    of_layer_types = [value for value in rope_parameters.values() if isinstance(value, dict)]
    return {parameters.get("rope_type", "default") for parameters in of_layer_types or [rope_parameters]}


def _dtype_reasons(model: PreTrainedModel, config: EngineConfig) -> list[str]:
    reasons = []
    if config.kv_dtype not in (None, model.dtype, *FP8_DTYPES):
        reasons.append(
            f"kv_dtype={config.kv_dtype} with a {model.dtype} model; use None (the model's dtype), "
            "torch.float8_e4m3fn or torch.float8_e5m2"
        )
    return reasons


def _weight_reasons(model: PreTrainedModel) -> list[str]:
    reasons = []
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        reasons.append(f"its parameters are on several devices ({', '.join(devices)}); one is needed")
    elif model.device.type == "meta":
        reasons.append("it is on the meta device, it has no weights")
    if any(getattr(module, "_is_expert_parallel", False) for module in model.modules()):
        reasons.append("its experts are spread over several processes")
    return reasons
