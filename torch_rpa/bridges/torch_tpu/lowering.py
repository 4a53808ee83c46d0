"""A call of an op as a custom kernel of TorchTPU.

``torch.tpu.pallas.jax_op`` makes an op of a JAX function: it lowers it for each new shape, registers the module with
TorchTPU, and calls it by name and fingerprint. The same three steps are taken here, but a call finds what was
registered by a key of its own. jax_op binds and prints its arguments in every call, which takes a millisecond for as
many as ours. Both work in eager mode and while torch.compile traces, as TorchTPU runs the graph's ops to do so.
"""

import hashlib
import threading
from functools import lru_cache
from typing import NamedTuple

import torch

from torch_rpa.bridges import target as targets
from torch_rpa.bridges.configuration import Configuration
from torch_rpa.bridges.interface import MAX_LOWERED_CALLS
from torch_rpa.bridges.target import Target
from torch_rpa.bridges.torch_tpu.names import tpu
from torch_rpa.validation import dtype_name

_LOCK = threading.Lock()


class Kernel(NamedTuple):
    """A registered module: what TorchTPU finds it by, and its results as empty tensors."""

    name: str
    fingerprint: str
    results: list[torch.Tensor]


def call(op: str, args: dict[str, torch.Tensor], options: dict, donated: str | None = None) -> list[torch.Tensor]:
    """``Bridge.call``; the argument called ``donated`` is given up, and a result takes its buffer."""
    configuration = Configuration.of_call(op, args, options)
    names = list(args)
    positions = [] if donated is None else [names.index(donated)]
    with _LOCK:  # one thread lowers a configuration, the others wait for it
        kernel = _kernel(configuration, tuple(positions))
    return tpu.call_kernel(
        kernel.name,
        kernel.fingerprint,
        inputs=list(args.values()),
        output_shapes=kernel.results,
        donate_argnums=positions,
    )


def target() -> Target:
    """What is lowered for: what ``targets.using`` says, or else the device."""
    from torch_rpa import chips

    kind = tpu.device_attributes()["device_kind"]
    return targets.chosen() or Target("cpu" if kind == "cpu" else "tpu", chips.name_of(kind))


@lru_cache(maxsize=MAX_LOWERED_CALLS)
def _kernel(configuration: Configuration, donated: tuple[int, ...]) -> Kernel:
    """Lowers a call and registers it; checks it first."""
    configuration = configuration.for_target(target)
    _check_written_pages(configuration)
    function, shapes = configuration.as_function()
    from torch_rpa import jax_names

    lowered = jax_names.lower(function, shapes, configuration.target.platform, donated)
    module = lowered.as_text()  # without the places in the source that traced it, so the same wherever that was
    # TorchTPU keeps compiled programs on disk by the fingerprint, so that it must tell the contents.
    fingerprint = hashlib.blake2b(module.encode(), digest_size=16).hexdigest()
    name = f"rpa_{configuration.op}"
    if not tpu.has_kernel(name, fingerprint):
        tpu.register_kernel(name, fingerprint, serialized_mlir_module=_portable(module))
    device = configuration.specs[0][3]
    results = [torch.empty(x.shape, dtype=_torch_dtype(x.dtype), device=device) for x in _leaves(lowered.out_info)]
    return Kernel(name, fingerprint, results)


def _check_written_pages(configuration: Configuration) -> None:
    """Refuse what libtpu 0.0.52 cannot address in the update kernel: with 4 and 8 KV heads that are not float32 it says
    "Failed to prove that a tile index in dimension 0 is divisible by the tiling"; 1 and 2 compile."""
    specs = {name: (shape, dtype) for name, shape, dtype, _ in configuration.specs}
    shape, dtype = specs["kv_pages"]
    runs_kernel = configuration.target.platform == "tpu" and configuration.kernel == "auto"
    if runs_kernel and "k" in specs and len(shape) == 4 and shape[2] % 8 == 0 and dtype.itemsize < 4:
        raise NotImplementedError(
            "torch_rpa cannot run this call: to be updated on TorchTPU, pages in heads form with a multiple of 4 KV "
            f"heads must be float32, got shape {list(shape)} of {dtype_name(dtype)}; make them with "
            "torch_rpa.empty_kv_pages"
        )


def _portable(module: str) -> bytes:
    """The bytes of a StableHLO module that other releases of XLA read. (``jax.export`` gives them too, and starts JAX's
    backends for it.)"""
    from jaxlib.mlir.dialects import stablehlo

    age = stablehlo.StablehloCompatibilityRequirement.WEEK_4
    return stablehlo.serialize_portable_artifact_str(module, stablehlo.get_version_from_compatibility_requirement(age))


def _leaves(results) -> list:
    return list(results) if isinstance(results, (tuple, list)) else [results]


def _torch_dtype(dtype) -> torch.dtype:
    return getattr(torch, dtype.name)
