"""What `patch` keeps on a model to undo itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from torch_rpa.hf.api.gate import attach_gate, detach_gate
from torch_rpa.hf.engine.config import EngineConfig

_ATTRIBUTE = "_torch_rpa"


@dataclass(frozen=True)
class PatchState:
    """Lives on the patched model itself, beside its engine's gate, so that there is no global state.

    former_configs  the model's modules, each with the config it had before
    former_methods  methods of the engine's names that the user had put on the model
    hooks           on the model and its modules
    """

    former_configs: list[tuple[torch.nn.Module, PreTrainedConfig]]
    former_methods: dict[str, Callable]
    hooks: list[RemovableHandle]


def attach(model: PreTrainedModel, state: PatchState, config: EngineConfig) -> None:
    model.__dict__[_ATTRIBUTE] = state
    attach_gate(model, config)


def detach(model: PreTrainedModel) -> PatchState:
    """Take the state and the gate off a patched model."""
    detach_gate(model)
    return model.__dict__.pop(_ATTRIBUTE)


def is_patched(model: PreTrainedModel) -> bool:
    return _ATTRIBUTE in model.__dict__
