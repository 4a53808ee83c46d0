"""Linear layers in the form that XLA's CPU compiler is fast at."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch_xla.core.xla_model as xm
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from torch_rpa import bridge


def for_device() -> AbstractContextManager:
    """Inside it linear layers on XLA tensors are traced in the form that suits what stands behind the XLA device."""
    return _WeightFirst() if bridge.device_kind() == "cpu" else nullcontext()


class _WeightFirst(TorchFunctionMode):
    """``x @ W^T`` as ``(W @ x^T)^T``: XLA's matrix products on CPUs rearrange the second operand, which would be all of
    W at every step. A decode step of SmolLM2 takes less than half of the time (benchmarks/NOTES.md)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (_linear if func is linear else func)(*args, **(kwargs or {}))


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    columns = weight @ input.flatten(0, -2).t()
    xm.optimization_barrier_([columns])  # or XLA turns the product round again
    out = columns.t().unflatten(0, input.shape[:-1])
    return out if bias is None else out + bias
