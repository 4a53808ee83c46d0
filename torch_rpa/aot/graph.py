"""A whole lazy graph of PyTorch/XLA compiled for a named TPU, without one: what stands around the ops in a model.

    with graph.traced_for("v6e"):              the ops are lowered to their TPU kernel, whatever the device
        pages = torch_rpa.empty_kv_pages(...)  the form of pages that a TPU gets
        out = model(...)                       traced, never run
        program = graph.traced_program([pages, out], updated=[pages])
    graph.compile_program(program, "v6e:2x4")

PyTorch/XLA traces on whatever device the process has; a graph for several chips needs as many devices there
(``CPU_NUM_DEVICES=8``) and SPMD. Compiling may be done in another process: a program is text and integers.

What is too large for this host is traced with placeholders, which have a shape and no memory:

    with graph.traced_for("v6e"), graph.without_memory() as shardings:
        ...
        program = graph.traced_program([pages, out], updated=[pages], shardings=shardings)
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from torch_rpa import sharding
from torch_rpa.bridges import target
from torch_rpa.jax_names import hlo_names

__all__ = [
    "Collective",
    "Program",
    "collectives",
    "compile_program",
    "placeholder",
    "traced_for",
    "traced_program",
    "without_memory",
]

_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (.*) (all-gather|all-reduce|all-to-all|collective-permute|ragged-all-to-all|reduce-scatter)(?:-start)?\("
)
_PARAMETER = re.compile(r"= (\S+) parameter\(\d+\), sharding=\{devices=")
_UNSHARDED_PARAMETER = re.compile(r" parameter\((\d+)\)(?!, sharding)")


@dataclass(frozen=True)
class Program:
    """A traced graph: its HLO before partitioning, and which of its parameters are updated in place."""

    hlo: str
    updated: tuple[int, ...]

    def sharded_sizes(self) -> set[int]:
        """How many elements the parameters have that are spread over chips."""
        return {_num_elements(shape) for shape in _PARAMETER.findall(self.hlo)}


class Collective(NamedTuple):
    """What crosses chips in a compiled program: the name of an HLO instruction, and its result, "bf16[512,4096]"."""

    kind: str
    shape: str

    @property
    def num_elements(self) -> int:
        return _num_elements(self.shape)


def collectives(text: str) -> list[Collective]:
    """All that crosses chips in the text of a compiled program; of several results the largest."""
    found = ((kind, _SHAPE.finditer(result)) for result, kind in _COLLECTIVE.findall(text))
    return [Collective(kind, max((s[0] for s in shapes), key=_num_elements)) for kind, shapes in found]


def _num_elements(shape: str) -> int:
    sizes = _SHAPE.search(shape)[1]
    return prod(map(int, sizes.split(","))) if sizes else 1


@contextmanager
def traced_for(chip: str) -> Iterator[None]:
    """Lower the ops for a TPU ("v6e") and not for the device that is there. What is traced here cannot be run."""
    with target.using(replace(_target(), platform="tpu", chip=chip)):
        yield


def placeholder(shape, dtype):
    """A tensor that becomes a parameter of the traced graph, and has no memory."""
    from torch_xla.core.xla_builder import create_placeholder_tensor

    return create_placeholder_tensor(tuple(shape), dtype)


class _Placeholders:
    """A ``Memory`` of PyTorch/XLA's bridge that is none: placeholders have no data to be moved, so they are sharded in
    the graph alone.

    shardings: by tensor, those so far, which the graph's parameters do not have.
    """

    def __init__(self) -> None:
        self.shardings: dict[int, str] = {}

    def zeros(self, shape, dtype, device):
        return placeholder(shape, dtype)

    def mark(self, tensor, op_sharding):
        from torch_rpa.bridges.torch_xla.names import xla

        xla.annotate_sharding(tensor, op_sharding)
        self.shardings[xla.tensor_id(tensor)] = sharding.sharding_of(tensor)

    def finish(self, pages):
        pass


@contextmanager
def without_memory() -> Iterator[dict[int, str]]:
    """Make pages as placeholders, and shard placeholders; gives the shardings so far, for ``traced_program``."""
    memory = _Placeholders()
    with target.using(replace(_target(), memory=memory)):
        yield memory.shardings


def _target() -> target.Target:
    from torch_rpa.bridges.torch_xla import device

    return device.target()


def traced_program(results, updated=(), shardings=None) -> Program:
    """The graph that has been traced for ``results``.

    Args:
        results: XLA tensors, those that the graph updates in place included.
        updated: those of them whose buffer the graph takes and gives back, such as the pages of every layer.
        shardings: what ``without_memory`` gave; the other parameters then stand on every chip.
    """
    from torch_rpa.bridges.torch_xla.names import xla

    parameters, _ = xla.parameters_of(list(results))
    hlo = xla.hlo_of(list(results))
    if shardings:
        hlo = _with_shardings(hlo, [shardings.get(tensor, "{replicated}") for tensor in parameters])
    return Program(hlo, tuple(parameters.index(xla.tensor_id(tensor)) for tensor in updated))


def _with_shardings(hlo: str, shardings: list[str]) -> str:
    """The HLO with a sharding for each parameter of its entry computation."""
    called, entry, body = hlo.partition("\nENTRY ")
    body = _UNSHARDED_PARAMETER.sub(lambda match: f"{match[0]}, sharding={shardings[int(match[1])]}", body)
    return called + entry + body


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

    devices = topologies.get_topology_desc(topology_name=topology_name, platform="tpu").devices[:num_chips]
    options = hlo_names.CompileOptions()
    options.num_replicas, options.num_partitions = 1, len(devices)
    options.device_assignment = hlo_names.DeviceAssignment.create(np.arange(len(devices)).reshape(1, -1))
    build = options.executable_build_options
    build.num_partitions, build.use_spmd_partitioning = len(devices), True
    build.allow_spmd_sharding_propagation_to_output = [True]
    return devices[0].client.compile(_stablehlo(program), hlo_names.DeviceList(tuple(devices)), options)


def _stablehlo(program: Program) -> bytes:
    """The program as MLIR bytecode, with its donated parameters marked."""
    from jaxlib.mlir import ir

    module = hlo_names.hlo_module_from_text(program.hlo)
    computation = hlo_names.XlaComputation(module.as_serialized_hlo_module_proto())
    with hlo_names.make_ir_context():
        module = ir.Module.parse(hlo_names.xla_computation_to_mlir_module(computation))
        main = next(f for f in module.body if getattr(f, "name", None) and f.name.value == "main")
        attributes = [{a.name: a.attr for a in argument} for argument in main.arg_attrs]
        for parameter in program.updated:
            attributes[parameter]["jax.buffer_donor"] = ir.BoolAttr.get(True)
        main.arg_attrs = ir.ArrayAttr.get([ir.DictAttr.get(a) for a in attributes])
        bytecode = io.BytesIO()
        module.operation.write_bytecode(bytecode)
    return bytecode.getvalue()
