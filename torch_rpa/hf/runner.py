"""One step on the device: upload, model, sampling, one fetch."""

from collections.abc import Iterator

import numpy as np
import torch

from torch_rpa.hf import attention
from torch_rpa.hf.batch import BatchLayout
from torch_rpa.hf.cache import PagedKVCache, pool_pages
from torch_rpa.hf.config import EngineConfig
from torch_rpa.hf.page_allocator import pages_for
from torch_rpa.hf.sampling import UNDECIDED, SampleLayout, SampleRow, sample, sample_greedy
from torch_rpa.hf.scheduler import Chunk


class ModelRunner:
    """Holds the cache and turns a list of chunks into the next token of each.

    Every step of one token bucket is one of two programs, greedy or sampling: what varies is in the uploaded arrays. On
    an XLA device nothing in here reads a value back except the tokens at the end.

    num_compilations: XLA programs that its steps have compiled so far.
    """

    def __init__(self, model, config: EngineConfig) -> None:
        self.model = model
        self.config = config
        self.num_pages = pool_pages(model.config, config)
        # The table of one sequence: up to the model's limit or the whole pool.
        self.max_tokens_per_seq = min(model.config.max_position_embeddings, self.num_pages * config.page_size)
        self.pages_per_seq = pages_for(self.max_tokens_per_seq, config.page_size)
        self.num_compilations = 0
        self._sample_layout = SampleLayout(config.max_num_seqs, model.config.vocab_size)
        self._cache: PagedKVCache | None = None

    def run(self, chunks: list[Chunk]) -> list[tuple[int, float]]:
        """Run the chunks; the token chosen after each one's last row and its log probability, in their order."""
        bucket = self.config.bucket_for(sum(chunk.num_tokens for chunk in chunks))
        rows = [chunk.sequence.sample_row() if chunk.samples else SampleRow() for chunk in chunks]
        samples = any(chunk.samples and chunk.sequence.needs_sampling for chunk in chunks)
        return self._run(self._layout(bucket), chunks, rows if samples else None)

    def warm_up(self) -> Iterator[str]:
        """Run every program once, without any sequence; gives the name of each one that comes next."""
        for bucket in self.config.token_buckets:
            for kind, rows in (("greedy", None), ("sampling", [])):
                yield f"{bucket} tokens, {kind}"
                self._run(self._layout(bucket), [], rows)
        yield "sampling from the whole vocabulary"
        with torch.no_grad():
            logits = torch.zeros(self.config.max_num_seqs, self.model.config.vocab_size, dtype=self.model.dtype)
            self._sample_again(logits.to(self.model.device), self._upload(self._sample_layout.pack([])))

    @property
    def needs_new_cache(self) -> bool:
        """Whether there is no cache yet, or the model's device or dtype has changed since it was made."""
        if self._cache is None:
            return True
        pages = self._cache.layers[0]
        return (pages.device, pages.dtype) != (self.model.device, self._kv_dtype)

    def drop_cache(self) -> None:
        """Let the pages go: after a failure they may hang on half of a traced step."""
        self._cache = None

    def _run(self, layout: BatchLayout, chunks: list[Chunk], rows: list[SampleRow] | None) -> list[tuple[int, float]]:
        self._check_attention()
        cache = self._ready_cache()
        packed = self._upload(layout.pack(chunks))
        sampling = None if rows is None else self._upload(self._sample_layout.pack(rows))
        with torch.no_grad():
            logits = self._logits(layout, cache, packed)
            if sampling is None:
                (result,) = self._execute([*cache.layers], [sample_greedy(logits)])
            else:
                result = sample(logits, self._sample_layout.unpack(sampling))
                result, logits = self._execute([*cache.layers], [result, logits])
            tokens, logprobs = self._fetch(result)
            if UNDECIDED in tokens:
                tokens, logprobs = self._sample_again(logits, sampling)
        return list(zip(tokens, logprobs, strict=True))[: len(chunks)]

    def _logits(self, layout: BatchLayout, cache: PagedKVCache, packed: torch.Tensor) -> torch.Tensor:
        """[max_num_seqs, vocab]: of each sequence's last row."""
        inputs = layout.unpack(packed, cache)
        return self.model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            use_cache=False,
            logits_to_keep=inputs.last_rows,
            rpa_batch=inputs.rpa_batch,
        ).logits[0]

    def _sample_again(self, logits: torch.Tensor, sampling: torch.Tensor) -> tuple[list[int], list[float]]:
        """With the whole vocabulary as candidates: exact for any parameters, and rarely needed."""
        result = sample(logits, self._sample_layout.unpack(sampling), logits.shape[-1])
        return self._fetch(*self._execute([], [result]))

    def _execute(self, updated: list[torch.Tensor], results: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run what was traced, on an XLA device; `updated` are tensors that it changed in place."""
        if results[0].device.type == "xla":
            from torch_rpa import bridge

            before, _ = bridge.compilations()
            bridge.run_pending([*updated, *results])
            self.num_compilations += bridge.compilations()[0] - before
        return results

    @staticmethod
    def _fetch(result: torch.Tensor) -> tuple[list[int], list[float]]:
        tokens, logprobs = result.cpu()
        return tokens.tolist(), logprobs.view(torch.float32).tolist()

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.model.device)

    def _layout(self, bucket: int) -> BatchLayout:
        return BatchLayout(bucket, self.config.max_num_seqs, self.pages_per_seq)

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
            self._cache = None  # free the old pages before new ones are made
            self._cache = PagedKVCache(self.model, self.num_pages, self.config.page_size, self._kv_dtype)
        return self._cache
