"""Mixture-of-experts layers with static shapes, for XLA.

transformers' implementations cut each step's rows by the expert they go to ("eager", "grouped_mm"), which compiles anew
for every routing, or gather one copy of an expert's weights for every row that it gets ("batched_mm"), which for a real
model is gigabytes a step. Here every expert sees every row and the routing weights, mostly zero, pick. That reads each
weight once, as a decode step of a few dozen rows does anyway, and costs num_experts / top_k times the arithmetic.
"""

from functools import partial

import torch

from torch_rpa.hf._transformers import ALL_EXPERTS_FUNCTIONS


def register(former: str) -> str:
    """The name of an implementation that is `all_experts` on XLA tensors and `former` on others."""
    name = f"torch_rpa_or_{former}"
    ALL_EXPERTS_FUNCTIONS.register(name, partial(_forward, former))
    return name


def _forward(former: str, module: torch.nn.Module, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    if hidden_states.device.type == "xla":
        return all_experts(module, hidden_states, *routing)
    eager = type(module).forward.__wrapped__  # under the wrapper that looks implementations up
    return ALL_EXPERTS_FUNCTIONS.get_interface(former, eager)(module, hidden_states, *routing)


def all_experts(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
    top_k_index: torch.Tensor,  # [num_tokens, top_k]
    top_k_weights: torch.Tensor,  # as top_k_index
) -> torch.Tensor:
    """The sum over each row's top_k experts, as transformers' have it: [num_tokens, hidden_size], the input's dtype."""
    num_tokens, num_experts = len(hidden_states), module.num_experts
    weights = hidden_states.new_zeros(num_tokens, num_experts, dtype=torch.float32)
    weights = weights.scatter(1, top_k_index, top_k_weights.float())
    rows = hidden_states.expand(num_experts, -1, -1)
    gated = module._apply_gate(_linear(module, "gate_up_proj", rows))
    outs = _linear(module, "down_proj", gated)  # [num_experts, num_tokens, hidden_size]
    weights = weights.T[:, :, None]
    # Not a plain product: an expert may overflow on rows that it was never meant for, and 0 * inf = NaN.
    return torch.where(weights != 0, outs * weights, 0).sum(0).to(hidden_states.dtype)


def _linear(module: torch.nn.Module, name: str, rows: torch.Tensor) -> torch.Tensor:
    """Each expert's projection of its rows: [num_experts, num_tokens, in] -> [num_experts, num_tokens, out]."""
    weight = getattr(module, name)
    out = torch.bmm(rows, weight if module.is_transposed else weight.mT)
    return out + getattr(module, f"{name}_bias")[:, None] if module.has_bias else out


# At import, so that a patched model finds them that was pickled in another process.
for _former in ("eager", *list(ALL_EXPERTS_FUNCTIONS)):
    register(_former)
