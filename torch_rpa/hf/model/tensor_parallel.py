"""A transformers model's weights over the chips of a mesh, Megatron-style (https://arxiv.org/abs/1909.08053).

transformers says for each class which weights are cut along their outputs ("colwise") and which along their inputs
("rowwise"): its tensor and expert parallel plans. Here a cut is an annotation, and XLA's partitioner adds what has to
cross chips, so a plan decides how much is held and sent, never what comes out. The least is sent for

    q, k, v, gate, up      [out, in]           outputs over chips; k and v on every chip where chips are more than heads
    o, down                [out, in]           inputs over chips, then one all-reduce
    experts                [experts, ., .]     experts over chips, or each one's columns; then one all-reduce
    embedding, lm_head     [vocabulary, .]     vocabulary over chips, then one all-reduce, one all-gather of the logits

A weight whose dimension the chips cannot share evenly stands on every chip, like norms and other small ones.
"""

import logging

import torch
from transformers import PreTrainedModel

from torch_rpa.hf._transformers import layer_number_to_wildcard
from torch_rpa.hf.model.heads import num_kv_heads_of
from torch_rpa.sharding import HeadSharding, sharding_of

logger = logging.getLogger(__name__)

# Each style's dimension of a weight; all others keep it on every chip.
_DIMS = {
    "colwise": -2, "colwise_gather_output": -2, "colwise_rep": -2, "packed_colwise": -2,
    "rowwise": -1, "rowwise_split_input": -1, "rowwise_rep": -1,
    "embedding_rowwise": 0, "embedding_colwise": 1, "grouped_gemm": 0,
}  # fmt: skip
# For classes whose plan leaves such modules out (GPT-OSS, Granite-MoE, HunYuan, StableLM, OPT).
_COMMON_NAMES = {
    "q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise", "out_proj": "rowwise",
    "gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise", "fc1": "colwise", "fc2": "rowwise",
}  # fmt: skip
_KEY_VALUE_NAMES = ("k_proj", "v_proj")


def sharded_dims(model: PreTrainedModel, heads: HeadSharding) -> dict[str, int]:
    """The dimension that each sharded parameter is cut along, by name; parameters left out stand on every chip.

    Raises:
        ValueError: query or KV heads that the chips cannot share.
        NotImplementedError: the model's attention has no plan.
    """
    config = model.config
    heads.check_q_heads(config.num_attention_heads)
    heads.stored_kv_heads(num_kv_heads_of(config))
    plans = [model.ep_plan or {}, model.tp_plan or {}]  # chips that cannot share experts share each one's columns
    dims = {}
    for name, parameter in model.named_parameters():
        wanted = (_dim(style, parameter) for style in _styles(name, plans))
        even = [dim for dim in wanted if dim is not None and parameter.shape[dim] % heads.num_chips == 0]
        if even and not _splits_kv_heads(name, config, heads):
            dims[name] = even[0]
    if not any("attn" in name or "attention" in name for name in dims):
        raise NotImplementedError(
            f"torch_rpa.hf.patch: {type(model).__name__}: transformers has no tensor parallel plan for its attention, "
            "and its projections have none of the usual names; leave mesh out, or shard its weights with "
            "xs.mark_sharding and call torch_rpa.sharding.use_mesh"
        )
    return dims


def require_shardable(model: PreTrainedModel, heads: HeadSharding, *, is_ours: bool = False) -> None:
    """Raise what `shard` raises, and ValueError for a model that is sharded already; log what each chip will hold.

    is_ours: it is `shard` that has sharded the model, and `unshard` will come first.
    """
    _require_xla(model)
    dims = sharded_dims(model, heads)
    sharded = [name for name, parameter in model.named_parameters() if sharding_of(parameter)]
    if sharded and not is_ours:
        raise ValueError(
            f"torch_rpa.hf.patch: {sharded[0]} is sharded already; leave mesh out and call "
            "torch_rpa.sharding.use_mesh to keep the weights as they are"
        )
    nbytes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    shared = sum(nbytes[name] for name in dims)
    whole = sum(nbytes.values()) - shared
    logger.info("%s share %.2f GiB of weights; %.2f GiB are on each", heads.where, shared / 2**30, whole / 2**30)


def shard(model: PreTrainedModel, heads: HeadSharding) -> None:
    """Spread the model's weights over the chips; what is sharded already stays as it is.

    Raises what `sharded_dims` raises, and ValueError for a model that is not on the XLA device.
    """
    _require_xla(model)
    parameters = dict(model.named_parameters())
    for name, dim in sharded_dims(model, heads).items():
        parameter = parameters[name]
        if not sharding_of(parameter):
            heads.mark_spec(parameter, tuple(heads.axis if i == dim else None for i in range(parameter.dim())))


@torch.no_grad()
def unshard(model: PreTrainedModel) -> None:
    """Undo `shard`: every weight as `model.to("xla")` gave it, the same objects with the same values."""
    for parameter in model.parameters():
        if parameter.device.type == "xla" and sharding_of(parameter):
            # xs.clear_sharding alone leaves the data cut up.
            parameter.data = parameter.data.cpu().to(parameter.device)


def _require_xla(model: PreTrainedModel) -> None:
    if model.device.type != "xla":
        raise ValueError(f"torch_rpa.hf.patch: with mesh= the model must be on the XLA device, not on {model.device}")


def _styles(name: str, plans: list[dict[str, str]]) -> list[str]:
    """What the plans say of a parameter, or of the module it is in; what its module's name says if they say nothing."""
    generic = layer_number_to_wildcard(name)
    module, _, _ = generic.rpartition(".")
    styles = [style for plan in plans if (style := plan.get(generic) or plan.get(module))]
    return styles or [_COMMON_NAMES.get(module.rpartition(".")[2], "replicate")]


def _dim(style: str, parameter: torch.Tensor) -> int | None:
    """The dimension that a style cuts a parameter along; None: none."""
    dim = _DIMS.get(style)
    if parameter.dim() == 1 and dim != 0:  # a bias goes with the outputs; those of "rowwise" are sums, on every chip
        return 0 if dim == -2 else None
    return None if dim is None else dim % parameter.dim()


def _splits_kv_heads(name: str, config, heads: HeadSharding) -> bool:
    is_key_or_value = any(part in _KEY_VALUE_NAMES for part in name.split("."))
    return is_key_or_value and num_kv_heads_of(config) % heads.num_chips != 0
