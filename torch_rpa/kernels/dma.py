"""Pages from HBM to VMEM and back: start and wait as a pair, for one slot of a ring of buffers.

Whole pages are fetched, but of a page that a sequence fills in part only the ``unit_tokens`` that hold its tokens: DMAs
move whole tiles of rows, and 32 rows are a whole tile of every dtype.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_rpa.kernels import schedule
from torch_rpa.kernels.config import KernelConfig

# DMAs of one iteration: a scalar core that issues one at a time waits for every table entry.
_UNROLL = 4


class PageFetch(NamedTuple):
    """Fetches key blocks of any sequence.

    Attributes:
        page_indices: SMEM int32 [max_num_seqs * pages_per_seq]; entries that are fetched may still be out of range.
        kv_pages_hbm: ``config.pages_shape``.
        kv_buffer: VMEM, ``config.kv_buffer_shape``.
        sems: one DMA semaphore for each slot.
    """

    config: KernelConfig
    page_indices: Any
    kv_pages_hbm: Any
    kv_buffer: Any
    sems: Any

    def start(self, slot, seq, block, pages: schedule.Pages):
        """Begin to fetch these pages of sequence ``seq`` to their places in a key block."""
        config = self.config
        table, places = seq * config.pages_per_seq, block * config.block_pages

        def start_page(i):
            self._page(self._page_number(table + i), slot, i - places).start()

        def start_unit(i):
            page = pages.end_full
            rows = pl.ds(pl.multiple_of(i * config.unit_rows, config.unit_rows), config.unit_rows)
            self._rows(self._page_number(table + page), slot, page - places, rows).start()

        _for_each(pages.first, pages.end_full, min(_UNROLL, config.block_pages), start_page)
        if config.units_per_page > 1:
            _for_each(0, pages.tail_units, 1, start_unit)

    def wait(self, slot, num_units):
        """Wait for what ``start`` began: so many units. A wait counts bytes: any rows of the slot will do."""
        config = self.config
        units = 1
        while units <= config.block_pages * config.units_per_page:
            pl.when(num_units & units != 0)(self._units(slot, units).wait)
            units *= 2

    def _page_number(self, place):
        return jnp.clip(self.page_indices[place], 0, self.config.num_pages - 1)

    def _page(self, page, slot, place):
        return self._rows(page, slot, place, pl.ds(0, self.config.pages_shape[1]))

    def _rows(self, page, slot, place, rows):
        source, target = self.kv_pages_hbm.at[page, rows], in_slot(self.config, self.kv_buffer, slot, place, rows)
        return pltpu.make_async_copy(source, target, self.sems.at[slot])

    def _units(self, slot, units):
        pages = units // self.config.units_per_page
        rows = pl.ds(0, units * self.config.unit_rows)
        if self.config.heads_form:
            some = self.kv_buffer.at[slot, rows]
        else:
            some = self.kv_buffer.at[slot, pl.ds(0, pages)] if pages else self.kv_buffer.at[slot, 0, rows]
        return pltpu.make_async_copy(some, some, self.sems.at[slot])


def rows_of(config: KernelConfig, token, count, multiple):
    """The rows of ``count`` tokens of a page from ``token`` on, a multiple of ``multiple``."""
    return pl.ds(pl.multiple_of(token * config.token_rows, multiple * config.token_rows), count * config.token_rows)


def in_slot(config: KernelConfig, kv_buffer, slot, place, rows):
    """Rows of the page at a place of a slot."""
    if not config.heads_form:
        return kv_buffer.at[slot, place, rows]
    page_rows = config.pages_shape[1]
    return kv_buffer.at[slot, pl.ds(pl.multiple_of(place * page_rows + rows.start, rows.size), rows.size)]


class SlotWrites(NamedTuple):
    """Writes tiles of ``write_tokens`` tokens from slots back to their pages, and waits for all of them at once.

    Attributes:
        kv_pages_hbm, kv_buffer: as in ``PageFetch``.
        sem: one DMA semaphore.
        count: SMEM int32 [1], tiles on their way.
    """

    config: KernelConfig
    kv_pages_hbm: Any
    kv_buffer: Any
    sem: Any
    count: Any

    def start(self, slot, place, page, token, count):
        """Begin to write ``count`` tiles of one unit, of page ``place`` of the slot from ``token`` on, to ``page``."""
        config, size, done = self.config, self.config.unit_tokens // self.config.write_tokens, 0
        while size:
            rows = rows_of(config, token + done * config.write_tokens, size * config.write_tokens, config.write_tokens)
            source, target = in_slot(config, self.kv_buffer, slot, place, rows), self.kv_pages_hbm.at[page, rows]
            pl.when(count & size != 0)(pltpu.make_async_copy(source, target, self.sem).start)
            done += count & size
            size //= 2
        self.count[0] = self.count[0] + count

    def wait(self):
        """Wait until all of it is in the pages."""
        size, count = self.config.unit_tokens // self.config.write_tokens, self.count[0]
        lax.fori_loop(0, schedule.whole_blocks(count, size), lambda *_: self._tiles(size).wait(), None)
        while size := size // 2:
            pl.when(count & size != 0)(self._tiles(size).wait)
        self.count[0] = 0

    def _tiles(self, count):
        """A wait counts bytes: any rows will do."""
        rows = pl.ds(0, count * self.config.write_tokens * self.config.token_rows)
        some = in_slot(self.config, self.kv_buffer, 0, 0, rows)
        return pltpu.make_async_copy(some, some, self.sem)


def _for_each(first, end, unroll, do):
    """Call ``do(i)`` for ``first <= i < end``, ``unroll`` at a time."""

    def iterate(n, _):
        for i in range(unroll):
            i = first + n * unroll + i
            do(i) if unroll == 1 else pl.when(i < end)(lambda i=i: do(i))

    lax.fori_loop(0, schedule.blocks_of(jnp.maximum(end - first, 0), unroll), iterate, None)
