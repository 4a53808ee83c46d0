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

# Places in the cursor: what to fetch next, the first sequence that must not be fetched, where to fetch to, how many
# slots are free, the slot of the item to compute next; for the update, whether items are key blocks with new tokens
# only, and where the next new tokens of decode rows go.
_SEQ, _ROW_BLOCK, _BLOCK, _END_SEQ, _FETCH_SLOT, _FREE_SLOTS, _WORK_SLOT, _ONLY_NEW, ROW_BATCH = range(9)
CURSOR_SIZE = 9


def start_batch(config: KernelConfig, refs: Refs, only_new=False):
    """Begin with the first tile, and all slots free; with ``only_new``, items are those key blocks with new tokens."""
    for place in range(CURSOR_SIZE):
        refs.cursor[place] = 0
    refs.cursor[_FREE_SLOTS], refs.cursor[_ONLY_NEW] = config.num_slots, int(only_new)
    go_on(config, refs)

    for i in range(config.num_slots * len(Item._fields)):
        refs.items[i] = config.num_row_blocks  # no item of any row block
    if config.with_update:
        refs.tile_writes[0] = 0
        for batch in range(config.row_batches):
            refs.row_writes[batch] = 0
    seq, row_block = _first_tile_from(config, refs, jnp.int32(0), jnp.int32(0))
    refs.cursor[_SEQ], refs.cursor[_ROW_BLOCK] = seq, row_block


def fetch_next(config: KernelConfig, refs: Refs, fetch, freed=0):
    """Fetch the next items into the free slots, and into ``freed`` ones more."""
    cursor = refs.cursor

    def may_fetch(free):
        return (free > 0) & (cursor[_SEQ] < cursor[_END_SEQ])

    def fetch_one(carry):
        free = carry[0] - 1
        _fetch_one(config, refs, fetch)
        return free, may_fetch(free)

    free = cursor[_FREE_SLOTS] + freed
    free, _ = lax.while_loop(lambda carry: carry[1], fetch_one, (free, may_fetch(free)))
    cursor[_FREE_SLOTS] = free

    @pl.when(free > 0)
    def _():
        refs.items[cursor[_FETCH_SLOT] * len(Item._fields)] = config.num_row_blocks  # who computes must not go on here


def for_each_item(config: KernelConfig, refs: Refs, row_block, work):
    """``work(slot)`` for the items of a row block in their order; it returns how many it took, from that slot on."""

    def is_here(slot):
        return refs.items[slot * len(Item._fields)] == row_block

    def work_on(carry):
        slot, _ = carry
        slot = slot_after(config, slot, work(slot))
        return slot, is_here(slot)

    slot = refs.cursor[_WORK_SLOT]
    refs.cursor[_WORK_SLOT], _ = lax.while_loop(lambda carry: carry[1], work_on, (slot, is_here(slot)))


def go_on(config: KernelConfig, refs: Refs):
    """Any sequence may be fetched: what was fetched so far has its new tokens in the pages."""
    refs.cursor[_END_SEQ] = active_seqs(config, refs)


def item_at(refs: Refs, slot) -> Item:
    """What is in a slot."""
    item = Item(*(refs.items[slot * len(Item._fields) + i] for i in range(len(Item._fields))))
    return item._replace(**{name: getattr(item, name) == 1 for name in ("is_decode", "is_first", "is_last")})


def slot_after(config: KernelConfig, slot, count=1):
    """The slot ``count <= num_slots`` places on."""
    return jnp.where(slot + count >= config.num_slots, slot + count - config.num_slots, slot + count)


def active_seqs(config: KernelConfig, refs: Refs):
    return jnp.clip(refs.num_seqs[0], 0, config.max_num_seqs)


def _fetch_one(config: KernelConfig, refs: Refs, fetch):
    cursor = refs.cursor
    seq, row_block, slot = cursor[_SEQ], cursor[_ROW_BLOCK], cursor[_FETCH_SLOT]
    tile = _tile_of(config, refs, seq, row_block)
    block = jnp.maximum(cursor[_BLOCK], tile.first_block)
    fetch.start(slot, seq, block, schedule.needed_pages(config, tile, block))
    item = schedule.make_item(config, row_block, seq, tile, block)
    for i, value in enumerate(item):
        refs.items[slot * len(item) + i] = jnp.asarray(value, jnp.int32)
    cursor[_FETCH_SLOT] = slot_after(config, slot)
    cursor[_BLOCK] = jnp.where(item.is_last, 0, block + 1)

    @pl.when(item.is_last)
    def _():
        cursor[_SEQ], cursor[_ROW_BLOCK] = _next_tile(config, refs, seq, row_block, tile)
        if config.with_update:  # the sequence's next tile needs what this one writes
            writes = tile.past_block & (cursor[_ONLY_NEW] == 1 if config.writes_first else True)
            cursor[_END_SEQ] = jnp.where(writes, 0, cursor[_END_SEQ])


def _tile_of(config: KernelConfig, refs: Refs, seq, row_block) -> schedule.Tile:
    kv_len = jnp.clip(refs.kv_lens[seq], 0, config.pages_per_seq * config.page_size)
    only_new = {"only_new": refs.cursor[_ONLY_NEW] == 1} if config.writes_first else {}
    return schedule.make_tile(config, row_block, *_rows_of(config, refs, seq), kv_len, **only_new)


def _next_tile(config: KernelConfig, refs: Refs, seq, row_block, tile):
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
