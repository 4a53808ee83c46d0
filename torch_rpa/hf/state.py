"""What `patch` keeps on a model: how to undo it, and the engine once it is needed."""

import copy
import threading
from dataclasses import dataclass, field

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from torch_rpa.hf.config import EngineConfig
from torch_rpa.hf.engine import Engine

_ATTRIBUTE = "_torch_rpa"


@dataclass
class PatchState:
    """Lives on the patched model itself, so that there is no global state.

    former_implementations  the model's own configs, each with the attention it had before
    lock                    held while requests run: the engine is not thread-safe
    """

    config: EngineConfig
    former_implementations: list[tuple[PreTrainedConfig, str | None]]
    hook: RemovableHandle
    engine: Engine | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __deepcopy__(self, memo: dict) -> "PatchState":
        """A deep copy of a patched model is patched too, with an engine, a cache and a lock of its own."""
        former, hook = copy.deepcopy((self.former_implementations, self.hook), memo)
        return PatchState(self.config, former, hook)


def attach(model: PreTrainedModel, state: PatchState) -> None:
    model.__dict__[_ATTRIBUTE] = state


def detach(model: PreTrainedModel) -> PatchState | None:
    """Take the state off the model; None if it is not patched."""
    return model.__dict__.pop(_ATTRIBUTE, None)


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
