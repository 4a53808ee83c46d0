"""The list of work as the kernel walks it (see ``schedule.py``): a ring of slots, filled in the order of the list.

``fetch_next`` puts the next item in the next slot: its pages in VMEM, what it is in SMEM. Whoever computes takes items
from the other end, across tiles, sequences and row blocks, and fetches as many as it took.
"""

import functools
import itertools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from torch_rpa.kernels import schedule
from torch_rpa.kernels.config import KernelConfig
from torch_rpa.kernels.refs import Refs
from torch_rpa.kernels.schedule import Item

# Places in the cursor: the tile to fetch next, or where to search for it, and its next key block; the first sequence of
# its row block; whether decode rows are wanted; how many row blocks must have their new tokens in the pages before, and
# how many have; where to fetch to; how many slots are free; the slot of the item to compute next; for the update,
# whether items are key blocks with new tokens only, and where the next new tokens of decode rows go.
_SEQ, _ROW_BLOCK, _BLOCK, _FIRST_SEQ, _DECODES, _NEEDED, _WRITTEN, _FETCH_SLOT, _FREE_SLOTS, _WORK_SLOT = range(10)
_ONLY_NEW, ROW_BATCH = 10, 11
CURSOR_SIZE = 12
# In place of how many row blocks are needed: the next tile has to be searched for, there is none.
_UNKNOWN, _NEVER = 2**30, 2**30 + 1
# Sequences that a search for prefill tiles skips at a time.
_UNROLL = 4


def start_batch(config: KernelConfig, refs: Refs, only_new=False):
    """Begin with the first tile, and all slots free; with ``only_new``, items are those key blocks with new tokens."""
    for place in range(CURSOR_SIZE):
        refs.cursor[place] = 0
    refs.cursor[_FREE_SLOTS], refs.cursor[_ONLY_NEW] = config.num_slots, int(only_new)
    refs.cursor[_NEEDED] = _UNKNOWN

    for i in range(config.num_slots * len(Item._fields)):
        refs.items[i] = config.num_row_blocks  # no item of any row block
    if config.with_update:
        refs.tile_writes[0] = 0
    if config.puts_tokens:
        for batch in range(config.row_batches):
            refs.row_writes[batch] = 0
    _find_tile(config, refs)


def fetch_next(config: KernelConfig, refs: Refs, fetch, freed=0):
    """Fetch the next items into the free slots, and into ``freed`` ones more."""
    cursor = refs.cursor

    def may_fetch(free):
        return (free > 0) & (cursor[_NEEDED] <= cursor[_WRITTEN])

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


def go_on(config: KernelConfig, refs: Refs, fetch, row_block):
    """Fetch also what needs the new tokens of this row block: they are in the pages."""
    refs.cursor[_WRITTEN] = row_block + 1
    fetch_next(config, refs, fetch)


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
    pl.when(item.is_last)(lambda: _leave_tile(config, refs, tile, seq, row_block))


def _leave_tile(config: KernelConfig, refs: Refs, tile: schedule.Tile, seq, row_block):
    """Go to the next tile: it nearly always is the next decode row, or the sequence's next row block."""
    cursor = refs.cursor
    is_decode_next = tile.is_decode & (tile.row + 1 < config.block_rows) & _has_tile(config, refs, seq + 1, decodes=1)
    is_own_next = tile.past_block & (tile.row == 0)
    cursor[_SEQ] = jnp.where(is_own_next, seq, seq + 1)
    cursor[_NEEDED] = jnp.where(is_decode_next, 0, _UNKNOWN)

    @pl.when(is_own_next)
    def _():
        cursor[_ROW_BLOCK], cursor[_FIRST_SEQ] = row_block + 1, seq
        cursor[_NEEDED] = _needed_blocks(config, refs, seq, row_block + 1)

    _find_tile(config, refs)


def _tile_of(config: KernelConfig, refs: Refs, seq, row_block) -> schedule.Tile:
    kv_len = jnp.clip(refs.kv_lens[seq], 0, config.pages_per_seq * config.page_size)
    only_new = {"only_new": refs.cursor[_ONLY_NEW] == 1} if config.writes_first else {}
    rows = (jnp.clip(row, 0, config.num_tokens) for row in _rows_of(config, refs, seq))
    return schedule.make_tile(config, row_block, *rows, kv_len, **only_new)


