"""Which models can be patched, and every reason why one cannot."""

from torch_rpa.hf.cache import head_dim_of
from torch_rpa.hf.config import FP8_DTYPES, EngineConfig
from torch_rpa.validation import MAX_HEAD_DIM, is_head_dim

# Decoders whose attention is plain causal (or windowed) grouped-query attention with RoPE in every layer.
SUPPORTED_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# They recompute their frequencies from the longest position in the batch: a sequence's result would depend on
# its company, and one of them reads the position back to the host.
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


def not_supported_reasons(model, config: EngineConfig) -> list[str]:
    """All reasons why `model` cannot run with `config`; empty if it can."""
    if not _is_supported_class(type(model)):
        return [
            f"this class is not supported; supported are {', '.join(SUPPORTED_CLASSES)} (SmolLM and SmolLM2 are Llama)"
        ]
    return [*_config_reasons(model.config), *_dtype_reasons(model, config), *_device_reasons(model)]


def _is_supported_class(model_class: type) -> bool:
    return any(
        base.__name__ in SUPPORTED_CLASSES and base.__module__.startswith("transformers.models.")
        for base in model_class.__mro__
    )


def _config_reasons(config) -> list[str]:
    reasons = []
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type in BATCH_DEPENDENT_ROPE:
        reasons.append(f"{rope_type=} scales with the longest sequence of the batch")
    if not getattr(config, "is_causal", True):
        reasons.append("config.is_causal is False; only causal attention is supported")
    if config.output_attentions:
        reasons.append("config.output_attentions is True, but the probabilities are never materialised")
    head_dim = head_dim_of(config)
    if not is_head_dim(head_dim):
        reasons.append(f"{head_dim=} is not a multiple of 8 up to {MAX_HEAD_DIM}")
    return reasons


def _dtype_reasons(model, config: EngineConfig) -> list[str]:
    reasons = []
    if config.kv_dtype not in (None, model.dtype, *FP8_DTYPES):
        reasons.append(
            f"kv_dtype={config.kv_dtype} with a {model.dtype} model; use None (the model's dtype), "
            "torch.float8_e4m3fn or torch.float8_e5m2"
        )
    return reasons


def _device_reasons(model) -> list[str]:
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        return [f"its parameters are on several devices ({', '.join(devices)}); one is needed"]
    if model.device.type == "meta":
        return ["it is on the meta device, it has no weights"]
    return []
