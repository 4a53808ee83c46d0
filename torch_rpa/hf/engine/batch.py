"""One step's metadata as a single int32 array: packed on the host, taken apart by fixed slices on the device.

    [ input_ids T | positions T | last_rows S | kv_lens S | cu_q_lens S + 1 | num_seqs 1 | page_indices S * P
    ]

T rows of the token bucket, S = max_num_seqs, P = pages_per_seq. One array is one transfer, and the sizes
depend on the bucket only, so every step of a bucket is the same program. Rows, sequences and pages that are
not there are zeros, except page_indices, where they are -1.
"""

from dataclasses import dataclass

import numpy as np
import torch

from torch_rpa.hf.engine.scheduler import Chunk
from torch_rpa.hf.model.attention import RaggedBatch
from torch_rpa.hf.model.cache import PagedKVCache


@dataclass(frozen=True)
class StepInputs:
    """What the model is called with: input_ids and position_ids [1, T], last_rows [S], and the attention metadata."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    last_rows: torch.Tensor
    rpa_batch: RaggedBatch


@dataclass(frozen=True)
class BatchLayout:
    """The fixed sizes T, S, P of one bucket's packed array."""

    num_rows: int
    max_num_seqs: int
    pages_per_seq: int

    @property
    def sizes(self) -> list[int]:
        num_rows, num_seqs = self.num_rows, self.max_num_seqs
        return [num_rows, num_rows, num_seqs, num_seqs, num_seqs + 1, 1, num_seqs * self.pages_per_seq]

    def pack(self, chunks: list[Chunk]) -> np.ndarray:
        """int32 [sum(sizes)], a new array each time: an upload may still be reading the last one."""
        packed = np.zeros(sum(self.sizes), np.int32)
        ids, positions, last_rows, kv_lens, cu_q_lens, num_seqs, pages = np.split(packed, np.cumsum(self.sizes)[:-1])
        pages = pages.reshape(self.max_num_seqs, self.pages_per_seq)
        pages[:] = -1
        num_seqs[0] = len(chunks)
        row = 0
        for index, chunk in enumerate(chunks):
            end = chunk.start + chunk.num_tokens
            rows = slice(row, row + chunk.num_tokens)
            ids[rows] = chunk.sequence.tokens(chunk.start, chunk.num_tokens)
            positions[rows] = np.arange(chunk.start, end)
            row += chunk.num_tokens
            kv_lens[index] = end
            cu_q_lens[index + 1 :] = row
            last_rows[index] = row - 1
            pages[index, : len(chunk.sequence.pages)] = chunk.sequence.pages
        return packed

    def unpack(self, packed: torch.Tensor, cache: PagedKVCache) -> StepInputs:
        """The packed array on the device -> views of it."""
        ids, positions, last_rows, kv_lens, cu_q_lens, num_seqs, pages = packed.split(self.sizes)
        return StepInputs(
            input_ids=ids[None],
            position_ids=positions[None],
            last_rows=last_rows,
            rpa_batch=RaggedBatch(
                cache=cache,
                kv_lens=kv_lens,
                page_indices=pages.view(self.max_num_seqs, self.pages_per_seq),
                cu_q_lens=cu_q_lens,
                num_seqs=num_seqs,
            ),
        )
