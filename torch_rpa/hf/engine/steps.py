"""Who runs a step on which device: the one place that tells devices apart."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from torch_rpa.bridges import Programs
from torch_rpa.hf.engine.batch import BatchLayout
from torch_rpa.hf.engine.config import EngineConfig
from torch_rpa.hf.engine.snapshot import ModelSnapshot
from torch_rpa.hf.engine.step import run_step
from torch_rpa.hf.model import linear
from torch_rpa.hf.model.cache import PagedKVCache


class Steps(Protocol):
    """Runs steps on one snapshot of a model and one cache; its programs are kept from step to step."""

    snapshot: ModelSnapshot

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """The array on the model's device; nothing is pending on it."""

    def run(self, layout: BatchLayout, cache: PagedKVCache, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """`run_step`: its results, on the device; the cache is updated in place."""

    def evaluate(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What a function of results gives."""


class EagerSteps:
    """Op by op, as on CPU tensors: nothing is compiled, and nothing is kept."""

    def __init__(self, snapshot: ModelSnapshot) -> None:
        self.snapshot = snapshot

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.snapshot.device)

    def run(self, layout: BatchLayout, cache: PagedKVCache, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with linear.on_device(self.snapshot.device):
            return run_step(self.snapshot.model, layout, cache, *inputs)

    def evaluate(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        return function()


def compiles(device: torch.device) -> bool:
    """Whether steps on this device are compiled programs, so that other sizes would be other programs."""
    return device.type == "xla"


def steps_for(snapshot: ModelSnapshot, config: EngineConfig, programs: Programs) -> Steps:
    """The steps of the snapshot's device; what they compile is counted in `programs`."""
    if not compiles(snapshot.device):
        return EagerSteps(snapshot)
    from torch_rpa.hf.engine.xla_steps import XlaSteps  # imports torch_xla

    return XlaSteps(snapshot, config.xla_step, programs)
