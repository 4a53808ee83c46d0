"""The devices that this environment's tests run on, beside the CPU; imports no torch."""

from importlib.util import find_spec

# PyTorch/XLA and TorchTPU need different releases of torch, so an environment has one of them.
BRIDGED = [device for device, package in (("xla", "torch_xla"), ("tpu", "torch_tpu")) if find_spec(package)]
