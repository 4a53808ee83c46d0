"""Pages from HBM to VMEM: start and wait as a pair, for one slot of a ring of buffers."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu


class PageFetch(NamedTuple):
    """Fetches key blocks of any sequence.

    Attributes:
        page_indices: SMEM int32 [max_num_seqs * pages_per_seq]; entries that are fetched may still be out of range.
        kv_pages_hbm: [num_pages, page_size, kv_width].
        kv_buffer: VMEM [num_slots, block_pages, page_size, kv_width].
        sems: one DMA semaphore for each slot.
        pages_per_seq: of the page table.
    """

    page_indices: Any
    kv_pages_hbm: Any
    kv_buffer: Any
    sems: Any
    pages_per_seq: int

    def start(self, slot, seq, block, first_page, end_page):
        """Begin to fetch the pages first_page .. end_page - 1 of sequence ``seq`` to their places in a key block."""
        num_pages, block_pages = self.kv_pages_hbm.shape[0], self.kv_buffer.shape[1]

        def start_page(i, _):
            page = jnp.clip(self.page_indices[seq * self.pages_per_seq + i], 0, num_pages - 1)
            self._copy(page, slot, i - block * block_pages).start()

        lax.fori_loop(first_page, end_page, start_page, None)

    def wait(self, slot, num_pages):
        """Wait for what ``start`` began."""

        def wait_page(i, _):
            self._copy(0, slot, 0).wait()  # a wait counts bytes: any page will do

        lax.fori_loop(0, num_pages, wait_page, None)

    def _copy(self, page, slot, place):
        return pltpu.make_async_copy(self.kv_pages_hbm.at[page], self.kv_buffer.at[slot, place], self.sems.at[slot])
