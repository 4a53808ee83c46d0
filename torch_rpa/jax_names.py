"""All private names of jax and jaxlib that torch_rpa uses, and lowering, which needs them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from torch_rpa.private_names import PrivateNames

jax_names = PrivateNames(
    "jax",
    "0.7.1",
    {
        "cloud_tpu_init": "jax._src:cloud_tpu_init",
        "running_in_cloud_tpu_vm": "jax._src:cloud_tpu_init.running_in_cloud_tpu_vm",  # set by `_off_tpu_vm`
        "LoweringParameters": "jax._src.interpreters.mlir:LoweringParameters",
        "make_cpu_client": "jaxlib.xla_client:make_cpu_client",
    },
)
# To compile PyTorch/XLA's graphs, which keeps to the jax of its release.
hlo_names = PrivateNames(
    "jax",
    "0.7.1",
    {
        "make_ir_context": "jax._src.interpreters.mlir:make_ir_context",
        "CompileOptions": "jaxlib.xla_client:CompileOptions",
        "DeviceAssignment": "jaxlib.xla_client:DeviceAssignment",
        "DeviceList": "jaxlib._jax:DeviceList",
        "XlaComputation": "jaxlib.xla_client:XlaComputation",
        "hlo_module_from_text": "jaxlib.xla_client:_xla.hlo_module_from_text",
        "xla_computation_to_mlir_module": "jaxlib.xla_client:_xla.mlir.xla_computation_to_mlir_module",
    },
)
_LOCK = threading.Lock()


def lower(function, shapes, platform: str, donated: tuple[int, ...] = ()):
    """A JAX function lowered for ``platform`` as ``jax.export`` lowers it, without a JAX backend being started.

    Exports keep to the Mosaic version that all readers know: 7 in jax 0.7.1, the newest that its libtpu reads; plain
    lowering emits 8, which is refused. Left alone, jax would start its backends for a default device, so it gets one of
    a CPU client of our own.

    Args:
        function: a JAX function of positional arrays.
        shapes: their ``jax.ShapeDtypeStruct``s.
        platform: "cpu" or "tpu".
        donated: arguments whose buffers results may take.

    Returns:
        A ``jax.stages.Lowered``.
    """
    import jax

    parameters = jax_names.LoweringParameters(for_export=True, hoist_constants_as_args=False)
    trace = jax.jit(function, keep_unused=True, donate_argnums=donated).trace
    with jax.default_device(_lowering_device()), _off_tpu_vm():
        return trace(*shapes).lower(lowering_platforms=(platform,), _private_parameters=parameters)


@contextmanager
def _off_tpu_vm() -> Iterator[None]:
    """Inside, jax takes this host for none with a TPU.

    The one setting of another package that is changed here. On a TPU VM jax 0.7.1 asks how old the TPU's runtime is
    before it looks at any lowering parameter, and starts a TPU client for it; the TPU belongs to PyTorch's.
    """
    module = jax_names.cloud_tpu_init
    with _LOCK:  # the setting is of the whole process
        former, module.running_in_cloud_tpu_vm = module.running_in_cloud_tpu_vm, False
        try:
            yield
        finally:
            module.running_in_cloud_tpu_vm = former


@cache
def _lowering_device():
    return jax_names.make_cpu_client().local_devices()[0]
