"""Linear layers in the form that is fast on the model's device."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from torch_rpa import bridges, native


def on_device(device: torch.device) -> AbstractContextManager:
    """Inside it linear layers on this device are computed, or traced, in the form that suits what stands behind it."""
    if device.type == "cpu" and native.is_available():
        return _Linear(_native)
    bridge = bridges.of(device)
    if bridge is not None and bridge.device_kind() == "cpu":
        return _Linear(_weight_first)
    return nullcontext()


class _Linear(TorchFunctionMode):
    """`function` in place of torch.nn.functional.linear: nothing on the model changes, and new weights are seen.

    Tensors with functions of their own, such as quantised weights, keep them.
    """

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self._function = function

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (self._function if func is linear and not types else func)(*args, **(kwargs or {}))


def _native(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """In float32 the native product: faster than torch's for few rows, and a row's bits do not depend on the others."""
    product = native.linear if input.dtype == weight.dtype == torch.float32 else linear
    return product(input, weight, bias)


def _weight_first(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ W^T`` as ``(W @ x^T)^T``: XLA's matrix products on CPUs rearrange the second operand, which would be all of
    W at every step. A decode step of SmolLM2 takes less than half of the time (benchmarks/NOTES.md)."""
    import torch_xla.core.xla_model as xm

    columns = weight @ input.flatten(0, -2).t()
    xm.optimization_barrier_([columns])  # or XLA turns the product round again
    out = columns.t().unflatten(0, input.shape[:-1])
    return out if bias is None else out + bias
