"""What each attention layer of a model asks for, recorded from the model's own forward: no list of options by class."""

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, PreTrainedModel

_NAME = "torch_rpa_recorder"


@dataclass(frozen=True)
class AttentionCall:
    """What one layer asked its attention for."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    sliding_window: int | None
    softcap: float | None
    sinks: bool

    @property
    def has_own_scaling(self) -> bool:
        return abs(self.scaling - self.head_dim**-0.5) > 1e-6


def attention_calls(model: PreTrainedModel) -> list[AttentionCall]:
    """One for each layer, in order, from a forward over three tokens.

    The model is left with an attention implementation that computes nothing. It may stand on the meta device.
    """
    calls = []

    def record(module, query, key, value, attention_mask, scaling, sliding_window=None, softcap=None, s_aux=None, **_):
        _, num_q_heads, num_tokens, head_dim = query.shape
        calls.append(
            AttentionCall(num_q_heads, key.shape[1], head_dim, scaling, sliding_window, softcap, s_aux is not None)
        )
        return query.new_zeros(1, num_tokens, num_q_heads, head_dim), None

    AttentionInterface.register(_NAME, record)
    model.set_attn_implementation(_NAME)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]], device=model.device), use_cache=False)
    return calls
