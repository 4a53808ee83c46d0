"""This step's k and v to their places in the pages, in place, out of the key blocks that attention fetches anyway.

A key block that has come gets the new tokens of its tile in VMEM, and goes back to HBM where it got some, while the
tile attends: nothing is read for the write, and nothing is waited for before the fetch. What moves are whole tiles of
``write_tokens`` slots, the least that a DMA moves:

    rows of k, v    | . r1 r2 r3 r4 r5 |            positions 6 .. 10 of their sequence, tiles of 4 slots

    key block         [ 0  1  2  3 ] [ 4  5 r1 r2 ] [r3 r4 r5  ~ ] [ ~  ~  ~  ~ ]
                                     |<------ written back ----->|

The tokens of a prefill tile are written from the slot itself, which is filled again when they are there. The
one tile of a decode row is written from a copy: its slot is wanted at once. A later tile of the same sequence fetches
the tokens of the earlier ones when they are there (``worklist.py``). Where rows see tokens of later row blocks (not
causal), all tokens are written in a pass of its own over the batch, before any row attends.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_rpa.kernels import schedule, worklist
from torch_rpa.kernels.config import LANES, KernelConfig, fill_lanes
from torch_rpa.kernels.dma import SlotWrites, in_slot, rows_of
from torch_rpa.kernels.quantize import quantize
from torch_rpa.kernels.refs import Refs
from torch_rpa.kernels.rows import count_rows


def write_block(config: KernelConfig, refs: Refs, fetch, row_block):
    """The new tokens of a row block, none of whose rows attend yet."""
    worklist.fetch_next(config, refs, fetch)
    regroup_new(config, refs, row_block)

    def write_item(slot):
        item = worklist.item_at(refs, slot)
        fetch.wait(slot, item.num_units)
        put_tile(config, refs, item, slot)
        finish_tile(config, refs, fetch, item, item.is_last)
        worklist.fetch_next(config, refs, fetch, freed=1)
        return 1

    worklist.for_each_item(config, refs, row_block, write_item)


def regroup_new(config: KernelConfig, refs: Refs, row_block):
    """k and v of the row block as they will be in the pages, but float32 and by head: a tile may begin at any row."""
    heads, parts, lanes, count = config.num_kv_heads, config.lane_parts, config.part_lanes, config.copy_rows

    def regroup(i, _):
        first_row = pl.multiple_of(i * count, count)
        rows, to_rows = pl.ds(first_row, count), pl.ds(first_row + config.unit_tokens, count)
        for source, target, scale in _sources(config, refs):
            for piece in range(heads * parts):
                new = quantize(source[rows, piece * lanes : (piece + 1) * lanes], config.kv_dtype, scale)
                target.at[piece // parts, piece % parts][to_rows, :] = fill_lanes(new.astype(jnp.float32))

    lax.fori_loop(0, schedule.blocks_of(count_rows(config, refs, row_block), count), regroup, None)


def put_tile(config: KernelConfig, refs: Refs, item: schedule.Item, slot):
    """The new tokens of an item's tile that fall into its key block: into the slot, and on their way to the pages."""
    first = item.first_p - item.first_key
    first, end = jnp.maximum(first, 0), jnp.minimum(first + item.num_rows, config.block_keys)
    unit, tile, writes = config.unit_tokens, config.write_tokens, _tile_writes(config, refs)

    def put_unit(i, _):
        start = pl.multiple_of(i * unit, unit)
        lo, hi = jnp.maximum(first - start, 0), jnp.minimum(end - start, unit)
        row = item.row + item.first_key + start - item.first_p
        new = _new_tokens(config, refs, lambda piece: piece[pl.ds(row + unit, unit), :], unit)
        tokens = _tokens(config, refs, slot, start, unit)
        tokens[...] = _merge(config, new, tokens[...], lo, hi)
        page, has_page = _page_number(config, refs, item, start)
        place = schedule.whole_blocks(start, config.page_size)
        lo = schedule.whole_blocks(lo, tile)
        count = jnp.where(has_page, schedule.blocks_of(hi, tile) - lo, 0)
        writes.start(slot, place, page, start - place * config.page_size + lo * tile, count)

    lax.fori_loop(schedule.whole_blocks(first, unit), schedule.blocks_of(end, unit), put_unit, None)


def finish_tile(config: KernelConfig, refs: Refs, fetch, item: schedule.Item, is_last, applies=True):
    """Wait for what ``put_tile`` began; after the last item of a tile at the row block's end, fetch what needs it."""
    pl.when(applies & (refs.tile_writes[0] > 0))(_tile_writes(config, refs).wait)
    goes_on = is_last & (item.row + item.num_rows == config.block_rows)
    pl.when(applies & goes_on)(lambda: worklist.go_on(config, refs, fetch, item.row_block))


def put_rows(config: KernelConfig, refs: Refs, members):
    """The new tokens of the members of a decode group: the last item of a decode row holds its one."""
    has_new = [is_item & item.is_last & (item.first_p >= 0) for is_item, _, item in members]
    all_new, some_new = has_new[0], has_new[0]
    for is_new in has_new[1:]:
        all_new, some_new = all_new & is_new, some_new | is_new
    pl.when(all_new)(lambda: _put_rows(config, refs, members))  # side by side, without a branch

    @pl.when(some_new & ~all_new)
    def _():
        for is_new, member in zip(has_new, members, strict=True):
            pl.when(is_new)(lambda member=member: _put_rows(config, refs, [member]))


