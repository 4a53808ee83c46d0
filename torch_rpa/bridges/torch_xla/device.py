"""The XLA device: what stands behind it, its memory, and running what is pending on it."""

from functools import cache
from typing import Protocol

import torch
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

from torch_rpa.bridges import target as targets
from torch_rpa.bridges.target import Target
from torch_rpa.bridges.torch_xla.names import xla

_PLATFORMS = {"CPU": "cpu", "TPU": "tpu"}


class Memory(Protocol):
    """How pages are made, and tensors shared out over chips: what ``Target.memory`` is for PyTorch/XLA."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Pages, before they are shared out."""

    def mark(self, tensor: torch.Tensor, op_sharding) -> None:
        """Share the tensor's data out over the chips of an ``OpSharding``."""

    def finish(self, pages: torch.Tensor) -> None:
        """Give pages their memory."""


class _DeviceMemory:
    def zeros(self, shape, dtype, device):
        return torch.zeros(shape, dtype=dtype, device=device)

    def mark(self, tensor, op_sharding):
        xla.mark_sharding(tensor, op_sharding)

    def finish(self, pages):
        # Zeros alone are a constant of the lazy graph, and the first step on them another program than all later ones.
        run_pending([pages])


_ON_DEVICE = _DeviceMemory()


def target() -> Target:
    """What is lowered for: what ``targets.using`` says, or else the device."""
    return targets.chosen() or Target(_platform(), _chip())


def memory() -> Memory:
    """Where tensors get their memory."""
    chosen = targets.chosen()
    return _ON_DEVICE if chosen is None or chosen.memory is None else chosen.memory


def run_pending(tensors: list[torch.Tensor]) -> None:
    """Run the program traced so far, with exactly ``tensors`` as its results.

    ``torch_xla.sync()`` takes all lazy tensors of the process into the program; those of others would change its hash,
    and so recompile it. Tensors that were updated in place go first: buffers are given to the results in order.
    """
    xla.run_pending(tensors, devices=[], wait=False, sync_xla_data=True)


def _platform() -> str:
    device_type = xr.device_type()
    if device_type not in _PLATFORMS:
        raise NotImplementedError(
            f"torch_rpa runs on the XLA devices {' and '.join(_PLATFORMS)}, not on {device_type}; set PJRT_DEVICE"
        )
    return _PLATFORMS[device_type]


def _chip() -> str | None:
    """Under SPMD, whose virtual device does not say, it is what the host's accelerator type tells: an environment
    variable or the metadata server, where PyTorch/XLA itself looks."""
    from torch_rpa import chips

    if xr.is_spmd():
        return chips.name_on(_accelerator()) if xr.device_type() == "TPU" else None
    return chips.name_of(xm.xla_device_kind())


@cache
def _accelerator() -> str | None:
    """Cloud TPU's name for this host's chips, such as "v5litepod"; None if there is nobody to say."""
    try:
        return xla.tpu_type()
    except (OSError, KeyError, TypeError):  # no metadata server (an error of requests is an OSError), or no such entry
        return None
