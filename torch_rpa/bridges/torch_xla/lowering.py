"""A call of an op as a computation of PyTorch/XLA.

torch_xla's call_jax lowers a JAX function, hands the HLO to PyTorch/XLA as a computation, and adds a call of it to the
lazy graph. The same three steps are taken here, but the first two once for each static configuration (shapes, dtypes,
options), after which a call is a look-up and the third step. call_jax repeats its look-ups, its pytree work and its
environment writes in every call, keeps every function for ever, and is not thread-safe.

Lowering names its platform and starts no JAX backend, so that a TPU stays with PyTorch/XLA.
"""

import os
import threading
from functools import lru_cache

import torch
import torch_xla.core.xla_builder as xb

from torch_rpa.bridges.torch_xla import target as targets
from torch_rpa.bridges.torch_xla.names import xla
from torch_rpa.extras import from_extra
from torch_rpa.options import AttentionOptions
from torch_rpa.validation import ArgSpec, check_static, dtype_name

_KERNEL_CHOICES = ("auto", "xla", "interpret")
# A served model has a handful of configurations: one for each token bucket and kind of layer.
_MAX_COMPUTATIONS = 256
_LOCK = threading.Lock()


def call(op: str, args: dict[str, torch.Tensor], options: dict) -> list[torch.Tensor]:
    """``Bridge.call`` for arguments as they are: under SPMD every chip's own parts, see ``torch_rpa.sharding``."""
    tensors = list(args.values())
    specs = tuple([(name, t.shape, t.dtype, t.device) for name, t in args.items()])
    kernel = os.environ.get("TORCH_RPA_XLA_KERNEL", "auto")
    with _LOCK:  # one thread lowers a configuration, the others wait for it
        computation = _computation(op, specs, tuple(options.items()), kernel, targets.chosen())
    return xla.user_computation(f"xla::rpa_{op}", tensors, computation)


@lru_cache(maxsize=_MAX_COMPUTATIONS)
def _computation(op, specs, options, kernel, target):
    """The lowered computation of one static configuration; checks it first. Without a target: for the device."""
    target = target or targets.current()
    options = AttentionOptions(**dict(options))
    args = {name: ArgSpec(tuple(shape), dtype_name(dtype), str(device)) for name, shape, dtype, device in specs}
    # Plain XLA ops have no limits of their own on a TPU.
    check_static(args, options, target.platform if kernel != "xla" else None)
    if kernel not in _KERNEL_CHOICES:
        raise ValueError(f"TORCH_RPA_XLA_KERNEL must be one of {', '.join(_KERNEL_CHOICES)}, got {kernel!r}")
    return xb.computation_from_module_proto(f"rpa_{op}", hlo_of(op, specs, options, kernel, target))


def hlo_of(op: str, specs, options: AttentionOptions, kernel: str, target: targets.Target) -> bytes:
    """The serialized HLO of ``torch_rpa.kernels``' function ``op``.

    Args:
        specs: (name, shape, dtype, device) of each tensor.
        kernel: what TORCH_RPA_XLA_KERNEL says.
    """
    xla.init_client()  # PyTorch/XLA takes the TPU before JAX may touch it
    with from_extra("xla", 'device "xla"'):
        import jax
        import jax.numpy as jnp

    from torch_rpa import jax_names, kernels

    names = [name for name, *_ in specs]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype_name(dtype))) for _, shape, dtype, _ in specs]
    choice = {"interpret": kernel == "interpret", "backend": "xla" if kernel == "xla" else "auto", "chip": target.chip}

    def function(*arrays):
        return getattr(kernels, op)(**dict(zip(names, arrays, strict=True)), **vars(options), **choice)

    lowered = jax_names.lower(function, shapes, target.platform)
    return lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
