"""The list of work as the kernel walks it (see ``schedule.py``): a ring of slots, filled in the order of the list.

``fetch_next`` puts the next item in the next slot: its pages in VMEM, what it is in SMEM. Whoever computes takes items
from the other end, across tiles, sequences and row blocks, and fetches as many as it took.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from torch_rpa.kernels import schedule
from torch_rpa.kernels.config import KernelConfig
from torch_rpa.kernels.refs import Refs
from torch_rpa.kernels.schedule import Item

# Places in the cursor: what to fetch next and where to, how many slots are free, the slot of the item to compute next,
# and the tile whose new tokens are to be written next.
_SEQ, _ROW_BLOCK, _BLOCK, _FETCH_SLOT, _FREE_SLOTS, WORK_SLOT, WRITE_SEQ, WRITE_ROW_BLOCK = range(8)
CURSOR_SIZE = 8


def start_batch(config: KernelConfig, refs: Refs):
    """Begin with the first tile, and all slots free."""
    for place in (_BLOCK, _FETCH_SLOT, WORK_SLOT):
        refs.cursor[place] = 0
    refs.cursor[_FREE_SLOTS] = config.num_slots

    def clear(i, _):
        refs.items[i] = config.num_row_blocks  # no item of any row block

    lax.fori_loop(0, config.num_slots * len(Item._fields), clear, None)
    seq, row_block = _first_tile_from(config, refs, jnp.int32(0), jnp.int32(0))
    refs.cursor[_SEQ], refs.cursor[_ROW_BLOCK] = seq, row_block
    refs.cursor[WRITE_SEQ], refs.cursor[WRITE_ROW_BLOCK] = seq, row_block


def fetch_next(config: KernelConfig, refs: Refs, fetch, last_row_block, freed=0):
    """Fetch into the free slots, and into ``freed`` ones more, items of row blocks up to ``last_row_block``."""
    free = refs.cursor[_FREE_SLOTS] + freed
    refs.cursor[_FREE_SLOTS] = free
    lax.fori_loop(0, free, lambda _, __: _fetch_one(config, refs, fetch, last_row_block), None)


def item_at(refs: Refs, slot) -> Item:
    """What is in a slot."""
    item = Item(*(refs.items[slot * len(Item._fields) + i] for i in range(len(Item._fields))))
    return item._replace(**{name: getattr(item, name) == 1 for name in ("is_decode", "is_first", "is_last")})


def is_in(refs: Refs, slot, row_block):
    """Whether the item in a slot belongs to this row block."""
    return refs.items[slot * len(Item._fields)] == row_block


def slot_after(config: KernelConfig, slot, count=1):
    """The slot ``count <= num_slots`` places on."""
    return jnp.where(slot + count >= config.num_slots, slot + count - config.num_slots, slot + count)


def active_seqs(config: KernelConfig, refs: Refs):
    return jnp.clip(refs.num_seqs[0], 0, config.max_num_seqs)


def _fetch_one(config: KernelConfig, refs: Refs, fetch, last_row_block):
    cursor = refs.cursor
    seq, row_block, slot = cursor[_SEQ], cursor[_ROW_BLOCK], cursor[_FETCH_SLOT]
    may_fetch = (seq < active_seqs(config, refs)) & (row_block <= last_row_block)

    @pl.when(may_fetch)
    def _():
        tile = tile_of(config, refs, seq, row_block)
        block = jnp.maximum(cursor[_BLOCK], tile.first_block)
        fetch.start(slot, seq, block, schedule.needed_pages(config, tile, block))
        item = schedule.make_item(config, row_block, tile, block)
        for i, value in enumerate(item):
            refs.items[slot * len(item) + i] = jnp.asarray(value, jnp.int32)
        cursor[_FETCH_SLOT] = slot_after(config, slot)
        cursor[_FREE_SLOTS] = cursor[_FREE_SLOTS] - 1
        cursor[_BLOCK] = jnp.where(item.is_last, 0, block + 1)

        @pl.when(item.is_last)
        def _():
            cursor[_SEQ], cursor[_ROW_BLOCK] = next_tile(config, refs, seq, row_block, tile)

    @pl.when(~may_fetch)
    def _():
        refs.items[slot * len(Item._fields)] = config.num_row_blocks  # whoever computes must not go on here


def tile_of(config: KernelConfig, refs: Refs, seq, row_block) -> schedule.Tile:
    kv_len = jnp.clip(refs.kv_lens[seq], 0, config.pages_per_seq * config.page_size)
    return schedule.make_tile(config, row_block, *_rows_of(config, refs, seq), kv_len)


def next_tile(config: KernelConfig, refs: Refs, seq, row_block, tile):
    """Sequence and row block of the tile after this one: the sequence's next rows, or the next sequence's first."""
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
    # Never back, whatever cu_q_lens holds: the rows of a block must end before the next block begins.
    return seq, jnp.maximum(row_block, schedule.whole_blocks(first_row, config.block_rows))


def _rows_of(config: KernelConfig, refs: Refs, seq):
    return tuple(jnp.clip(refs.cu_q_lens[s], 0, config.num_tokens) for s in (seq, seq + 1))
