"""Choosing the next token on the device, from logits and per-sequence parameters."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence samples; a greedy one is SamplingParams(top_k=1).

    temperature > 0 divides the logits; top_k keeps the k most likely tokens (0: all); top_p keeps the
    smallest set of most likely tokens whose probabilities sum to at least top_p (1.0: all). Raises ValueError
    when out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not self.temperature > 0:
            problems.append(f"temperature={self.temperature!r} must be positive (do_sample=False is greedy)")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            problems.append(f"top_k={self.top_k!r} must be a whole number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p!r} must be above 0 and at most 1")
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))


GREEDY = SamplingParams(top_k=1)


def pack_sampling(params: list[SamplingParams], uniforms: list[float], max_num_seqs: int) -> np.ndarray:
    """float32 [4, max_num_seqs]: temperature, top_k, top_p, and one uniform number in [0, 1) for each sequence."""
    packed = np.empty((4, max_num_seqs), np.float32)
    packed[:] = [[1.0], [1.0], [1.0], [0.0]]  # rows of no sequence are greedy
    for row, (param, uniform) in enumerate(zip(params, uniforms, strict=True)):
        packed[:, row] = param.temperature, param.top_k, param.top_p, uniform
    return packed


def sample_greedy(logits: torch.Tensor) -> torch.Tensor:
    """logits [seqs, vocab] -> the most likely token of each sequence, int32 [seqs]."""
    return logits.argmax(-1).to(torch.int32)


def sample(logits: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """logits [seqs, vocab] and `pack_sampling`'s array on their device -> sampled tokens, int32 [seqs].

    Temperature, then top-k, then top-p, as transformers' warpers do it, then the inverse of the cumulative
    distribution at the given uniform number. There is no generator on the device, so a sequence's token
    depends on its own logits and its own number only.
    """
    uniform = packed[3][:, None]
    probs, token_ids = filtered_probs(logits, packed)
    cumulative = probs.cumsum(-1)
    # u * total rather than u: the kept probabilities need not sum to one. The last kept token catches
    # rounding.
    rank = (cumulative <= uniform * cumulative[:, -1:]).sum(-1, keepdim=True)
    last_kept = ((probs > 0).sum(-1, keepdim=True) - 1).clamp(min=0)  # NaN logits keep none
    return token_ids.gather(-1, torch.minimum(rank, last_kept))[:, 0].to(torch.int32)


def filtered_probs(logits: torch.Tensor, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, zero where filtered out, and token ids), both [seqs, vocab], the most likely token first."""
    temperature, top_k, top_p, _ = packed[:, :, None].unbind(0)
    scores, token_ids = (logits.float() / temperature).sort(dim=-1, descending=True, stable=True)
    vocab_size = logits.shape[-1]
    kth = torch.where(top_k < 1, vocab_size, top_k).clamp(max=vocab_size).long() - 1
    # Tokens that tie with the k-th stay, as in TopKLogitsWarper.
    probs = torch.where(scores >= scores.gather(-1, kth), scores, -torch.inf).softmax(-1)
    mass_before = probs.cumsum(-1) - probs
    keep = (mass_before < top_p) | (top_p >= 1)
    return torch.where(keep, probs, 0.0), token_ids