def wait_for_rows(config: KernelConfig, refs: Refs):
    """Wait until the new tokens of all decode rows are in their pages."""

    def wait(batch, _):
        pl.when(refs.row_writes[batch] > 0)(lambda: _wait_for_batch(config, refs, batch))

    lax.fori_loop(0, config.row_batches, wait, None)


def _put_rows(config: KernelConfig, refs: Refs, members):
    """The tokens of these members, as one batch of writes."""
    tile, batch = config.write_tokens, refs.cursor[worklist.ROW_BATCH]
    _wait_for_batch(config, refs, batch)
    tiles, count = [], jnp.int32(0)
    for _, slot, item in members:
        position = item.first_p - item.first_key
        start = pl.multiple_of(schedule.whole_blocks(position, tile) * tile, tile)
        row = item.row + config.unit_tokens
        new = _new_tokens(config, refs, lambda x, row=row: jnp.broadcast_to(x[pl.ds(row, 1), :], (tile, LANES)), tile)
        old = _tokens(config, refs, slot, start, tile)
        tiles.append((start, _merge(config, new, old[...], position - start, position - start + 1)))
    for place, ((_, slot, item), (start, tokens)) in enumerate(zip(members, tiles, strict=True)):
        _tokens(config, refs, slot, start, tile)[...] = tokens
        refs.row_buffer[batch, place] = tokens
        page, has_page = _page_number(config, refs, item, start)
        pl.when(has_page)(_row_copy(config, refs, batch, place, page, start & (config.page_size - 1)).start)
        count += has_page.astype(jnp.int32)
    refs.row_writes[batch] = count
    refs.cursor[worklist.ROW_BATCH] = (batch + 1) & (config.row_batches - 1)


def _wait_for_batch(config: KernelConfig, refs: Refs, batch):
    count = refs.row_writes[batch]
    for i in range(config.group_items):
        pl.when(count > i)(_row_copy(config, refs, batch, 0, 0, 0).wait)
    refs.row_writes[batch] = 0


def _tile_writes(config: KernelConfig, refs: Refs) -> SlotWrites:
    return SlotWrites(config, refs.kv_pages_hbm, refs.kv_buffer, refs.tile_write_sem, refs.tile_writes)


def _sources(config: KernelConfig, refs: Refs):
    return (refs.k, refs.k_rows, config.options.k_scale), (refs.v, refs.v_rows, config.options.v_scale)


def _new_tokens(config: KernelConfig, refs: Refs, take, count):
    """``count`` tokens as a page holds them; ``take`` gives those of one piece of a head, [count, 128]."""
    pieces = []
    for head in range(config.num_kv_heads):
        for rows in (refs.k_rows, refs.v_rows):
            pieces += [take(rows.at[head, part])[:, : config.part_lanes] for part in range(config.lane_parts)]
    if not config.heads_form:
        return _narrow(jnp.concatenate(pieces, axis=1), config.kv_dtype)  # v4 has no masks of 8-bit elements
    for i, piece in enumerate(pieces):  # only float32 may be stored by a stride
        refs.token_rows[pl.ds(i, count, stride=config.token_rows), :] = piece
    return _narrow(refs.token_rows[pl.ds(0, count * config.token_rows), :], config.kv_dtype)


def _narrow(x, dtype):
    """float32 that are values of ``dtype`` already."""
    return (x.astype(jnp.int32) if dtype == "int8" else x).astype(dtype)


def _merge(config: KernelConfig, new, old, lo, hi):
    """Of the tokens ``lo <= i < hi`` the new ones."""
    row = lax.broadcasted_iota(jnp.int32, (new.shape[0], 1), 0)
    is_new = (row >= lo * config.token_rows) & (row < hi * config.token_rows)
    if old.dtype.itemsize > 1:
        return jnp.where(is_new, new, old)
    # v4 has no masks of 8-bit elements. As integers, so that every code stays what it is.
    codes = [lax.bitcast_convert_type(x, jnp.int8).astype(jnp.int32) for x in (new, old)]
    return lax.bitcast_convert_type(jnp.where(is_new, *codes).astype(jnp.int8), old.dtype)


def _tokens(config: KernelConfig, refs: Refs, slot, start, count):
    """``count`` tokens of a slot from token ``start`` of its key block on, all of one page."""
    page = schedule.whole_blocks(start, config.page_size)
    rows = rows_of(config, start - page * config.page_size, count, count)
    return in_slot(config, refs.kv_buffer, slot, page, rows)


def _page_number(config: KernelConfig, refs: Refs, item: schedule.Item, start):
    """The number of the page that holds token ``start`` of the key block, and whether there is such a page."""
    page = schedule.whole_blocks(item.first_key + start, config.page_size)
    number = refs.page_indices[item.seq * config.pages_per_seq + page]
    return number, (number >= 0) & (number < config.num_pages)


def _row_copy(config: KernelConfig, refs: Refs, batch, place, page, token):
    rows = rows_of(config, token, config.write_tokens, config.write_tokens)
    source, target = refs.row_buffer.at[batch, place], refs.kv_pages_hbm.at[page, rows]
    return pltpu.make_async_copy(source, target, refs.row_write_sems.at[batch])
