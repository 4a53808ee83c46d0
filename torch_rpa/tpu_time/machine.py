"""What a scalar program changes: registers, scalar memory, semaphores, and what is under way between memories."""

import math
from collections import defaultdict, deque
from dataclasses import dataclass

import numpy as np

GRANULE_BYTES = 32
_WORD_BYTES = 4
# Where an operand is made to begin: its number, in granules.
_OPERAND_SHIFT = 22


@dataclass(frozen=True)
class Timing:
    """Of one TensorCore.

    Attributes:
        clock_hz, hbm_bytes_per_s: published, or derived from the published peak.
        dma_latency_s: from the start of a DMA to its first byte, fitted on v5e.
        dma_cycles: of the HBM channel for each DMA whatever its size; a guess.
        branch_delay: bundles after a branch that are still issued.
    """

    clock_hz: float
    hbm_bytes_per_s: float
    dma_latency_s: float = 0.43e-6
    dma_cycles: int = 8
    branch_delay: int = 4

    @property
    def latency_cycles(self) -> int:
        return round(self.dma_latency_s * self.clock_hz)

    @property
    def granule_cycles(self) -> float:
        return GRANULE_BYTES * self.clock_hz / self.hbm_bytes_per_s


class Machine:
    """The state of one run.

    Attributes:
        registers: 32 scalar ones, then predicates.
        issued: bundles so far; waited: cycles spent waiting for DMAs.
        takes_branch: whether the branch under way will be taken.
    """

    def __init__(self, timing: Timing, scalars: list[np.ndarray]) -> None:
        self.registers = [0] * 64
        self.smem: dict[int, int] = {}
        self.results = deque()  # of reads of semaphores
        self.divided: dict[str, deque[int]] = defaultdict(deque)  # results of divisions that nobody has taken yet
        self.issued = self.waited = 0
        self.takes_branch = False
        self.hbm_bytes = 0
        self._timing, self._scalars = timing, [np.asarray(x).reshape(-1) for x in scalars]
        self._counts: dict[int, int] = defaultdict(int)
        self._under_way: dict[int, deque] = defaultdict(deque)  # semaphore -> (cycle when done, granules)
        self._channel_free = 0.0

    @property
    def now(self) -> int:
        return self.issued + self.waited

    def operand_granule(self, index: int) -> int:
        """The address that operand ``index`` is made to stand at."""
        return (index + 1) << _OPERAND_SHIFT

    def scalar(self, index: int) -> int:
        """The value of an operand that is passed in a register."""
        return int(self._scalars[index][0]) & 0xFFFFFFFF

    def start_dma(self, source: str, target: str, source_address: int, address: int, granules: int, flag: int) -> None:
        """Move so many granules; addresses count granules, in SMEM words."""
        done = self.now + self._timing.latency_cycles
        if "hbm" in (source, target):
            done = max(done, self._channel_free) + self._timing.dma_cycles + granules * self._timing.granule_cycles
            self._channel_free = done
            self.hbm_bytes += granules * GRANULE_BYTES
        if target == "smem":
            self._fill_smem(source_address, address, granules)
        self._under_way[flag].append((math.ceil(done), granules))

    def wait(self, flag: int, count: int) -> None:
        """Until the semaphore has this count. Raises RuntimeError if it never will."""
        self._settle(flag)
        while self._counts[flag] < count:
            if not self._under_way[flag]:
                raise RuntimeError(f"the kernel waits for semaphore {flag}, and nothing is under way")
            done, granules = self._under_way[flag].popleft()
            self._counts[flag] += granules
            self.waited += max(0, done - self.now)

    def add(self, flag: int, amount: int) -> None:
        """To a semaphore; the amount is a 32-bit word, maybe negative."""
        self._settle(flag)
        self._counts[flag] += amount - (amount >> 31 << 32)

    def set(self, flag: int, value: int) -> None:
        self._settle(flag)
        self._counts[flag] = value

    def read(self, flag: int) -> None:
        self._settle(flag)
        self.results.append(self._counts[flag])

    def check_end(self) -> None:
        """Raise RuntimeError if something is still under way: the model went another way than the kernel does."""
        left = sum(len(queue) for flag, queue in self._under_way.items() if not self._settle(flag) and queue)
        if left:
            raise RuntimeError(f"the kernel ended with {left} DMAs that nobody waited for")

    def _settle(self, flag: int) -> None:
        queue, now = self._under_way[flag], self.now
        while queue and queue[0][0] <= now:
            self._counts[flag] += queue.popleft()[1]

    def _fill_smem(self, source_address: int, address: int, granules: int) -> None:
        index, offset = divmod(source_address, 1 << _OPERAND_SHIFT)
        if not 0 < index <= len(self._scalars):
            raise ValueError(f"the kernel reads operand {index - 1} as scalars; {len(self._scalars)} were given")
        words = GRANULE_BYTES // _WORD_BYTES
        values = self._scalars[index - 1][offset * words : (offset + granules) * words]
        self.smem.update((address + i, int(value) & 0xFFFFFFFF) for i, value in enumerate(values))
