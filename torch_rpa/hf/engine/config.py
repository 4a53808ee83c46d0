"""The engine's settings: what `patch` takes, checked once."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from torch_rpa import sharding
from torch_rpa.validation import PAGE_SIZES

# Token buckets in multiples of max_num_seqs: pure decoding, some prompts beside it, prompts.
DEFAULT_BUCKET_MULTIPLES = (1, 8, 32)
XLA_STEPS = ("replay", "lazy", "openxla")
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class EngineConfig:
    """Everything that fixes the shapes of a step; one XLA program exists for each token bucket.

    page_size       tokens in a page, a power of two from 8 to 256
    num_pages       pages in the pool shared by all sequences, or None (see `pool.pool_pages`)
    max_num_seqs    sequences that run at the same time
    max_seq_len     tokens of one sequence, its answer included, that the cache holds at most; None: the model's
                    max_position_embeddings. The page table has room for as many of each sequence, and stands in
                    scalar memory on a TPU: name what your requests need if the model allows 128k and they are many
    token_buckets   rising row counts; a step is padded to the smallest that holds it. The first should be at
                    least max_num_seqs, so that pure decoding uses it, and the last bounds a prefill chunk. None:
                    1, 8 and 32 times max_num_seqs on an XLA device; on CPU tensors, where nothing is compiled,
                    steps are not padded at all
    kv_dtype        dtype of the pages: None (the model's), torch.float8_e4m3fn or torch.float8_e5m2
    prefix_caching  requests with a common prefix share the full pages of it
    xla_step        how a step runs on an XLA device: "replay" (traced once for each program), "lazy" (traced at every
                    step) or "openxla" (torch.compile with that backend)
    mesh, axis      a torch_xla.distributed.spmd.Mesh, and the name of its axis that weights and heads are sharded over;
                    None: as `torch_rpa.sharding.use_mesh` says, and the weights stay as they are

    Raises ValueError for a value out of range, NotImplementedError for a kv_dtype the engine cannot fill, and
    RuntimeError for a mesh without SPMD.
    """

    page_size: int = 16
    num_pages: int | None = None
    max_num_seqs: int = 8
    max_seq_len: int | None = None
    token_buckets: tuple[int, ...] | None = None
    kv_dtype: torch.dtype | None = None
    prefix_caching: bool = True
    xla_step: str = "replay"
    mesh: Any = None
    axis: str = "model"

    def __post_init__(self) -> None:
        problems = [*self._problems_with_counts(), *self._problems_with_buckets()]
        if self.kv_dtype is not None and not isinstance(self.kv_dtype, torch.dtype):
            problems.append(f"kv_dtype={self.kv_dtype!r} must be None or a torch.dtype")
        if self.xla_step not in XLA_STEPS:
            problems.append(f"xla_step={self.xla_step!r} must be one of {', '.join(XLA_STEPS)}")
        if problems:
            raise ValueError("torch_rpa.hf.patch: " + "; ".join(problems))
        if self.kv_dtype == torch.int8:
            raise NotImplementedError(
                "torch_rpa.hf.patch: kv_dtype=torch.int8 needs a k_scale and a v_scale for each layer, which a "
                "transformers model does not carry; use torch.float8_e4m3fn or None (the model's dtype)"
            )
        if self.mesh is not None:
            sharding.over(self.mesh, self.axis)
            if self.xla_step == "openxla":
                raise NotImplementedError('torch_rpa.hf.patch: xla_step="openxla" with a mesh; use "replay" or "lazy"')

    def _problems_with_counts(self) -> list[str]:
        problems = []
        if not _is_count(self.page_size) or self.page_size not in PAGE_SIZES:
            problems.append(f"page_size={self.page_size!r} must be a power of two from 8 to 256")
        if self.num_pages is not None and not _is_count(self.num_pages):
            problems.append(f"num_pages={self.num_pages!r} must be None or a positive integer")
        if self.max_seq_len is not None and not _is_count(self.max_seq_len):
            problems.append(f"max_seq_len={self.max_seq_len!r} must be None or a positive integer")
        if not _is_count(self.max_num_seqs):
            problems.append(f"max_num_seqs={self.max_num_seqs!r} must be a positive integer")
        return problems

    def _problems_with_buckets(self) -> list[str]:
        buckets = self.token_buckets
        if buckets is None:
            return []
        if not isinstance(buckets, (tuple, list)) or not buckets or not all(map(_is_count, buckets)):
            return [f"token_buckets={buckets!r} must be None or a tuple of positive integers"]
        object.__setattr__(self, "token_buckets", tuple(buckets))
        if any(small >= large for small, large in pairwise(buckets)):
            return [f"token_buckets={buckets!r} must rise"]
        if _is_count(self.max_num_seqs) and buckets[-1] < self.max_num_seqs:
            return [
                f"token_buckets={buckets!r}: the last one must be at least max_num_seqs={self.max_num_seqs}, for a "
                "step holds one token of each decoding sequence"
            ]
        return []

    def longest(self, model_config) -> int:
        """Tokens of the longest sequence that a model of this config may be asked for."""
        return min(self.max_seq_len or model_config.max_position_embeddings, model_config.max_position_embeddings)

    @property
    def buckets(self) -> tuple[int, ...]:
        return self.token_buckets or tuple(multiple * self.max_num_seqs for multiple in DEFAULT_BUCKET_MULTIPLES)

    @property
    def heads(self) -> sharding.HeadSharding | None:
        """How this model is sharded; None without a mesh of its own."""
        return None if self.mesh is None else sharding.HeadSharding(self.mesh, self.axis)

    @property
    def max_step_tokens(self) -> int:
        """Rows of the largest bucket: the budget of one step."""
        return self.buckets[-1]

    def bucket_for(self, num_tokens: int) -> int:
        """The smallest bucket that holds num_tokens rows (at most max_step_tokens)."""
        return next(bucket for bucket in self.buckets if bucket >= num_tokens)
