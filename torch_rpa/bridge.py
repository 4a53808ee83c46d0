"""From XLA tensors to JAX, and what else the ops ask of torch_xla: the seam for another bridge beside it.

torch_xla's call_jax lowers a JAX function, hands the HLO to PyTorch/XLA as a computation, and adds a call of it to the
lazy graph. The same three steps are taken here, but the first two once for each static configuration (shapes, dtypes,
options), after which a call is a look-up and the third step. call_jax repeats its look-ups, its pytree work and its
environment writes in every call, keeps every function for ever, and is not thread-safe.

Lowering names its platform and starts no JAX backend, so that a TPU stays with PyTorch/XLA.
"""

import os
import threading
from functools import cache, lru_cache
from unittest import mock

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as metrics
import torch_xla.runtime as xr
from torch_xla._internal import tpu
from torch_xla._internal.jax_workarounds import jax_import_guard

from torch_rpa import sharding
from torch_rpa.options import AttentionOptions
from torch_rpa.validation import ArgSpec, check_static, dtype_name

_PLATFORMS = {"CPU": "cpu", "TPU": "tpu"}
_RESULTS = {
    "ragged_paged_attention": ("out",),
    "ragged_paged_attention_with_lse": ("out", "lse"),
    "ragged_paged_attention_update": ("out", "kv_pages"),
}
_KERNEL_CHOICES = ("auto", "xla", "interpret")
# A served model has a handful of configurations: one for each token bucket and kind of layer.
_MAX_COMPUTATIONS = 256
# The newest Mosaic that the pinned libtpu reads; jax 0.7.1 emits 8 by itself, which is refused.
_MOSAIC_VERSION = 7
_LOCK = threading.RLock()


def call(op: str, args: dict[str, torch.Tensor], options: dict) -> list[torch.Tensor]:
    """Add one call of ``torch_rpa.kernels``' function ``op`` to the lazy graph.

    Args:
        op: name of the function.
        args: its XLA tensors by argument name.
        options: fields of ``AttentionOptions`` by name; the default for those left out.

    Returns:
        The function's results, as lazy XLA tensors.

    Raises:
        ValueError, TypeError, NotImplementedError: from the static checks, the first time a configuration is seen.
    """
    heads = sharding.for_call(args["q"]) if xr.is_spmd() else None
    if heads is None:
        return call_on_parts(op, args, options)
    shapes = {"out": args["q"].shape, "lse": args["q"].shape[:2], "kv_pages": args["kv_pages"].shape}
    parts = call_on_parts(op, heads.shards(args), options)
    return [heads.whole(name, part, shapes[name]) for name, part in zip(_RESULTS[op], parts, strict=True)]


def call_on_parts(op: str, args: dict[str, torch.Tensor], options: dict) -> list[torch.Tensor]:
    """``call`` for arguments as they are: under SPMD every chip's own parts, see ``sharding``."""
    tensors = list(args.values())
    specs = tuple([(name, t.shape, t.dtype, t.device) for name, t in args.items()])
    kernel = os.environ.get("TORCH_RPA_XLA_KERNEL", "auto")
    with _LOCK:  # one thread lowers a configuration, the others wait for it
        computation = _computation(op, specs, tuple(options.items()), kernel)
    return torch_xla._XLAC._xla_user_computation(f"xla::rpa_{op}", tensors, computation)


def device_kind() -> str:
    """What stands behind the XLA device, as JAX names it: "cpu" or "tpu".

    Raises:
        NotImplementedError: on any other device of PyTorch/XLA.
    """
    device_type = xr.device_type()
    if device_type not in _PLATFORMS:
        raise NotImplementedError(
            f"torch_rpa runs on the XLA devices {' and '.join(_PLATFORMS)}, not on {device_type}; set PJRT_DEVICE"
        )
    return _PLATFORMS[device_type]


def chip_name() -> str | None:
    """The TPU behind the XLA device, as ``torch_rpa.kernels`` names it ("v6e").

    None off TPU, and for a chip that is not known. Under SPMD, whose virtual device does not say, it is what the host's
    accelerator type tells: an environment variable or the metadata server, where PyTorch/XLA itself looks.
    """
    from torch_rpa import chips

    if xr.is_spmd():
        return chips.name_on(_accelerator()) if xr.device_type() == "TPU" else None
    return chips.name_of(xm.xla_device_kind())


@cache
def _accelerator() -> str | None:
    """Cloud TPU's name for this host's chips, such as "v5litepod"; None if there is nobody to say."""
    try:
        return tpu.get_tpu_type()
    except (OSError, KeyError, TypeError):  # no metadata server (an error of requests is an OSError), or no such entry
        return None


