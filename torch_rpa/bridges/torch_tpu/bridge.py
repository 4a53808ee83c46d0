"""``torch_rpa.bridges``' interface for TorchTPU."""

from collections.abc import Callable

import numpy as np
import torch

from torch_rpa.bridges.interface import Bridge, Programs
from torch_rpa.bridges.torch_tpu import lowering
from torch_rpa.bridges.torch_tpu.names import tpu


class TorchTpu(Bridge):
    """A call runs at once, or is traced by torch.compile."""

    def call(self, op: str, args: dict[str, torch.Tensor], options: dict) -> list[torch.Tensor]:
        return lowering.call(op, args, options)

    def call_donating_pages(self, args: dict[str, torch.Tensor], options: dict) -> list[torch.Tensor]:
        """``ragged_paged_attention_update`` whose new pages take the buffer of ``kv_pages``, and with it that of every
        tensor that shares it."""
        return lowering.call("ragged_paged_attention_update", args, options, donated="kv_pages")

    def prepare_update(self, kv_pages: torch.Tensor, *, is_traced: bool) -> tuple[Callable, torch.Tensor]:
        if not is_traced:
            _own_buffer_(kv_pages)
        return torch.ops.rpa._ragged_paged_attention_update_donating.default, kv_pages

    def device_kind(self) -> str:
        return lowering.target().platform

    def chip_name(self) -> str | None:
        return lowering.target().chip

    def free_memory_bytes(self, device: torch.device) -> int | None:
        free, total = torch.accelerator.get_memory_info(device)
        return free if total else None

    def head_sharding(self) -> None:
        return None  # several chips are one process each

    def zeros_pages(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def upload(self, data: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
        return torch.as_tensor(data).to(device)

    def run_pending(self, tensors: list[torch.Tensor], programs: Programs | None = None) -> None:
        tpu.run_pending(tensors)

    def compilations(self) -> tuple[int, float]:
        stats = tpu.cache_stats()
        return stats.num_compilations, sum(e.compilation_duration.total_seconds() for e in stats.per_entry_stats)


def _own_buffer_(tensor: torch.Tensor) -> None:
    """Give a tensor a buffer that it shares with none, if it does.

    ``clone()`` and ``copy_`` share the buffer of what they copy, and a program that takes it takes it from both. An
    in-place op of TorchTPU's copies a shared buffer and keeps one that is not; this one writes nothing.
    """
    nothing = torch.empty(0, dtype=torch.int64, device=tensor.device)
    tensor.index_fill_(0, nothing, 0)


BRIDGE = TorchTpu()
