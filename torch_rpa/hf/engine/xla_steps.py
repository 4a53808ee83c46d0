"""The ways to run a step on an XLA device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType

import numpy as np
import torch

from torch_rpa import bridge
from torch_rpa.hf.engine.batch import BatchLayout
from torch_rpa.hf.engine.snapshot import ModelSnapshot
from torch_rpa.hf.engine.step import run_step
from torch_rpa.hf.model import linear
from torch_rpa.hf.model.cache import PagedKVCache
from torch_rpa.replay import ProgramEvicted, Replay

# A program can be evicted from PyTorch/XLA's cache again before it has run: by other code that compiles all the time.
MAX_TRACES = 3


class XlaSteps:
    """Runs `run_step` on an XLA device, in one of the ways of `EngineConfig.xla_step`; see `steps.Steps`."""

    def __init__(self, snapshot: ModelSnapshot, way: str) -> None:
        self.num_compilations = 0
        self._way = {"replay": self._replay, "lazy": self._trace, "openxla": self._compiled}[way]
        self.snapshot = snapshot
        self._programs: dict[tuple, Replay | Callable] = {}

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return bridge.upload(torch.from_numpy(array), self.snapshot.device)

    def run(self, layout: BatchLayout, cache: PagedKVCache, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with self._counting_compilations():
            return self._way(layout, cache, inputs)

    def materialise(self, result: torch.Tensor) -> None:
        with self._counting_compilations():
            bridge.run_pending([result])

    @contextmanager
    def _counting_compilations(self) -> Iterator[None]:
        before, _ = bridge.compilations()
        yield
        self.num_compilations += bridge.compilations()[0] - before

    def _replay(self, layout, cache, inputs) -> list[torch.Tensor]:
        """Traced once for each layout, and again if PyTorch/XLA has evicted the program."""
        key = (layout, len(inputs))
        for _ in range(MAX_TRACES):
            if key not in self._programs:
                trace = partial(self._traced, layout, cache, inputs)
                self._programs[key] = Replay(trace, inputs, cache.layers, self.snapshot.tensors)
            try:
                return self._programs[key].run(inputs)
            except ProgramEvicted as error:
                del self._programs[key]
                evicted = error
        raise evicted

    def _trace(self, layout, cache, inputs) -> list[torch.Tensor]:
        results = self._traced(layout, cache, inputs)
        bridge.run_pending([*cache.layers, *results])
        return results

    def _traced(self, layout, cache, inputs) -> list[torch.Tensor]:
        with linear.on_device(self.snapshot.device):
            return run_step(self.snapshot.model, layout, cache, *inputs)

    def _compiled(self, layout, cache, inputs) -> list[torch.Tensor]:
        key = (layout, len(inputs))
        if key not in self._programs:
            self._programs[key] = torch.compile(_with_code_of_its_own(run_step), backend="openxla", dynamic=False)
        return self._programs[key](self.snapshot.model, layout, cache, *inputs)


def _with_code_of_its_own(function: FunctionType) -> FunctionType:
    """Dynamo counts recompilations by code object, and gives up after 8: more token buckets would never be compiled."""
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
