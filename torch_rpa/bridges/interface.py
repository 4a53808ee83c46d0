"""What every bridge offers to the ops, the engine and the commands."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch

# A served model has a handful of configurations: one for each token bucket and kind of layer.
MAX_LOWERED_CALLS = 256
# Of hashes that `Programs` keeps: as many as PyTorch/XLA keeps programs, unless told otherwise.
_MAX_PROGRAMS = 2048


class ProgramEvicted(RuntimeError):
    """The device's cache of programs has dropped one that was to be run again: trace it anew. Nothing has run."""


class Interrupted(RuntimeError):
    """Another thread ran what was pending in the process, parts of this computation among it, and what the computation
    was to update may be lost: compute it again, with that made anew."""


class TraceInterrupted(Interrupted):
    """The same while a program was traced, and nothing is lost: trace it again.

    program_hash: of the trace.
    """

    def __init__(self, program_hash: object) -> None:
        super().__init__("another thread ran what was pending in the process while a program was traced")
        self.program_hash = program_hash


class Programs:
    """How many programs were compiled for one owner, such as an engine, whatever else the process compiles meanwhile.

    Programs are told apart by the hash that the device keeps them by.

    count: programs so far; one that the device dropped and compiled again counts again.
    """

    def __init__(self, max_programs: int = _MAX_PROGRAMS) -> None:
        self.count = 0
        self._max_programs = max_programs
        self._hashes: OrderedDict[object, None] = OrderedDict()

    def add(self, program_hash: object) -> None:
        """A program that is run, or kept to be run."""
        if program_hash not in self._hashes:
            self.count += 1
        self._hashes[program_hash] = None
        self._hashes.move_to_end(program_hash)
        if len(self._hashes) > self._max_programs:
            self._hashes.popitem(last=False)

    def forget(self, program_hash: object) -> None:
        """The device has dropped it."""
        self._hashes.pop(program_hash, None)


class Bridge(ABC):
    """One way to a device. Bridges have no state of their own: there is one of each in a process."""

    @abstractmethod
    def call(self, op: str, args: dict[str, torch.Tensor], options: dict) -> list[torch.Tensor]:
        """Call ``torch_rpa.kernels``' function ``op``.

        Args:
            op: name of the function.
            args: its tensors by argument name, on the device.
            options: fields of ``AttentionOptions`` by name; the default for those left out.

        Returns:
            The function's results, as tensors on the device.

        Raises:
            ValueError, TypeError, NotImplementedError: from the static checks.
        """

    @abstractmethod
    def prepare_update(self, kv_pages: torch.Tensor, *, is_traced: bool) -> tuple[Callable, torch.Tensor]:
        """For the in-place op, which is a functional op and then ``kv_pages.copy_``: the functional op, and the pages
        to give it so that the result takes their buffer.

        Args:
            is_traced: they are fake tensors of torch.compile or torch.export.
        """

    @abstractmethod
    def device_kind(self) -> str:
        """What stands behind the device, as JAX names it: "cpu" or "tpu".

        Raises:
            NotImplementedError: neither of them.
        """

    @abstractmethod
    def chip_name(self) -> str | None:
        """The TPU behind the device, as ``torch_rpa.kernels`` names it ("v6e"); None off TPU, and if not known."""

    @abstractmethod
    def free_memory_bytes(self, device: torch.device) -> int | None:
        """Bytes of the device's memory that nothing takes yet; None where it does not tell."""

    @abstractmethod
    def head_sharding(self):
        """How heads are shared out over chips here, a ``torch_rpa.sharding.HeadSharding``; None if they are not."""

    @abstractmethod
    def zeros_pages(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Zeroed pages with a buffer of their own on the device, or on each chip a part of them."""

    @abstractmethod
    def upload(self, data: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
        """An array, or a CPU tensor, on the device: sent at once, so that it hangs on no program that another thread
        may run. Neither may be changed afterwards."""

    @abstractmethod
    def run_pending(self, tensors: list[torch.Tensor], programs: Programs | None = None) -> None:
        """Run what these tensors still need, as one program, which is added to ``programs``; tensors that were updated
        in place go first."""

    @abstractmethod
    def compilations(self) -> tuple[int, float]:
        """How many programs were compiled for the device in this process so far, and how many seconds that took."""
