"""A whole lazy graph of PyTorch/XLA compiled for a named TPU, without one: what stands around the ops in a model.

    with aot_graph.traced_for("v6e"):          the ops are lowered to their TPU kernel, whatever the device
        pages = torch_rpa.empty_kv_pages(...)  the form of pages that a TPU gets
        out = model(...)                       traced, never run
        program = aot_graph.traced_program([pages, out], updated=[pages])
    aot_graph.compile_program(program, "v6e:2x4")

PyTorch/XLA traces on whatever device the process has; a graph for several chips needs as many devices there
(``CPU_NUM_DEVICES=8``) and SPMD. Compiling may be done in another process: a program is text and integers.
"""

import io
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

__all__ = ["Program", "compile_program", "traced_for", "traced_program"]


@dataclass(frozen=True)
class Program:
    """A traced graph: its HLO before partitioning, and which of its parameters are updated in place."""

    hlo: str
    updated: tuple[int, ...]


@contextmanager
def traced_for(chip: str):
    """Lower the ops for a TPU ("v6e") and not for the device that is there. What is traced here cannot be run."""
    from torch_rpa import bridge

    with (
        mock.patch.object(bridge, "device_kind", return_value="tpu"),
        mock.patch.object(bridge, "chip_name", return_value=chip),
    ):
        bridge.forget_computations()
        try:
            yield
        finally:
            bridge.forget_computations()


def traced_program(results, updated=()) -> Program:
    """The graph that has been traced for ``results``.

    Args:
        results: XLA tensors, those that the graph updates in place included.
        updated: those of them whose buffer the graph takes and gives back, such as the pages of every layer.
    """
    import torch_xla

    xla = torch_xla._XLAC
    parameters, _ = xla._get_tensors_xla_device_data_node(list(results))
    hlo = xla._get_xla_tensors_hlo(list(results))
    return Program(hlo, tuple(parameters.index(xla._xla_get_tensor_id(tensor)) for tensor in updated))


def compile_program(program: Program, topology_name: str, num_chips: int | None = None):
    """The program as libtpu compiles it for all chips of a topology such as "v5e:2x2", or for its first ``num_chips``.

    Needs the environment of ``torch_rpa.aot``, set before JAX is imported. (PyTorch/XLA's own conversion drops what is
    donated, so it is put back here; https://openxla.org/xla names the build options.)

    Returns:
        A jaxlib executable: ``hlo_modules()[0].to_string()`` is the program of one chip, and
        ``get_compiled_memory_stats()`` has its bytes.
    """
    import numpy as np
    from jax.experimental import topologies
    from jaxlib import _jax, xla_client

    devices = topologies.get_topology_desc(topology_name=topology_name, platform="tpu").devices[:num_chips]
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = 1, len(devices)
    options.device_assignment = xla_client.DeviceAssignment.create(np.arange(len(devices)).reshape(1, -1))
    build = options.executable_build_options
    build.num_partitions, build.use_spmd_partitioning = len(devices), True
    build.allow_spmd_sharding_propagation_to_output = [True]
    return devices[0].client.compile(_stablehlo(program), _jax.DeviceList(tuple(devices)), options)


def _stablehlo(program: Program) -> bytes:
    """The program as MLIR bytecode, with its donated parameters marked."""
    from jax._src.interpreters import mlir
    from jaxlib import xla_client
    from jaxlib.mlir import ir

    module = xla_client._xla.hlo_module_from_text(program.hlo)
    computation = xla_client.XlaComputation(module.as_serialized_hlo_module_proto())
    with mlir.make_ir_context():
        module = ir.Module.parse(xla_client._xla.mlir.xla_computation_to_mlir_module(computation))
        main = next(f for f in module.body if getattr(f, "name", None) and f.name.value == "main")
        attributes = [{a.name: a.attr for a in argument} for argument in main.arg_attrs]
        for parameter in program.updated:
            attributes[parameter]["jax.buffer_donor"] = ir.BoolAttr.get(True)
        main.arg_attrs = ir.ArrayAttr.get([ir.DictAttr.get(a) for a in attributes])
        bytecode = io.BytesIO()
        module.operation.write_bytecode(bytecode)
    return bytecode.getvalue()
