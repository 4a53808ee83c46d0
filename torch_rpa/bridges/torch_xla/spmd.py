"""Parts of tensors on chips, and whole tensors of parts: what ``torch_rpa.sharding`` asks of torch_xla."""

import torch
from torch_xla.distributed.spmd import ShardingType

from torch_rpa.bridges.torch_xla import device
from torch_rpa.bridges.torch_xla.names import xla


def sharding_of(tensor: torch.Tensor) -> str:
    """As ``torch_rpa.sharding.sharding_of``."""
    return xla.sharding_of(tensor).replace("{replicated}", "")


def mark(tensor: torch.Tensor, mesh, spec: tuple) -> None:
    """Shard a tensor's data: for each dimension the mesh's axis, or None."""
    device.memory().mark(tensor, mesh.get_op_sharding(spec))


def annotated(tensor: torch.Tensor, mesh, spec: tuple) -> torch.Tensor:
    """The same values, from here on sharded so in the graph; the caller's tensor is not annotated."""
    tensor = tensor.view(tensor.shape)
    xla.annotate_sharding(tensor, mesh.get_op_sharding(spec))
    return tensor


def part(tensor: torch.Tensor) -> torch.Tensor:
    """Every chip's own part of a sharded tensor, to be worked on chip by chip."""
    return xla.full_to_shard(tensor)


def to_part(tensor: torch.Tensor, mesh, spec: tuple) -> torch.Tensor:
    """Every chip's own part of any tensor."""
    return part(annotated(tensor, mesh, spec))


def to_whole(part: torch.Tensor, mesh, spec: tuple, shape: torch.Size) -> torch.Tensor:
    """The tensor of ``shape`` of which every chip has its own part."""
    xla.mark_manual(part, xla.OpSharding([], [], [], int(ShardingType.MANUAL)))
    return xla.shard_to_full(part, mesh.get_op_sharding(spec), shape, part.dtype)
