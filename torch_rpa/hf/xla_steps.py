"""The ways to run a step on an XLA device."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from torch_rpa.bridges.torch_xla.bridge import BRIDGE as bridge
from torch_rpa.bridges.torch_xla.replay import Replay
from torch_rpa.hf import linear
from torch_rpa.hf.batch import BatchLayout
from torch_rpa.hf.cache import PagedKVCache
from torch_rpa.hf.step import run_step


class XlaSteps:
    """Runs `run_step` on an XLA device, in one of the ways of `EngineConfig.xla_step`.

    num_compilations: XLA programs compiled here so far.
    """

    def __init__(self, model, way: str) -> None:
        self.num_compilations = 0
        self._function = partial(run_step, model)
        self._model = model
        self._way = {"replay": self._replay, "lazy": self._trace, "openxla": self._compiled}[way]
        self._programs: dict[tuple, Replay] = {}
        self._weights = self._weight_ids()

    def run(self, layout: BatchLayout, cache: PagedKVCache, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with self._counting_compilations():
            return self._way(layout, cache, inputs)

    def forget(self, *, unless_same_weights: bool = False) -> bool:
        """Trace anew: the cache is another one, or (looked up on demand) the model has other tensors than before, which
        is what comes back."""
        former, self._weights = self._weights, self._weight_ids()
        has_others = self._weights != former
        if has_others or not unless_same_weights:
            self._programs.clear()
        return has_others

    def _weight_ids(self) -> list[int]:
        return [id(tensor) for tensor in _tensors(self._model)]

    def materialise(self, tensor: torch.Tensor) -> None:
        """Run what this tensor still needs."""
        with self._counting_compilations():
            bridge.run_pending([tensor])

    @contextmanager
    def _counting_compilations(self) -> Iterator[None]:
        before, _ = bridge.compilations()
        yield
        self.num_compilations += bridge.compilations()[0] - before

    def _replay(self, layout, cache, inputs) -> list[torch.Tensor]:
        key = (layout, len(inputs))
        if key not in self._programs:
            trace = partial(self._traced, layout, cache, inputs)
            self._programs[key] = Replay(trace, inputs, cache.layers, _tensors(self._model))
        return self._programs[key].run(inputs)

    def _trace(self, layout, cache, inputs) -> list[torch.Tensor]:
        results = self._traced(layout, cache, inputs)
        bridge.run_pending([*cache.layers, *results])
        return results

    def _traced(self, layout, cache, inputs) -> list[torch.Tensor]:
        with linear.on_device(self._model.device):
            return self._function(layout, cache, *inputs)

    def _compiled(self, layout, cache, inputs) -> list[torch.Tensor]:
        key = (layout, len(inputs))
        if key not in self._programs:
            self._programs[key] = torch.compile(self._function, backend="openxla", dynamic=False)
        return self._programs[key](layout, cache, *inputs)


def _tensors(model) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
