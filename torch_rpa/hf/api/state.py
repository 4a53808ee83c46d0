"""What `patch` keeps on a model: how to undo it, and the engine once it is needed."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from torch_rpa.hf.engine.config import EngineConfig
from torch_rpa.hf.engine.engine import Engine

_ATTRIBUTE = "_torch_rpa"


@dataclass
class PatchState:
    """Lives on the patched model itself, so that there is no global state.

    former_configs  the model's modules, each with the config it had before
    former_methods  methods of the engine's names that the user had put on the model
    hooks           on the model and its modules
    lock            held while the engine is used: it is not thread-safe
    has_manager     a manager's thread uses the engine, step by step
    """

    config: EngineConfig
    former_configs: list[tuple[torch.nn.Module, PreTrainedConfig]]
    former_methods: dict[str, Callable]
    hooks: list[RemovableHandle]
    engine: Engine | None = None
    has_manager: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __getstate__(self) -> dict:
        """A copy or a pickle of a patched model is patched too, with an engine, a cache and a lock of its own."""
        return {**vars(self), "engine": None, "has_manager": False, "lock": None}

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


@contextmanager
def exclusive_engine(model: PreTrainedModel) -> Iterator[Engine]:
    """The engine for one call at a time: requests of another thread would end up in this call's results.

    The model is in eval mode. RuntimeError while a manager runs on it.
    """
    state = state_of(model)
    with state.lock:
        if state.has_manager:
            raise RuntimeError("a manager runs on this model: give it the requests, or stop it first")
        model.eval()
        yield engine_of(model)