def _needed_blocks(config: KernelConfig, refs: Refs, seq, row_block):
    """How many row blocks must have their new tokens in the pages: a sequence's later tiles read those before."""
    if not config.with_update:
        return 0
    needs = refs.cu_q_lens[seq] < row_block * config.block_rows
    needs &= refs.cursor[_ONLY_NEW] == 1 if config.writes_first else True
    return jnp.where(needs, row_block, 0)


def _find_tile(config: KernelConfig, refs: Refs):
    """Search for the next tile while it is not known."""

    def search(_):
        _search(config, refs)
        return refs.cursor[_NEEDED] == _UNKNOWN

    lax.while_loop(lambda is_unknown: is_unknown, search, refs.cursor[_NEEDED] == _UNKNOWN)


def _search(config: KernelConfig, refs: Refs):
    """Look for the next tile in the rest of its kind in the row block; if there is none, go on to what comes next."""
    cursor, row_block, decodes = refs.cursor, refs.cursor[_ROW_BLOCK], refs.cursor[_DECODES]
    end = (row_block + 1) * config.block_rows
    seq, found = _next_of_kind(config, refs, cursor[_SEQ], end, decodes)
    passes = ~found & (decodes == 1)
    goes_on = _rows_of(config, refs, seq)[0] > end  # the sequence before, in the next row block
    first_seq = jnp.where(passes, jnp.maximum(jnp.where(goes_on, seq - 1, seq), 0), cursor[_FIRST_SEQ])
    row_block = jnp.where(passes, row_block + 1, row_block)
    cursor[_SEQ], cursor[_FIRST_SEQ], cursor[_ROW_BLOCK] = jnp.where(found, seq, first_seq), first_seq, row_block
    cursor[_DECODES] = jnp.where(found, decodes, 1 - decodes)
    needed = jnp.where(found, _needed_blocks(config, refs, seq, row_block), _UNKNOWN)
    num_rows = jnp.clip(refs.cu_q_lens[active_seqs(config, refs)], 0, config.num_tokens)
    cursor[_NEEDED] = jnp.where(row_block * config.block_rows < num_rows, needed, _NEVER)


def _next_of_kind(config: KernelConfig, refs: Refs, seq, end, decodes):
    """The first sequence from ``seq`` on that is a decode row, or not one, or begins at row ``end`` or later.

    Returns:
        it, and whether it begins before.
    """
    num_seqs = active_seqs(config, refs)

    def is_here(seq):
        return (seq < num_seqs) & (_rows_of(config, refs, seq)[0] < end)

    def is_other(seq):
        return is_here(seq) & ~_has_tile(config, refs, seq, decodes)

    def are_short(seq):
        """Whether it and those after it are here and have one row at most: nothing for prefill."""
        rows = [refs.cu_q_lens[jnp.minimum(seq + i, config.max_num_seqs)] for i in range(_UNROLL + 1)]
        most = functools.reduce(jnp.maximum, (b - a for a, b in itertools.pairwise(rows)))
        return (decodes == 0) & (seq + _UNROLL <= num_seqs) & (most <= 1) & (rows[-1] <= end)

    seq = _skip_while(is_other, _skip_while(are_short, seq, _UNROLL), 1)
    return seq, is_here(seq)


def _skip_while(skips, seq, count):
    """The first of ``seq``, ``seq + count``, ... for which ``skips`` is false."""
    seq, _ = lax.while_loop(lambda c: c[1], lambda c: (c[0] + count, skips(c[0] + count)), (seq, skips(seq)))
    return seq


def _has_tile(config: KernelConfig, refs: Refs, seq, decodes):
    """Whether a sequence is a decode row, or with ``decodes`` 0 whether it has rows for prefill."""
    first_row, end_row = _rows_of(config, refs, seq)
    num_rows = end_row - first_row
    return jnp.where(decodes == 1, num_rows == 1, num_rows > 1) & (seq < active_seqs(config, refs))


def _rows_of(config: KernelConfig, refs: Refs, seq):
    return tuple(refs.cu_q_lens[jnp.minimum(s, config.max_num_seqs)] for s in (seq, seq + 1))
