"""``torch_rpa.bridges``' interface for PyTorch/XLA."""

from collections.abc import Callable

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as metrics
import torch_xla.runtime as xr

from torch_rpa import sharding
from torch_rpa.bridges.interface import Bridge, Programs
from torch_rpa.bridges.torch_xla import device as devices
from torch_rpa.bridges.torch_xla import lowering
from torch_rpa.bridges.torch_xla.names import xla

_RESULTS = {
    "ragged_paged_attention": ("out",),
    "ragged_paged_attention_with_lse": ("out", "lse"),
    "ragged_paged_attention_update": ("out", "kv_pages"),
}


class TorchXla(Bridge):
    """A call adds to the lazy graph, and gives lazy tensors."""

    def call(self, op: str, args: dict[str, torch.Tensor], options: dict) -> list[torch.Tensor]:
        heads = sharding.for_call(args["q"]) if xr.is_spmd() else None
        if heads is None:
            return lowering.call(op, args, options)
        shapes = {"out": args["q"].shape, "lse": args["q"].shape[:2], "kv_pages": args["kv_pages"].shape}
        parts = lowering.call(op, heads.shards(args), options)
        return [heads.whole(name, part, shapes[name]) for name, part in zip(_RESULTS[op], parts, strict=True)]

    def device_kind(self) -> str:
        return devices.target().platform

    def chip_name(self) -> str | None:
        return devices.target().chip

    def free_memory_bytes(self, device: torch.device) -> int | None:
        try:
            info = xm.get_memory_info(device)
        except RuntimeError:  # PJRT does not tell for the CPU
            return None
        return info["bytes_limit"] - info["bytes_used"]

    def head_sharding(self) -> sharding.HeadSharding | None:
        return sharding.current()

    def zeros_pages(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        memory, heads = devices.memory(), sharding.current()
        pages = memory.zeros(shape, dtype, device)
        if heads is not None:
            heads.mark("kv_pages", pages)
        memory.finish(pages)
        return pages

    def prepare_update(self, kv_pages: torch.Tensor, *, is_traced: bool) -> tuple[Callable, torch.Tensor]:
        # Lazy mode aliases what copy_ overwrites; torch.compile(backend="openxla") only what is marked for it.
        if is_traced:
            kv_pages = torch.ops.xla.dynamo_set_buffer_donor_(kv_pages, True)
        return torch.ops.rpa.ragged_paged_attention_update.default, kv_pages

    def upload(self, data: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
        if isinstance(data, np.ndarray):
            data = torch.from_numpy(data)
        # `data.to(device)` would wait for the next program that any thread of the process runs.
        (tensor,) = xm.send_cpu_data_to_device(data, _indexed(device))
        return tensor

    def run_pending(self, tensors: list[torch.Tensor], programs: Programs | None = None) -> None:
        if programs is not None:
            programs.add(xla.graph_hash(tensors))
        devices.run_pending(tensors)

    def compilations(self) -> tuple[int, float]:
        compile_time = metrics.metric_data("CompileTime")  # (samples, nanoseconds, ...), None before the first
        return metrics.counter_value("UncachedCompile") or 0, compile_time[1] / 1e9 if compile_time else 0.0


def _indexed(device: torch.device) -> torch.device:
    device = torch.device(device)
    return torch_xla.device() if device.index is None else device


BRIDGE = TorchXla()
