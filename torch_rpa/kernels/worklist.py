"""The list of work as the kernel walks it: one cursor for what to fetch next, one for what to compute next.

Both follow the same list (see ``schedule.py``) and live in SMEM from one row block to the next, so that pages are on
their way across tiles, sequences and row blocks.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from torch_rpa.kernels import schedule
from torch_rpa.kernels.config import KernelConfig
from torch_rpa.kernels.refs import Refs

# Places in the cursor: the next item to fetch, and the next one to work on.
FETCH_SEQ, FETCH_ROW_BLOCK, FETCH_BLOCK, FETCH_SLOT, WORK_SEQ, WORK_ROW_BLOCK, WORK_SLOT = range(7)
CURSOR_SIZE = 7


def start_batch(config: KernelConfig, refs: Refs, fetch):
    """Put both cursors on the first item, and begin to fetch as many items as there are slots to spare."""
    seq, row_block = _first_tile_from(config, refs, jnp.int32(0), jnp.int32(0))
    for place in range(CURSOR_SIZE):
        refs.cursor[place] = 0
    refs.cursor[FETCH_SEQ], refs.cursor[WORK_SEQ] = seq, seq
    refs.cursor[FETCH_ROW_BLOCK], refs.cursor[WORK_ROW_BLOCK] = row_block, row_block

    def fetch_one(_, carry):
        fetch_next(config, refs, fetch)
        return carry

    lax.fori_loop(0, config.num_slots - 1, fetch_one, 0)


def for_each_tile(config: KernelConfig, refs: Refs, row_block, attend_tile):
    """Call ``slot = attend_tile(seq, tile, slot)`` for every tile of the row block, from where the last one stopped.

    ``slot`` holds the tile's first key block; what comes back is the slot of the next tile's.
    """

    def is_here(work):
        seq, its_row_block, _, num_seqs = work
        return (seq < num_seqs) & (its_row_block == row_block)

    def attend(work):
        seq, _, slot, num_seqs = work
        tile = tile_of(config, refs, seq, row_block)
        slot = attend_tile(seq, tile, slot)
        return *next_tile(config, refs, seq, row_block, tile), slot, num_seqs

    places = WORK_SEQ, WORK_ROW_BLOCK, WORK_SLOT
    work = lax.while_loop(is_here, attend, (*(refs.cursor[i] for i in places), active_seqs(config, refs)))
    for place, value in zip(places, work, strict=False):
        refs.cursor[place] = value


def fetch_next(config: KernelConfig, refs: Refs, fetch):
    """Begin to fetch the next item's pages, if there is one, and move the cursor on."""
    cursor = refs.cursor
    seq, row_block = cursor[FETCH_SEQ], cursor[FETCH_ROW_BLOCK]

    @pl.when(seq < active_seqs(config, refs))
    def _():
        tile = tile_of(config, refs, seq, row_block)
        block = jnp.maximum(cursor[FETCH_BLOCK], tile.first_block)
        fetch.start(cursor[FETCH_SLOT], seq, block, *schedule.needed_pages(config, tile, block))
        cursor[FETCH_SLOT] = next_slot(config, cursor[FETCH_SLOT])
        is_last = block + 1 >= tile.end_block
        cursor[FETCH_BLOCK] = jnp.where(is_last, 0, block + 1)

        @pl.when(is_last)
        def _():
            cursor[FETCH_SEQ], cursor[FETCH_ROW_BLOCK] = next_tile(config, refs, seq, row_block, tile)


def tile_of(config: KernelConfig, refs: Refs, seq, row_block) -> schedule.Tile:
    kv_len = jnp.clip(refs.kv_lens[seq], 0, config.pages_per_seq * config.page_size)
    return schedule.make_tile(config, row_block, *_rows_of(config, refs, seq), kv_len)


def next_tile(config: KernelConfig, refs: Refs, seq, row_block, tile):
    """The sequence and the row block of the tile after this one: the same sequence's next rows, or the next sequence."""
    next_seq, its_row_block = _first_tile_from(config, refs, seq + 1, row_block)
    return jnp.where(tile.past_block, seq, next_seq), jnp.where(tile.past_block, row_block + 1, its_row_block)


def _first_tile_from(config: KernelConfig, refs: Refs, seq, row_block):
    """The first sequence from ``seq`` on that has rows, and the row block where they begin."""
    num_seqs = active_seqs(config, refs)

    def has_rows(seq):
        first_row, end_row = _rows_of(config, refs, jnp.minimum(seq, config.max_num_seqs - 1))
        return (seq >= num_seqs) | (end_row > first_row)

    def skip(carry):
        seq, _ = carry
        return seq + 1, has_rows(seq + 1)

    seq, _ = lax.while_loop(lambda carry: ~carry[1], skip, (seq, has_rows(seq)))
    first_row, _ = _rows_of(config, refs, jnp.minimum(seq, config.max_num_seqs - 1))
    # Never back, whatever cu_q_lens holds: both cursors must walk the same list to its end.
    return seq, jnp.maximum(row_block, schedule.whole_blocks(first_row, config.block_rows))


def _rows_of(config: KernelConfig, refs: Refs, seq):
    return tuple(jnp.clip(refs.cu_q_lens[s], 0, config.num_tokens) for s in (seq, seq + 1))


def active_seqs(config: KernelConfig, refs: Refs):
    return jnp.clip(refs.num_seqs[0], 0, config.max_num_seqs)


def next_slot(config: KernelConfig, slot):
    return jnp.where(slot + 1 == config.num_slots, 0, slot + 1)


