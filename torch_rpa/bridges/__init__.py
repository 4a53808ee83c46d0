"""What stands between the ops and a device that torch itself does not run: one interface, a bridge for each way there.

    device.type   bridge       the device
    "xla"         torch_xla/   PyTorch/XLA: a TPU, or PJRT CPU for development
    "tpu"         torch_tpu/   TorchTPU

Nothing else in the package asks for a device's type to find its bridge. A bridge, and with it torch_xla and JAX, is
imported when its device is first asked for.
"""

import torch

from torch_rpa.bridges.interface import Bridge, Interrupted, ProgramEvicted, Programs, TraceInterrupted
from torch_rpa.extras import from_extra

__all__ = ["Bridge", "Interrupted", "ProgramEvicted", "Programs", "TraceInterrupted", "of"]

_bridges: dict[str, Bridge] = {}  # those that were asked for


def of(device: torch.device | str) -> Bridge | None:
    """The bridge to a device; None for one that needs none: the CPU, and "meta"."""
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    if kind in ("xla", "tpu") and kind not in _bridges:
        _bridges[kind] = _imported(kind)
    return _bridges.get(kind)


def _imported(kind: str) -> Bridge:
    with from_extra(kind, f'device "{kind}"'):
        if kind == "xla":
            from torch_rpa.bridges.torch_xla.bridge import BRIDGE
        else:
            from torch_rpa.bridges.torch_tpu.bridge import BRIDGE
    return BRIDGE
