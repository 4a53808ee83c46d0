"""What of a model decides how it compiles and what memory it takes: read from its config, never from its weights."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch_rpa import workloads
from torch_rpa.extras import from_extra


@dataclass(frozen=True)
class LayerKind:
    """Attention layers that ask for the same, and so share their programs.

    Attributes:
        heads: (num_q_heads, num_kv_heads, head_dim), of all chips together.
        options: of the op, ``sm_scale`` among them.
        writes: whether they have keys and values of their own; otherwise they read another layer's.
    """

    heads: tuple[int, int, int]
    options: tuple[tuple[str, float], ...] = ()
    sinks: bool = False
    writes: bool = True

    @property
    def window(self) -> int | None:
        return dict(self.options).get("sliding_window")


@dataclass(frozen=True)
class ModelFacts:
    """A model without its weights.

    Attributes:
        layers: how many attention layers there are of each kind.
        num_parameters: None where only the heads are known.
        config: its transformers config, or None.
    """

    name: str
    layers: dict[LayerKind, int]
    num_parameters: int | None = None
    config: object = None

    @property
    def num_layers(self) -> int:
        return sum(self.layers.values())

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence it has positions for; None where that is not known."""
        return getattr(self.config, "max_position_embeddings", None)


def of_heads(heads: tuple[int, int, int], num_layers: int) -> ModelFacts:
    """A model of which only the shape of its attention is known."""
    name = f"{'/'.join(map(str, heads))} heads"
    return ModelFacts(name, {LayerKind(heads, (("sm_scale", heads[2] ** -0.5),)): num_layers})


def of_name(name: str) -> ModelFacts:
    """A name in ``workloads.MODELS``, a folder with a config.json, or such a file.

    Raises:
        ValueError: it is none of these, or transformers does not know its model_type.
        NotImplementedError: ``torch_rpa.hf.patch`` would refuse the model.
    """
    model = meta_model(_config(name))
    return ModelFacts(name, _layers(model), sum(p.numel() for p in model.parameters()), model.config)


def meta_model(config):
    """The model of a config on the meta device, in bfloat16; weights take no memory there."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _config(name: str):
    is_named, path = name in workloads.MODELS, Path(name)
    if not (is_named or path.is_file() or (path / "config.json").is_file()):
        names = ", ".join(workloads.MODELS)
        raise ValueError(f"--model must be a folder with a config.json, such a file, or one of {names}; got {name!r}")
    with from_extra("aot", "--model"):
        from transformers import AutoConfig
    return AutoConfig.for_model(**workloads.MODELS[name].config) if is_named else AutoConfig.from_pretrained(path)


def _layers(model) -> dict[LayerKind, int]:
    from torch_rpa.hf._transformers import can_set_experts
    from torch_rpa.hf.model.heads import kv_source_layers
    from torch_rpa.hf.model.layers import attention_calls
    from torch_rpa.hf.patching.support import require_supported_architecture

    require_supported_architecture(model)
    if can_set_experts(model):
        model.set_experts_implementation("batched_mm")  # the default cuts rows by values, which meta tensors have not
    sources = kv_source_layers(model.config)
    calls = enumerate(attention_calls(model))
    return dict(Counter(_kind(call, writes=sources[layer] == layer) for layer, call in calls))


def _kind(call, writes: bool) -> LayerKind:
    options = {"sm_scale": call.scaling, "sliding_window": call.sliding_window, "soft_cap": call.softcap}
    given = tuple((name, value) for name, value in options.items() if value is not None)
    return LayerKind((call.num_q_heads, call.num_kv_heads, call.head_dim), given, call.sinks, writes)
