"""The devices that this environment's tests run on, beside the CPU; imports no torch."""

from importlib.util import find_spec

import pytest

# PyTorch/XLA and TorchTPU need different releases of torch, so an environment has one of them.
BRIDGED = [
    pytest.param(device, marks=marks)
    for device, package, marks in (("xla", "torch_xla", pytest.mark.xla), ("tpu", "torch_tpu", ()))
    if find_spec(package)
]
