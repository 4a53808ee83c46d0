"""One step on the device: upload, model, sampling, one fetch."""

import numpy as np
import torch

from torch_rpa.hf import attention
from torch_rpa.hf.batch import BatchLayout
from torch_rpa.hf.cache import PagedKVCache, pool_pages
from torch_rpa.hf.config import EngineConfig
from torch_rpa.hf.page_allocator import pages_for
from torch_rpa.hf.sampling import GREEDY, pack_sampling, sample, sample_greedy
from torch_rpa.hf.scheduler import Chunk


class ModelRunner:
    """Holds the cache and turns a list of chunks into the next token of each.

    Every step of one token bucket (greedy or sampling) is one and the same program: what varies is in the
    uploaded arrays. On an XLA device nothing in here reads a value back except the tokens at the end.
    """

    def __init__(self, model, config: EngineConfig) -> None:
        self.model = model
        self.config = config
        self.num_pages = pool_pages(model.config, config)
        # The table of one sequence: up to the model's limit or the whole pool.
        self.max_tokens_per_seq = min(model.config.max_position_embeddings, self.num_pages * config.page_size)
        self.pages_per_seq = pages_for(self.max_tokens_per_seq, config.page_size)
        self._cache: PagedKVCache | None = None

    def run(self, chunks: list[Chunk]) -> list[int]:
        """Run the chunks and give the token sampled after each one's last row, in their order."""
        implementation = self.model.config._attn_implementation
        if implementation != attention.NAME:
            raise RuntimeError(
                f"this model was patched by torch_rpa.hf, but its attention is {implementation!r} now: "
                "leave set_attn_implementation alone, or patch again"
            )
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        layout = BatchLayout(self.config.bucket_for(num_tokens), self.config.max_num_seqs, self.pages_per_seq)
        cache = self._ready_cache()
        packed = self._upload(layout.pack(chunks))
        sampling = self._upload_sampling(chunks)
        with torch.no_grad():
            tokens = self._traced_step(layout, cache, packed, sampling)
        if tokens.device.type == "xla":
            from torch_rpa import bridge

            bridge.run_pending([*cache.layers, tokens])
        return tokens.tolist()[: len(chunks)]

    @property
    def needs_new_cache(self) -> bool:
        """Whether there is no cache yet, or the model's device or dtype has changed since it was made."""
        if self._cache is None:
            return True
        pages = self._cache.layers[0]
        return (pages.device, pages.dtype) != (self.model.device, self._kv_dtype)

    @property
    def _kv_dtype(self) -> torch.dtype:
        return self.config.kv_dtype or self.model.dtype

    def drop_cache(self) -> None:
        """Let the pages go: after a failure they may hang on half of a traced step."""
        self._cache = None

    def _traced_step(self, layout, cache, packed: torch.Tensor, sampling: torch.Tensor | None) -> torch.Tensor:
        inputs = layout.unpack(packed, cache)
        logits = self.model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            use_cache=False,
            logits_to_keep=inputs.last_rows,
            rpa_batch=inputs.rpa_batch,
        ).logits[0]  # [max_num_seqs, vocab]
        return sample_greedy(logits) if sampling is None else sample(logits, sampling)

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.model.device)

    def _upload_sampling(self, chunks: list[Chunk]) -> torch.Tensor | None:
        """None if every sequence is greedy: that program has no sort in it.

        A number is drawn from a sequence's generator only for a token that is kept, so the tokens do not
        depend on how its prompt was cut into chunks.
        """
        params = [chunk.sequence.sampling if chunk.samples else GREEDY for chunk in chunks]
        if all(param == GREEDY for param in params):
            return None
        uniforms = [
            0.0 if param == GREEDY else chunk.sequence.rng.random() for param, chunk in zip(params, chunks, strict=True)
        ]
        return self._upload(pack_sampling(params, uniforms, self.config.max_num_seqs))

    def _ready_cache(self) -> PagedKVCache:
        if self.needs_new_cache:
            self._cache = None  # free the old pages before new ones are made
            self._cache = PagedKVCache(self.model, self.num_pages, self.config.page_size, self._kv_dtype)
        return self._cache
