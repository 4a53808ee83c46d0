"""`patch` for a whole class: each model of it is patched when a method of the engine is first called on it."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakSet

from transformers import PreTrainedModel

from torch_rpa.hf.api.gate import gate_of
from torch_rpa.hf.patching.state import is_patched
from torch_rpa.hf.patching.support import require_supported_class

_ATTRIBUTE = "_torch_rpa_class"


@dataclass
class ClassPatch:
    """Lives on the patched class: its own former methods by name, and the models patched for it."""

    former_methods: dict[str, Callable]
    models: WeakSet[PreTrainedModel] = field(default_factory=WeakSet)
    lock: threading.Lock = field(default_factory=threading.Lock)


def patch_class(model_class: type, methods: dict[str, Callable], patch_model: Callable) -> None:
    """Put `methods` on the class; each first calls `patch_model` on a model that is not patched yet.

    `patch_model` refuses, at that call, what only the model's config shows.
    """
    require_supported_class(model_class)
    state = ClassPatch({name: vars(model_class)[name] for name in methods if name in vars(model_class)})
    setattr(model_class, _ATTRIBUTE, state)
    for name, method in methods.items():
        setattr(model_class, name, _patching_first(method, patch_model, state))


def unpatch_class(model_class: type, methods: dict[str, Callable], unpatch_model: Callable) -> None:
    """Take the methods off the class again, and undo `patch_model` for the models that it was called on."""
    state = vars(model_class).get(_ATTRIBUTE)
    if state is None:
        return
    models = list(state.models)
    for model in models:
        gate_of(model).require_no_session("unpatch")
    delattr(model_class, _ATTRIBUTE)
    for name in methods:
        delattr(model_class, name)
        if name in state.former_methods:
            setattr(model_class, name, state.former_methods[name])
    for model in models:
        unpatch_model(model)


def _patching_first(method: Callable, patch_model: Callable, state: ClassPatch) -> Callable:
    @functools.wraps(method)
    def call(model: PreTrainedModel, *args, **kwargs):
        with state.lock:
            if not is_patched(model):
                patch_model(model)
                state.models.add(model)
        return method(model, *args, **kwargs)

    return call
