"""Choosing the next token on the device, from logits and per-sequence parameters, without sorting the vocabulary.

One step's parameters are two arrays, whose sizes never change, so that every step of a token bucket that samples is
the same program, whatever its requests ask for:

    numbers  float32 [S, 6]     do_sample, temperature, top_k, top_p, repetition_penalty, uniform
    bitmaps  int32 [S, 2, W]    tokens seen so far, tokens forbidden now

S = sequences in the step, V the size of the vocabulary, W = words of 32 tokens in it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from torch_rpa.options import LARGEST_FLOAT32, SMALLEST_FLOAT32

# What top_k and top_p keep is nearly always among so many of the most likely tokens; `sample` says where it is not.
NUM_CANDIDATES = 1024
UNDECIDED = -1
_POSITIVE = "above 0 and in float32's range (from 1.2e-38 to 3.4e38)"


def _is_positive_float32(value: float) -> bool:
    """A smaller one would be 0 on the device, a larger one infinite."""
    return SMALLEST_FLOAT32 <= value <= LARGEST_FLOAT32


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence chooses its tokens.

    repetition_penalty > 0 divides the positive logits of tokens seen so far, prompt included, and multiplies the
    negative ones. Without do_sample the most likely token is taken then; otherwise temperature > 0 divides the logits;
    top_k keeps the k most likely tokens (0: all); top_p keeps the smallest set of most likely tokens whose
    probabilities sum to at least top_p (1.0: all). Tokens that tie with the last one kept stay. Raises ValueError when
    out of range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not _is_positive_float32(self.temperature):
            problems.append(f"temperature={self.temperature!r} must be {_POSITIVE}; for greedy write do_sample=False")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            problems.append(f"top_k={self.top_k!r} must be a whole number of tokens; for all of them write top_k=0")
        if not _is_positive_float32(self.top_p) or self.top_p > 1:
            problems.append(f"top_p={self.top_p!r} must be {_POSITIVE}, and at most 1")
        if not _is_positive_float32(self.repetition_penalty):
            problems.append(f"repetition_penalty={self.repetition_penalty!r} must be {_POSITIVE}")
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))


GREEDY = SamplingParams()


class TokenSet:
    """Token ids as a bitmap: bit t % 32 of word t // 32."""

    def __init__(self, vocab_size: int, token_ids: Iterable[int] = ()) -> None:
        self.words = np.zeros(-(-vocab_size // 32), np.uint32)
        self.update(token_ids)

    def update(self, token_ids: Iterable[int]) -> None:
        ids = np.fromiter(token_ids, np.uint32)
        np.bitwise_or.at(self.words, ids >> 5, np.uint32(1) << (ids & np.uint32(31)))


@dataclass(frozen=True)
class SampleRow:
    """One sequence's part of a step: its parameters, a uniform number in [0, 1), and the bitmaps it needs."""

    params: SamplingParams = GREEDY
    uniform: float = 0.0
    seen: TokenSet | None = None
    forbidden: TokenSet | None = None


@dataclass(frozen=True)
class SampleInputs:
    """On the device: float32 [S, 1] each, and the bitmaps as bool [S, V]."""

    do_sample: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    repetition_penalty: torch.Tensor
    uniform: torch.Tensor
    seen: torch.Tensor
    forbidden: torch.Tensor


def pack_sampling(rows: list[SampleRow], num_seqs: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """numbers and bitmaps, new ones each time: an upload may still be reading the last. Without a row: greedy."""
    numbers = np.zeros((num_seqs, 6), np.float32)
    bitmaps = np.zeros((num_seqs, 2, -(-vocab_size // 32)), np.uint32)
    numbers[:] = 0.0, 1.0, 0.0, 1.0, 1.0, 0.0
    for index, row in enumerate(rows):
        params = row.params
        numbers[index, 4] = params.repetition_penalty
        if params.do_sample:
            numbers[index, :4] = 1.0, params.temperature, min(params.top_k, vocab_size), params.top_p
            numbers[index, 5] = row.uniform
        for bitmap, tokens in zip(bitmaps[index], (row.seen, row.forbidden), strict=True):
            if tokens is not None:
                bitmap[:] = tokens.words
    return numbers, bitmaps.view(np.int32)


def unpack_sampling(numbers: torch.Tensor, bitmaps: torch.Tensor, vocab_size: int) -> SampleInputs:
    """The arrays on the device -> their parts."""
    # Masks, for PyTorch/XLA's >> is a division, wrong for words with their highest bit set.
    bits = torch.arange(32, dtype=torch.int32, device=bitmaps.device)
    masks = torch.ones_like(bits) << bits
    tokens = (bitmaps[..., None] & masks).flatten(2)[..., :vocab_size] != 0
    return SampleInputs(*numbers.split(1, dim=1), *tokens.unbind(1))


def sample_greedy(logits: torch.Tensor) -> torch.Tensor:
    """logits [S, V] -> float32 [2, S]: the most likely token of each sequence, and its log probability."""
    logits = logits.float()
    return _result(logits, logits.argmax(-1, keepdim=True), logits.logsumexp(-1, keepdim=True))


def sample(logits: torch.Tensor, inputs: SampleInputs, num_candidates: int = NUM_CANDIDATES) -> torch.Tensor:
    """logits [S, V] -> float32 [2, S]: the sampled tokens, and their log probabilities.

    A token is UNDECIDED where num_candidates are too few to tell what top_k and top_p keep: sample again with the
    whole vocabulary. Penalty, temperature, top-k and top-p follow each other as transformers' processors do; a log
    probability is of the distribution that they leave. The token is where the cumulative distribution, in the order of
    token ids, passes the uniform number: there is no generator on the device, so a sequence's token depends on its own
    logits and its own number only.
    """
    scores, weights, is_decided = filtered(logits, inputs, num_candidates)
    total = weights.sum(-1, keepdim=True)
    # The cumulative sum may lose monotony to rounding, so only tokens with a weight can be chosen; the last one
    # catches what rounding leaves over.
    ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(weights)
    passed = (weights > 0) & (weights.cumsum(-1) > inputs.uniform * total)
    last = torch.where(weights > 0, ids, 0).amax(-1, keepdim=True)
    drawn = torch.minimum(torch.where(passed, ids, logits.shape[-1]).amin(-1, keepdim=True), last)
    tokens = torch.where(inputs.do_sample > 0, drawn, scores.argmax(-1, keepdim=True))
    result = _result(scores, tokens, total.log())
    return torch.stack([torch.where(is_decided[:, 0], result[0], UNDECIDED), result[1]])


def filtered(logits: torch.Tensor, inputs: SampleInputs, num_candidates: int) -> tuple[torch.Tensor, ...]:
    """Processed scores less the largest one [S, V], the weights exp(score) of the tokens that are kept [S, V], and
    is_decided [S, 1].

    The weights are zero for tokens that top_k, top_p or the forbidden set leave out.
    """
    scores = logits.float()
    penalised = torch.where(scores > 0, scores / inputs.repetition_penalty, scores * inputs.repetition_penalty)
    # A small penalty leaves float32's range, and so does a low temperature: without infinite scores there is no NaN.
    scores = torch.where(inputs.seen, penalised.clamp(-LARGEST_FLOAT32, LARGEST_FLOAT32), scores)
    scores = torch.where(inputs.forbidden, -torch.inf, scores)
    relative = (scores - scores.amax(-1, keepdim=True)) / inputs.temperature
    weights = relative.exp()
    threshold, is_decided = _threshold(scores, weights, inputs, min(num_candidates, scores.shape[-1]))
    return relative, torch.where(scores >= threshold, weights, 0.0), is_decided


def _threshold(scores, weights, inputs: SampleInputs, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least score, before the temperature, that top_k and top_p keep [S, 1], and whether the candidates were enough
    to know it."""
    vocab_size = scores.shape[-1]
    values = scores.topk(num_candidates, dim=-1).values  # the most likely first
    has_top_k = (inputs.top_k >= 1) & (inputs.top_k < vocab_size)
    rank = inputs.top_k.clamp(1, num_candidates).long() - 1
    threshold = torch.where(has_top_k, values.gather(-1, rank), -torch.inf)
    total = torch.where(scores >= threshold, weights, 0.0).sum(-1, keepdim=True)
    masses = torch.where(values >= threshold, ((values - values[:, :1]) / inputs.temperature).exp(), 0.0)
    in_nucleus = (values >= threshold) & (masses.cumsum(-1) - masses < inputs.top_p * total)
    nucleus = torch.where(in_nucleus, values, torch.inf).amin(-1, keepdim=True)
    has_top_p = inputs.top_p < 1
    needs_more = (has_top_k & (inputs.top_k > num_candidates)) | (has_top_p & in_nucleus[:, -1:])
    is_decided = ~needs_more if num_candidates < vocab_size else torch.ones_like(needs_more)
    return torch.where(has_top_p, nucleus, threshold), is_decided


def _result(scores: torch.Tensor, tokens: torch.Tensor, log_total: torch.Tensor) -> torch.Tensor:
    """One array is one fetch; float32 holds every token id below 2^24 exactly."""
    return torch.cat([tokens.float(), scores.gather(-1, tokens) - log_total], dim=1).T
