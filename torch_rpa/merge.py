"""Attention over parts of the keys, put together."""

from collections.abc import Sequence

import torch


def merge_attention_states(
    outs: torch.Tensor | Sequence[torch.Tensor], lses: torch.Tensor | Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys, from attention over disjoint parts of them.

        lse = log(sum_i exp(lse_i))        out = sum_i exp(lse_i - lse) * out_i

    Each part is what ``torch.ops.rpa.ragged_paged_attention_with_lse`` gives for the same rows and some of the keys: a
    chip's share of a long context, or a prefix that many sequences share (cascade attention). A part in which a row
    sees no key (lse = -inf) leaves that row to the others. Give ``sinks`` to one part only.

    The method is that of flash decoding (https://pytorch.org/blog/flash-decoding).

    Args:
        outs: the parts' results [num_tokens, num_q_heads, head_dim], all of one shape and dtype; a sequence, or one
            tensor with the parts along its first dimension.
        lses: their lse, float32 [num_tokens, num_q_heads], in the same way.

    Returns:
        out, as the parts', summed in float32, and lse, float32. Rows that see no key in any part: zeros, -inf.

    Raises:
        ValueError: no part, not as many lses as outs, or shapes that differ.
    """
    outs, lses = _stacked("outs", outs), _stacked("lses", lses)
    if outs.shape[:-1] != lses.shape:
        raise ValueError(f"lses must be {list(outs.shape[:-1])} like outs without head_dim, got {list(lses.shape)}")
    # Asked of each: the largest of nothing but -inf is the smallest finite number in TorchTPU 0.2.0.
    sees_some = (lses > -torch.inf).any(dim=0)
    top = lses.amax(dim=0).where(sees_some, 0.0)
    weights = torch.exp(lses - top)
    total = weights.sum(dim=0).where(sees_some, 1.0)
    out = (outs.float() * (weights / total).unsqueeze(-1)).sum(dim=0)
    return out.to(outs.dtype), (top + torch.log(total)).where(sees_some, -torch.inf)


def _stacked(name, parts):
    """The parts along a new first dimension."""
    if len(parts) == 0:
        raise ValueError(f"{name} must have at least one part, got none")
    for i, part in enumerate(parts):
        if part.shape != parts[0].shape:
            raise ValueError(f"{name}[{i}] must be {list(parts[0].shape)} like {name}[0], got {list(part.shape)}")
    return parts if isinstance(parts, torch.Tensor) else torch.stack(tuple(parts))
