"""One step on the device: prepare its arrays, execute it, fetch its tokens."""

from collections.abc import Iterator
from contextlib import nullcontext
from enum import Enum

import numpy as np
import torch

from torch_rpa import sharding
from torch_rpa.bridges import Programs
from torch_rpa.hf._transformers import attention_of
from torch_rpa.hf.engine.batch import BatchLayout
from torch_rpa.hf.engine.config import EngineConfig
from torch_rpa.hf.engine.page_allocator import pages_for
from torch_rpa.hf.engine.pool import pool_pages
from torch_rpa.hf.engine.sampling import UNDECIDED, SampleRow, pack_sampling, sample, unpack_sampling
from torch_rpa.hf.engine.scheduler import Chunk
from torch_rpa.hf.engine.snapshot import ModelSnapshot
from torch_rpa.hf.engine.steps import Steps, compiles, steps_for
from torch_rpa.hf.model import attention, tensor_parallel
from torch_rpa.hf.model.cache import PagedKVCache


class Lost(Enum):
    """What of former steps is of no use any more."""

    NOTHING = 0
    PREFIXES = 1  # the model is another one: pages that it would fill otherwise are not for new requests
    PAGES = 2  # there is no cache, or none that this model could use


class ModelRunner:
    """Holds the cache and turns a list of chunks into the next token of each.

    Steps are padded to token buckets, and every step of one bucket is one of two programs, greedy or sampling: what
    varies is in the uploaded arrays. On an XLA device nothing in here reads a value back except the tokens at the end.
    CPU tensors compile nothing, so unless token_buckets are given steps have just the rows that there are.
    """

    def __init__(self, model, config: EngineConfig) -> None:
        self.model = model
        self.config = config
        self.num_pages = pool_pages(model, config)
        # The page table of one sequence holds the longest that may be asked for, or the whole pool.
        self.max_tokens_per_seq = min(config.longest(model.config), self.num_pages * config.page_size)
        self.pages_per_seq = pages_for(self.max_tokens_per_seq, config.page_size)
        self._programs = Programs()
        self._cache: PagedKVCache | None = None
        self._steps: Steps | None = None  # made for the cache, and for the model as it stood then

    @property
    def num_compilations(self) -> int:
        """Programs that its steps have compiled so far."""
        return self._programs.count

    # ---- What is kept from step to step ---------------------------------------------------------------------------

    def forget_outdated(self) -> Lost:
        """Compare the model with what the last step computed, once before each step: what that makes worthless."""
        if self._steps is not None and self._steps.snapshot.is_current():
            return Lost.NOTHING
        self._steps = None
        if self._cache is not None and self._cache.fits(self.model.device, self._kv_dtype):
            return Lost.PREFIXES
        self._cache = None
        return Lost.PAGES

    def drop_cache(self) -> None:
        """Let the pages go: after a failure they may hang on half of a traced step."""
        self._steps = self._cache = None

    def _make_ready(self) -> None:
        """Make what `forget_outdated` or `drop_cache` have let go."""
        if self._steps is not None:
            return
        self._require_our_attention()
        if self.config.heads is not None:
            tensor_parallel.shard(self.model, self.config.heads)
        if self._cache is None:
            self._cache = PagedKVCache(self.model, self.num_pages, self.config.page_size, self._kv_dtype)
        self._steps = steps_for(ModelSnapshot(self.model), self.config, self._programs)

    def _require_our_attention(self) -> None:
        implementation = attention_of(self.model.config)
        if implementation != attention.NAME:
            raise RuntimeError(
                f"this model was patched by torch_rpa.hf, but its attention is {implementation!r} now: "
                "leave set_attn_implementation alone, or patch again"
            )

    @property
    def _kv_dtype(self) -> torch.dtype:
        return self.config.kv_dtype or self.model.dtype

    # ---- One step -------------------------------------------------------------------------------------------------

    def run(self, chunks: list[Chunk], rows: list[SampleRow]) -> list[tuple[int, float]]:
        """Run the chunks, each with its row of sampling parameters; the token chosen after each one's last row and its
        log probability, in their order."""
        num_tokens, num_seqs = sum(chunk.num_tokens for chunk in chunks), len(chunks)
        if self._pads:
            num_tokens, num_seqs = self.config.bucket_for(num_tokens), self.config.max_num_seqs
        layout = BatchLayout(num_tokens, num_seqs, self.pages_per_seq)
        samples = any(chunk.samples and chunk.sequence.needs_sampling for chunk in chunks)
        return self._run(layout, chunks, rows if samples else None)

    def warm_up(self) -> Iterator[str]:
        """Run every program once, without any sequence; gives the name of each one that comes next."""
        if not self._pads:
            return
        for bucket in self.config.buckets:
            for kind, rows in (("greedy", None), ("sampling", [])):
                yield f"{bucket} tokens, {kind}"
                self._run(BatchLayout(bucket, self.config.max_num_seqs, self.pages_per_seq), [], rows)
        yield "sampling from the whole vocabulary"
        logits = torch.zeros(self.config.max_num_seqs, self.model.config.vocab_size, dtype=self.model.dtype)
        inputs = [self._steps.upload(array) for array in self._sampling_arrays(self.config.max_num_seqs, [])]
        self._sample_again(logits.to(self.model.device), *inputs)

    @property
    def num_programs(self) -> int:
        """How many programs `warm_up` runs."""
        return 2 * len(self.config.buckets) + 1 if self._pads else 0

    @property
    def _pads(self) -> bool:
        return compiles(self.model.device) or self.config.token_buckets is not None

    def _run(self, layout: BatchLayout, chunks: list[Chunk], rows: list[SampleRow] | None) -> list[tuple[int, float]]:
        with nullcontext() if self.config.heads is None else sharding.using(self.config.heads), torch.no_grad():
            self._make_ready()
            inputs = self._prepare(layout, chunks, rows)
            result, *logits = self._steps.run(layout, self._cache, inputs)
            tokens, logprobs = _fetch(result)
            if UNDECIDED in tokens:
                tokens, logprobs = self._sample_again(*logits, *inputs[1:])
        return list(zip(tokens, logprobs, strict=True))[: len(chunks)]

    def _prepare(self, layout: BatchLayout, chunks: list[Chunk], rows: list[SampleRow] | None) -> list[torch.Tensor]:
        """The step's arrays on the device."""
        arrays = [layout.pack(chunks)]
        if rows is not None:
            arrays += self._sampling_arrays(layout.max_num_seqs, rows)
        return [self._steps.upload(array) for array in arrays]

    def _sampling_arrays(self, num_seqs: int, rows: list[SampleRow]) -> tuple[np.ndarray, np.ndarray]:
        return pack_sampling(rows, num_seqs, self.model.config.vocab_size)

    def _sample_again(
        self, logits: torch.Tensor, numbers: torch.Tensor, bitmaps: torch.Tensor
    ) -> tuple[list[int], list[float]]:
        """With the whole vocabulary as candidates: exact for any parameters, and rarely needed."""
        vocab_size = logits.shape[-1]
        return _fetch(
            self._steps.evaluate(lambda: sample(logits, unpack_sampling(numbers, bitmaps, vocab_size), vocab_size))
        )


def _fetch(result: torch.Tensor) -> tuple[list[int], list[float]]:
    """What `sample` gives, on the host: the step's one transfer back."""
    tokens, logprobs = result.cpu()
    return tokens.int().tolist(), logprobs.tolist()
