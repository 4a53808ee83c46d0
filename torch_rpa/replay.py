"""A program of PyTorch/XLA that is traced once and then run again and again, without tracing.

Lazy tensors trace every step anew only to find, by a hash, the program that they compiled before. For a model that
costs tens of milliseconds a step. Here the hash and the program's inputs are kept from the first trace, as torch_xla's
own backend for torch.compile keeps them, but without Dynamo: what is traced is the model as it stands.
"""

from collections.abc import Callable, Iterable

import torch
import torch_xla
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
        live = {_XLAC._xla_get_tensor_id(tensor): tensor for tensor in (*constants, *updated)}
        input_ids = [_XLAC._xla_get_tensor_id(tensor) for tensor in inputs]
        self._updated = updated
        self._donate()
        outputs = [*updated, *trace()]
        ids, values = _XLAC._get_tensors_xla_device_data_node(outputs)
        self._hash = _compile(outputs)
        self._undo_updates(live, dict(zip(ids, values, strict=True)))
        # What is neither live nor an input is a constant that tracing made, such as a scalar.
        self._arguments = [live.get(key, value) for key, value in zip(ids, values, strict=True)]
        self._live = [live[key] for key in ids if key in live]
        # An input that the program does not read has no place among its arguments.
        self._places = [ids.index(key) if key in ids else None for key in input_ids]

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

    def _undo_updates(self, live: dict[int, torch.Tensor], values: dict[int, torch.Tensor]) -> None:
        """Nothing has run yet: give the tensors that tracing updated the buffers back that they had."""
        updated = {id(tensor) for tensor in self._updated}
        for key, tensor in live.items():
            if id(tensor) in updated and key in values:
                _XLAC._replace_xla_tensor(tensor, values[key])


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
