"""One step on the device: upload, model and sampling, one fetch."""

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch

from torch_rpa import sharding
from torch_rpa.hf.engine.batch import BatchLayout
from torch_rpa.hf.engine.config import EngineConfig
from torch_rpa.hf.engine.page_allocator import pages_for
from torch_rpa.hf.engine.pool import pool_pages
from torch_rpa.hf.engine.sampling import UNDECIDED, SampleRow, pack_sampling, sample, unpack_sampling
from torch_rpa.hf.engine.scheduler import Chunk
from torch_rpa.hf.engine.step import run_step
from torch_rpa.hf.model import attention, linear, tensor_parallel
from torch_rpa.hf.model.cache import PagedKVCache


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
        self._cache: PagedKVCache | None = None
        self._xla_steps = None
        self._sharded_weights = [] if config.heads is None else tensor_parallel.shard(model, config.heads)

    @property
    def num_compilations(self) -> int:
        """XLA programs that its steps have compiled so far."""
        return 0 if self._xla_steps is None else self._xla_steps.num_compilations

    def run(self, chunks: list[Chunk]) -> list[tuple[int, float]]:
        """Run the chunks; the token chosen after each one's last row and its log probability, in their order."""
        num_tokens, num_seqs = sum(chunk.num_tokens for chunk in chunks), len(chunks)
        if self._pads:
            num_tokens, num_seqs = self.config.bucket_for(num_tokens), self.config.max_num_seqs
        rows = [chunk.sequence.sample_row() if chunk.samples else SampleRow() for chunk in chunks]
        samples = any(chunk.samples and chunk.sequence.needs_sampling for chunk in chunks)
        return self._run(BatchLayout(num_tokens, num_seqs, self.pages_per_seq), chunks, rows if samples else None)

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
        self._sample_again(logits.to(self.model.device), *self._upload_sampling(self.config.max_num_seqs, []))

    @property
    def num_programs(self) -> int:
        """How many programs `warm_up` runs."""
        return 2 * len(self.config.buckets) + 1 if self._pads else 0

    @property
    def _pads(self) -> bool:
        return self.model.device.type == "xla" or self.config.token_buckets is not None

    @property
    def needs_new_cache(self) -> bool:
        """Whether there is no cache yet, or the model's device or dtype has changed since it was made."""
        if self._cache is None:
            return True
        pages = self._cache.layers[0]
        return (pages.device, pages.dtype) != (self.model.device, self._kv_dtype)

    def check_weights(self) -> None:
        """Trace the model anew if it has other tensors than before, and shard those; to be called when nothing runs."""
        has_others = self._xla_steps is not None and self._xla_steps.forget(unless_same_weights=True)
        if self.config.heads is not None and (has_others or not tensor_parallel.are_sharded(self._sharded_weights)):
            self._sharded_weights = tensor_parallel.shard(self.model, self.config.heads)

    def drop_cache(self) -> None:
        """Let the pages go: after a failure they may hang on half of a traced step."""
        self._cache = None
        if self._xla_steps is not None:
            self._xla_steps.forget()

    def _run(self, layout: BatchLayout, chunks: list[Chunk], rows: list[SampleRow] | None) -> list[tuple[int, float]]:
        with nullcontext() if self.config.heads is None else sharding.using(self.config.heads):
            return self._run_step(layout, chunks, rows)

    def _run_step(self, layout, chunks, rows):
        self._check_attention()
        cache = self._ready_cache()
        inputs = [self._upload(layout.pack(chunks))]
        if rows is not None:
            inputs += self._upload_sampling(layout.max_num_seqs, rows)
        with torch.no_grad():
            result, *logits = self._execute(layout, cache, inputs)
        tokens, logprobs = self._fetch(result)
        if UNDECIDED in tokens:
            tokens, logprobs = self._sample_again(*logits, *inputs[1:])
        return list(zip(tokens, logprobs, strict=True))[: len(chunks)]

    def _execute(self, layout: BatchLayout, cache: PagedKVCache, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.model.device.type != "xla":
            with linear.on_device(self.model.device):
                return run_step(self.model, layout, cache, *inputs)
        return self._steps_on_xla().run(layout, cache, inputs)

    def _steps_on_xla(self):
        if self._xla_steps is None:
            from torch_rpa.hf.engine.xla_steps import XlaSteps  # imports torch_xla

            self._xla_steps = XlaSteps(self.model, self.config.xla_step)
        return self._xla_steps

    @torch.no_grad()
    def _sample_again(
        self, logits: torch.Tensor, numbers: torch.Tensor, bitmaps: torch.Tensor
    ) -> tuple[list[int], list[float]]:
        """With the whole vocabulary as candidates: exact for any parameters, and rarely needed."""
        vocab_size = logits.shape[-1]
        result = sample(logits, unpack_sampling(numbers, bitmaps, vocab_size), vocab_size)
        if result.device.type == "xla":
            self._steps_on_xla().materialise(result)
        return self._fetch(result)

    @staticmethod
    def _fetch(result: torch.Tensor) -> tuple[list[int], list[float]]:
        tokens, logprobs = result.cpu()
        return tokens.int().tolist(), logprobs.tolist()

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.model.device)

    def _upload_sampling(self, num_seqs: int, rows: list[SampleRow]) -> list[torch.Tensor]:
        return [self._upload(array) for array in pack_sampling(rows, num_seqs, self.model.config.vocab_size)]

    def _check_attention(self) -> None:
        implementation = self.model.config._attn_implementation
        if implementation != attention.NAME:
            raise RuntimeError(
                f"this model was patched by torch_rpa.hf, but its attention is {implementation!r} now: "
                "leave set_attn_implementation alone, or patch again"
            )

    @property
    def _kv_dtype(self) -> torch.dtype:
        return self.config.kv_dtype or self.model.dtype

    def _ready_cache(self) -> PagedKVCache:
        """The cache in the model's dtype, on its device; made at first use or when the model has changed since."""
        if self.needs_new_cache:
            self.drop_cache()  # free the old pages before new ones are made
            self._cache = PagedKVCache(self.model, self.num_pages, self.config.page_size, self._kv_dtype)
        return self._cache
