"""What `patch` keeps on a model: how to undo it, and the engine once it is needed."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from torch_rpa.hf.config import EngineConfig
from torch_rpa.hf.engine import Engine

_ATTRIBUTE = "_torch_rpa"


@dataclass
class PatchState:
    """Lives on the patched model itself, so that there is no global state.

    former_configs  the model's modules, each with the config it had before
    former_methods  methods of the engine's names that the user had put on the model
    hooks           on the model and its modules
    lock            held while requests run: the engine is not thread-safe
    """

    config: EngineConfig
    former_configs: list[tuple[torch.nn.Module, PreTrainedConfig]]
    former_methods: dict[str, Callable]
    hooks: list[RemovableHandle]
    engine: Engine | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __getstate__(self) -> dict:
        """A copy or a pickle of a patched model is patched too, with an engine, a cache and a lock of its own."""
        return {**vars(self), "engine": None, "lock": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, lock=threading.Lock())


def attach(model: PreTrainedModel, state: PatchState) -> None:
    model.__dict__[_ATTRIBUTE] = state


def detach(model: PreTrainedModel) -> PatchState:
    """Take the state off a patched model."""
    return model.__dict__.pop(_ATTRIBUTE)


def is_patched(model: PreTrainedModel) -> bool:
    return _ATTRIBUTE in model.__dict__


def state_of(model: PreTrainedModel) -> PatchState:
    """RuntimeError if the model is not patched."""
    state = model.__dict__.get(_ATTRIBUTE)
    if state is None:
        raise RuntimeError("this model is not patched: call torch_rpa.hf.patch(model) first")
    return state


def engine_of(model: PreTrainedModel) -> Engine:
    """The patched model's engine, for callers that want the tokens as they come (`engine.run()`)."""
    state = state_of(model)
    if state.engine is None:
        state.engine = Engine(model, state.config)
    return state.engine
