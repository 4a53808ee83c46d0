"""What stands between the ops and a device that torch itself does not run: one interface, a bridge for each way there.

    device.type   bridge       the device
    "xla"         torch_xla/   PyTorch/XLA: a TPU, or PJRT CPU for development

Nothing else in the package asks for a device's type to find its bridge. A bridge, and with it torch_xla and JAX, is
imported when its device is first asked for.
"""

import torch

from torch_rpa.bridges.interface import Bridge, Interrupted, ProgramEvicted, Programs, TraceInterrupted
from torch_rpa.extras import from_extra

__all__ = ["Bridge", "Interrupted", "ProgramEvicted", "Programs", "TraceInterrupted", "of"]


def of(device: torch.device | str) -> Bridge | None:
    """The bridge to a device; None for one that needs none: the CPU, and "meta"."""
    if torch.device(device).type == "xla":
        with from_extra("xla", 'device "xla"'):
            from torch_rpa.bridges.torch_xla.bridge import BRIDGE

        return BRIDGE
    return None
