"""The ways to run a step on an XLA device."""

import logging
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import TypeVar

import numpy as np
import torch

from torch_rpa.bridges import ProgramEvicted, Programs, TraceInterrupted
from torch_rpa.bridges.torch_xla.bridge import BRIDGE as bridge
from torch_rpa.bridges.torch_xla.replay import Replay, interruptible
from torch_rpa.hf.engine.batch import BatchLayout
from torch_rpa.hf.engine.snapshot import ModelSnapshot
from torch_rpa.hf.engine.step import run_step
from torch_rpa.hf.model import linear
from torch_rpa.hf.model.cache import PagedKVCache

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Other code of the process that computes and compiles all the time can get in the way of a trace more than once.
MAX_ATTEMPTS = 5


class XlaSteps:
    """Runs `run_step` on an XLA device, in one of the ways of `EngineConfig.xla_step`; see `steps.Steps`."""

    def __init__(self, snapshot: ModelSnapshot, way: str, programs: Programs) -> None:
        self.snapshot = snapshot
        self._way = {"replay": self._replay, "lazy": self._trace, "openxla": self._compiled}[way]
        self._programs = programs
        self._kept: dict[tuple, Replay | Callable] = {}

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return bridge.upload(array, self.snapshot.device)

    def run(self, layout: BatchLayout, cache: PagedKVCache, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return self._whatever_others_run(partial(self._way, layout, cache, inputs))

    def evaluate(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        def run(former_hash: object) -> torch.Tensor:
            result = function()
            bridge.run_pending([result], self._programs)
            return result

        return self._whatever_others_run(run)

    def _whatever_others_run(self, run: Callable[[object], T]) -> T:
        """Again, if other programs of the process have got in the way; a step writes the same when it runs again."""
        former_hash = None
        for attempt in range(MAX_ATTEMPTS):
            try:
                with interruptible():
                    return run(former_hash)
            except TraceInterrupted as error:
                former_hash, interruption = error.program_hash, error
            except ProgramEvicted as error:
                interruption = error
            logger.info("attempt %d at a step: %s", attempt + 1, interruption)
        raise interruption

    def _replay(self, layout, cache, inputs, former_hash) -> list[torch.Tensor]:
        """Traced once for each layout, and again if PyTorch/XLA has evicted the program."""
        key = (layout, len(inputs))
        if key not in self._kept:
            trace = partial(self._traced, layout, cache, inputs)
            tensors = self.snapshot.tensors
            self._kept[key] = Replay(trace, inputs, cache.layers, tensors, self._programs, former_hash)
        try:
            return self._kept[key].run(inputs)
        except ProgramEvicted:
            del self._kept[key]
            raise

    def _trace(self, layout, cache, inputs, former_hash) -> list[torch.Tensor]:
        results = self._traced(layout, cache, inputs)
        bridge.run_pending([*cache.layers, *results], self._programs)
        return results

    def _traced(self, layout, cache, inputs) -> list[torch.Tensor]:
        with linear.on_device(self.snapshot.device):
            return run_step(self.snapshot.model, layout, cache, *inputs)

    def _compiled(self, layout, cache, inputs, former_hash) -> list[torch.Tensor]:
        key = (layout, len(inputs))
        if key not in self._kept:
            self._kept[key] = torch.compile(_with_code_of_its_own(run_step), backend="openxla", dynamic=False)
            self._programs.add(key)  # which hash is its own, PyTorch/XLA's backend does not tell
        return self._kept[key](self.snapshot.model, layout, cache, *inputs)


def _with_code_of_its_own(function: FunctionType) -> FunctionType:
    """Dynamo counts recompilations by code object, and gives up after 8: more token buckets would never be compiled."""
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