def zeros_pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeroed pages with a buffer of their own on the device, under ``sharding.use_mesh`` a part of them on each chip.

    ``torch.zeros`` alone is a constant of the lazy graph, and the first step on it another program than all later ones.
    """
    zeros = torch.zeros(shape, dtype=dtype, device=device)
    if sharding.current() is not None:
        sharding.current().mark("kv_pages", zeros)
    run_pending([zeros])
    return zeros


def run_pending(tensors: list[torch.Tensor]) -> None:
    """Run the program traced so far, with exactly ``tensors`` as its results.

    ``torch_xla.sync()`` takes all lazy tensors of the process into the program; those of others would change its hash,
    and so recompile it. Tensors that were updated in place go first: buffers are given to the results in order.
    """
    torch_xla._XLAC._xla_sync_multi(tensors, devices=[], wait=False, sync_xla_data=True)


def compilations() -> tuple[int, float]:
    """How many programs XLA has compiled in this process so far, and how many seconds that took."""
    compile_time = metrics.metric_data("CompileTime")  # (samples, total in nanoseconds, ...), None before the first
    return metrics.counter_value("UncachedCompile") or 0, compile_time[1] / 1e9 if compile_time else 0.0


def forget_computations() -> None:
    """Lower every configuration again when it is seen next."""
    with _LOCK:
        _computation.cache_clear()


def free_memory_bytes(device: torch.device) -> int | None:
    """Bytes of the device's memory that nothing takes yet; None where PJRT does not tell (the CPU)."""
    try:
        info = xm.get_memory_info(device)
    except RuntimeError:
        return None
    return info["bytes_limit"] - info["bytes_used"]


@lru_cache(maxsize=_MAX_COMPUTATIONS)
def _computation(op, specs, options, kernel):
    """The lowered computation of one static configuration; checks it first."""
    platform = device_kind()
    options = AttentionOptions(**dict(options))
    args = {name: ArgSpec(tuple(shape), dtype_name(dtype), str(device)) for name, shape, dtype, device in specs}
    # Plain XLA ops have no limits of their own on a TPU.
    check_static(args, options, platform if kernel != "xla" else None)
    if kernel not in _KERNEL_CHOICES:
        raise ValueError(f"TORCH_RPA_XLA_KERNEL must be one of {', '.join(_KERNEL_CHOICES)}, got {kernel!r}")
    return _lower(op, specs, options, platform, kernel)


def _lower(op, specs, options, platform, kernel):
    jax_import_guard()  # PyTorch/XLA takes the TPU before JAX may touch it
    try:
        import jax
        import jax.numpy as jnp
    except ModuleNotFoundError as error:
        raise ImportError("torch_rpa needs JAX for XLA tensors; pip install 'torch_rpa[xla]'") from error

    from torch_rpa import kernels

    names = [name for name, *_ in specs]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype_name(dtype))) for _, shape, dtype, _ in specs]
    choice = {"interpret": kernel == "interpret", "backend": "xla" if kernel == "xla" else "auto"}
    choice["chip"] = chip_name()

    def function(*arrays):
        return getattr(kernels, op)(**dict(zip(names, arrays, strict=True)), **vars(options), **choice)

    return xb.computation_from_module_proto(f"rpa_{op}", lower_to_hlo(function, shapes, platform))


def lower_to_hlo(function, shapes, platform: str) -> bytes:
    """The serialized HLO of a JAX function for ``platform``.

    Left alone, jax would start its backends for a default device, and on a TPU VM a TPU client to choose Mosaic's
    version by. So it gets a device of a CPU client of our own, is told that this is no TPU VM, and the version is set
    here. (``jax.export`` chooses the same version in jax 0.7.1, but starts the backends too.)

    Args:
        function: a JAX function of positional arrays.
        shapes: their ``jax.ShapeDtypeStruct``s.
        platform: "cpu" or "tpu".
    """
    import jax
    from jax._src import cloud_tpu_init, tpu_custom_call

    jitted = jax.jit(function, keep_unused=True)
    with (
        _LOCK,  # the patches are of the whole process
        jax.default_device(_lowering_device()),
        mock.patch.object(cloud_tpu_init, "running_in_cloud_tpu_vm", False),
        mock.patch.object(tpu_custom_call, "get_ir_version", return_value=_MOSAIC_VERSION),
    ):
        lowered = jitted.trace(*shapes).lower(lowering_platforms=(platform,))
        return lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()


@cache
def _lowering_device():
    from jaxlib import xla_client

    return xla_client.make_cpu_client().local_devices()[0]
