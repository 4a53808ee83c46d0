"""A program of PyTorch/XLA that is traced once and then run again and again, without tracing.

Lazy tensors trace every step anew only to find, by a hash, the program that they compiled before. For a model that
costs tens of milliseconds a step. Here the hash and the program's inputs are kept from the first trace, as torch_xla's
own backend for torch.compile keeps them, but without Dynamo: what is traced is the model as it stands.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch_xla.core.xla_model as xm
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

from torch_rpa.bridges.interface import Interrupted, ProgramEvicted, Programs, TraceInterrupted
from torch_rpa.bridges.torch_xla.device import run_pending
from torch_rpa.bridges.torch_xla.names import xla

# Of PyTorch/XLA's messages.
_EVICTED = "computation by hash"
_INTERRUPTED = (
    "Check failed: data()->tensor_data",
    "Check failed: tensor_data",
    "without XLAData and IR",
    "been deleted",
)


class Replay:
    """One traced and compiled program.

    Args:
        trace: gives the results, lazily. Python values that it reads are fixed from then on.
        inputs: the tensors it reads that every run may replace, with data on the device.
        updated: tensors that it changes in place; their buffers are reused.
        constants: tensors it reads that stay the same objects, such as weights; each run reads their present values.
        programs: what the program is counted in.
        former_hash: of a trace that seemed interrupted. If this one is the same, neither was.

    Raises:
        TraceInterrupted: another thread's ``torch_xla.sync()`` has run parts of the trace, which are now data in it.
    """

    def __init__(
        self,
        trace: Callable[[], list[torch.Tensor]],
        inputs: list[torch.Tensor],
        updated: list[torch.Tensor],
        constants: Iterable[torch.Tensor],
        programs: Programs | None = None,
        former_hash: int | None = None,
    ) -> None:
        constants = list(constants)
        _materialise([*constants, *updated])
        xm.wait_device_ops()  # what is on its way has no buffer to be known by yet
        live = dict(zip(_buffers(updated), updated, strict=True))
        self._updated = updated
        self._donate()
        outputs = [*updated, *trace()]
        _, values = xla.parameters_of(outputs)
        buffers = _buffers(values)
        self._hash = _compile(outputs)
        # Nothing has run yet: what tracing updated gets the buffer back that it had.
        for buffer, value in zip(buffers, values, strict=True):
            if buffer in live:
                xla.replace_data(live[buffer], value)
        live.update(zip(_buffers(constants), constants, strict=True))
        self._arguments = [live.get(buffer, value) for buffer, value in zip(buffers, values, strict=True)]
        self._live = [live[buffer] for buffer in buffers if buffer in live]
        # An input that the program does not read has no place among its arguments.
        of_inputs = _buffers(inputs)
        self._places = [buffers.index(buffer) if buffer in buffers else None for buffer in of_inputs]
        # What is neither live nor an input is a constant that tracing made: Python's numbers are, as scalars. An array
        # is most likely half of a trace, with the values of these very inputs.
        made = [value for buffer, value in zip(buffers, values, strict=True) if buffer not in {*live, *of_inputs}]
        if any(value.dim() for value in made) and self._hash != former_hash:
            _materialise(updated)
            raise TraceInterrupted(self._hash)
        self._programs = programs or Programs()
        self._programs.add(self._hash)

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Start the program with these inputs: its results. `updated` are up to date afterwards.

        Raises:
            ProgramEvicted: PyTorch/XLA has room for XLA_COMPILATION_CACHE_SIZE programs, and has dropped this one.
        """
        _materialise(self._live)
        self._donate()
        arguments = list(self._arguments)
        for place, tensor in zip(self._places, inputs, strict=True):
            if place is not None:
                arguments[place] = tensor
        outputs = self._run(arguments)
        for tensor, output in zip(self._updated, outputs, strict=False):
            xla.replace_data(tensor, output)
        return outputs[len(self._updated) :]

    def _run(self, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
        try:
            return xla.run_by_hash(self._hash, arguments)
        except RuntimeError as error:
            if _EVICTED not in str(error):
                raise
            self._donate(False)
            self._programs.forget(self._hash)
            raise ProgramEvicted(
                "PyTorch/XLA's cache of programs has dropped this one; trace it anew, and set "
                "XLA_COMPILATION_CACHE_SIZE to more than the programs that are in use"
            ) from error

    def _donate(self, is_donated: bool = True) -> None:
        for tensor in self._updated:
            xla.set_donation(tensor, is_donated)


@contextmanager
def interruptible() -> Iterator[None]:
    """Around a computation: turns what another thread's ``torch_xla.sync()`` does to it into Interrupted. Such a call
    takes all that is pending in the process, half-traced steps and their donated buffers among it."""
    try:
        yield
    except RuntimeError as error:
        if not any(message in str(error) for message in _INTERRUPTED):
            raise
        raise Interrupted(f"another thread ran what was pending in the process: {error}") from error


def _buffers(tensors: list[torch.Tensor]) -> list[int]:
    """What each tensor's data is known by, as long as it stays. (Under SPMD tensor ids change when a program runs.)"""
    return xla.tensor_handles(tensors)


def _compile(outputs: list[torch.Tensor]) -> int:
    """Compile the program of these lazy tensors without running it, with donated inputs; the hash it is found by."""
    with alias_with_buffer_donor_config():
        graph_hash = xla.graph_hash(outputs)
        xla.compile_pending(outputs, [])
    return graph_hash


def _materialise(tensors: list[torch.Tensor]) -> None:
    """Run what is still pending on tensors that a program reads, such as weights that were just loaded."""
    needed = xla.check_needs_run(tensors)
    pending = [tensor for tensor, is_needed in zip(tensors, needed, strict=True) if is_needed]
    if pending:
        run_pending(pending)
