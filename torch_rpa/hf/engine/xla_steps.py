"""The ways to run a step on an XLA device."""

from collections.abc import Callable
from functools import partial
from types import FunctionType

import numpy as np
import torch

from torch_rpa.bridges import ProgramEvicted, Programs
from torch_rpa.bridges.torch_xla.bridge import BRIDGE as bridge
from torch_rpa.bridges.torch_xla.replay import Replay
from torch_rpa.hf.engine.snapshot import ModelSnapshot
from torch_rpa.hf.engine.step import run_step
from torch_rpa.hf.model import linear

# A program can be evicted from PyTorch/XLA's cache again before it has run: by other code that compiles all the time.
MAX_TRACES = 3


class XlaSteps:
    """Runs `run_step` on an XLA device, in one of the ways of `EngineConfig.xla_step`; see `steps.Steps`."""

    def __init__(self, snapshot: ModelSnapshot, way: str, programs: Programs) -> None:
        self.snapshot = snapshot
        self.run = {"replay": self._replay, "lazy": self._trace, "openxla": self._compiled}[way]
        self._programs = programs
        self._kept: dict[tuple, Replay | Callable] = {}

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return bridge.upload(array, self.snapshot.device)

    def materialise(self, result: torch.Tensor) -> None:
        bridge.run_pending([result], self._programs)

    def _replay(self, layout, cache, inputs) -> list[torch.Tensor]:
        """Traced once for each layout, and again if PyTorch/XLA has evicted the program."""
        key = (layout, len(inputs))
        for _ in range(MAX_TRACES):
            if key not in self._kept:
                trace = partial(self._traced, layout, cache, inputs)
                self._kept[key] = Replay(trace, inputs, cache.layers, self.snapshot.tensors, self._programs)
            try:
                return self._kept[key].run(inputs)
            except ProgramEvicted as error:
                del self._kept[key]
                evicted = error
        raise evicted

    def _trace(self, layout, cache, inputs) -> list[torch.Tensor]:
        results = self._traced(layout, cache, inputs)
        bridge.run_pending([*cache.layers, *results], self._programs)
        return results

    def _traced(self, layout, cache, inputs) -> list[torch.Tensor]:
        with linear.on_device(self.snapshot.device):
            return run_step(self.snapshot.model, layout, cache, *inputs)

    def _compiled(self, layout, cache, inputs) -> list[torch.Tensor]:
        key = (layout, len(inputs))
        if key not in self._kept:
            self._kept[key] = torch.compile(_with_code_of_its_own(run_step), backend="openxla", dynamic=False)
            self._programs.add(key)  # which hash is its own, PyTorch/XLA's backend does not tell
        return self._kept[key](self.snapshot.model, layout, cache, *inputs)


def _with_code_of_its_own(function: FunctionType) -> FunctionType:
    """Dynamo counts recompilations by code object, and gives up after 8: more token buckets would never be compiled."""
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
