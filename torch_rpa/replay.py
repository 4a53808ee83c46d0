"""A program of PyTorch/XLA that is traced once and then run again and again, without tracing.

Lazy tensors trace every step anew only to find, by a hash, the program that they compiled before. For a model that
costs tens of milliseconds a step. Here the hash and the program's inputs are kept from the first trace, as torch_xla's
own backend for torch.compile keeps them, but without Dynamo: what is traced is the model as it stands.
"""

from collections.abc import Callable, Iterable

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

from torch_rpa.bridge import run_pending

_XLAC = torch_xla._XLAC


class Replay:
    """One traced and compiled program.

    Args:
        trace: gives the results, lazily. Python values that it reads are fixed from then on.
        inputs: the tensors it reads that every run may replace, with data on the device.
        updated: tensors that it changes in place; their buffers are reused.
        constants: tensors it reads that stay the same objects, such as weights; each run reads their present values.
    """

    def __init__(
        self,
        trace: Callable[[], list[torch.Tensor]],
        inputs: list[torch.Tensor],
        updated: list[torch.Tensor],
        constants: Iterable[torch.Tensor],
    ) -> None:
        constants = list(constants)
        _materialise([*constants, *updated])
        xm.wait_device_ops()  # what is on its way has no buffer to be known by yet
        live = dict(zip(_buffers(updated), updated, strict=True))
        self._updated = updated
        self._donate()
        outputs = [*updated, *trace()]
        _, values = _XLAC._get_tensors_xla_device_data_node(outputs)
        buffers = _buffers(values)
        self._hash = _compile(outputs)
        # Nothing has run yet: what tracing updated gets the buffer back that it had.
        for buffer, value in zip(buffers, values, strict=True):
            if buffer in live:
                _XLAC._replace_xla_tensor(live[buffer], value)
        live.update(zip(_buffers(constants), constants, strict=True))
        # What is neither live nor an input is a constant that tracing made, such as a scalar.
        self._arguments = [live.get(buffer, value) for buffer, value in zip(buffers, values, strict=True)]
        self._live = [live[buffer] for buffer in buffers if buffer in live]
        # An input that the program does not read has no place among its arguments.
        self._places = [buffers.index(buffer) if buffer in buffers else None for buffer in _buffers(inputs)]

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Start the program with these inputs: its results. `updated` are up to date afterwards."""
        _materialise(self._live)
        self._donate()
        arguments = list(self._arguments)
        for place, tensor in zip(self._places, inputs, strict=True):
            if place is not None:
                arguments[place] = tensor
        outputs = _XLAC._run_cached_graph(self._hash, arguments)
        for tensor, output in zip(self._updated, outputs, strict=False):
            _XLAC._replace_xla_tensor(tensor, output)
        return outputs[len(self._updated) :]

    def _donate(self) -> None:
        for tensor in self._updated:
            _XLAC._set_buffer_donation(tensor, True)


def _buffers(tensors: list[torch.Tensor]) -> list[int]:
    """What each tensor's data is known by, as long as it stays. (Under SPMD tensor ids change when a program runs.)"""
    return _XLAC._get_tensors_handle(tensors)


def _compile(outputs: list[torch.Tensor]) -> int:
    """Compile the program of these lazy tensors without running it, with donated inputs; the hash it is found by."""
    with alias_with_buffer_donor_config():
        graph_hash = _XLAC._get_graph_hash(outputs)
        _XLAC._xla_warm_up_cache(outputs, [])
    return graph_hash


def _materialise(tensors: list[torch.Tensor]) -> None:
    """Run what is still pending on tensors that a program reads, such as weights that were just loaded."""
    needed = _XLAC._check_tensor_need_materialization(tensors)
    pending = [tensor for tensor, is_needed in zip(tensors, needed, strict=True) if is_needed]
    if pending:
        run_pending(pending)
