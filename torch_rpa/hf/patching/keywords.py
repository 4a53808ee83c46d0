"""Hand rpa_batch on where a decoder layer takes it and does not give it to its attention."""

import torch
from torch.utils.hooks import RemovableHandle

# Decoder layers that drop the keywords they do not know -> the name of the attention in them.
LAYERS_THAT_DROP_KEYWORDS = {"StableLmDecoderLayer": "self_attn"}
_ATTRIBUTE = "_torch_rpa_batch"


def add_hooks(model: torch.nn.Module) -> list[RemovableHandle]:
    """Two hooks for each such layer of the model, so that the batch arrives as it does in other families."""
    hooks = []
    for layer in model.modules():
        if (name := LAYERS_THAT_DROP_KEYWORDS.get(type(layer).__name__)) is not None:
            hooks.append(layer.register_forward_pre_hook(_leave_batch, with_kwargs=True))
            hooks.append(getattr(layer, name).register_forward_pre_hook(_take_batch, with_kwargs=True))
    return hooks


def _leave_batch(layer: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    attention = getattr(layer, LAYERS_THAT_DROP_KEYWORDS[type(layer).__name__])
    attention.__dict__[_ATTRIBUTE] = kwargs.get("rpa_batch")


def _take_batch(attention: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, "rpa_batch": attention.__dict__.pop(_ATTRIBUTE, None)}
