"""This step's k and v to their places in the pages, in place, a row block at a time.

The rows of a sequence go to consecutive positions, which fall into tiles of ``write_tokens`` slots, the least that a
DMA moves (a *unit*). What a unit does not replace is read first, merged, and written back:

    rows of k   | . r1 r2 r3 r4 r5 |            positions 6 .. 10 of their sequence, tiles of 4 slots

    page slots    [ 4  5  6  7 ] [ 8  9 10 11 ]
    unit 0          o  o r1 r2                   lo = 2, hi = 4, first_row: the row that would stand in slot 4
    unit 1                         r3 r4 r5  o   lo = 0, hi = 3

The units of a row block are listed first, so that their reads, and then their writes, are all on their way together.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_rpa.kernels import schedule, worklist
from torch_rpa.kernels.config import COPY_ROWS, KernelConfig, fill_lanes
from torch_rpa.kernels.quantize import quantize
from torch_rpa.kernels.refs import Refs

_READS, _WRITES = 0, 1


class Unit(NamedTuple):
    """One tile of one page: its slots ``lo <= i < hi`` get the rows ``first_row + i`` of the row block."""

    page: int
    slot: int
    first_row: int
    lo: int
    hi: int


def write_block(config: KernelConfig, refs: Refs, row_block):
    """Write all new tokens of a row block, and wait until they are there."""
    _regroup(config, refs)
    count = _list_units(config, refs, row_block)
    slots = config.write_buffer_shape[0]

    def write_batch(batch, _):
        first = batch * slots
        end = jnp.minimum(first + slots, count)
        lax.fori_loop(first, end, lambda i, _: _read(config, refs, i, i - first), None)
        # All reads before the first merge: they end in any order, and a wait counts bytes of whichever came.
        lax.fori_loop(first, end, lambda i, _: _wait_read(config, refs, i, i - first), None)
        lax.fori_loop(first, end, lambda i, _: _merge(config, refs, i, i - first), None)
        lax.fori_loop(first, end, lambda i, _: _copy(config, refs, Unit(0, 0, 0, 0, 0), 0, _WRITES).wait(), None)

    lax.fori_loop(0, schedule.blocks_of(count, slots), write_batch, None)


def _regroup(config: KernelConfig, refs: Refs):
    """k and v of the row block as float32 by head, so that a tile may begin at any row."""

    def regroup(i, _):
        rows = pl.ds(pl.multiple_of(i * COPY_ROWS, COPY_ROWS), COPY_ROWS)
        to_rows = pl.ds(pl.multiple_of(i * COPY_ROWS, COPY_ROWS) + config.write_tokens, COPY_ROWS)
        heads, parts, lanes = config.num_kv_heads, config.lane_parts, config.part_lanes
        for piece in range(heads * parts):
            for source, target in ((refs.k, refs.k_rows), (refs.v, refs.v_rows)):
                new = source[rows, piece * lanes : (piece + 1) * lanes].astype(jnp.float32)
                target.at[piece // parts, piece % parts][to_rows, :] = fill_lanes(new)

    lax.fori_loop(0, config.block_rows // COPY_ROWS, regroup, None)


def _list_units(config: KernelConfig, refs: Refs, row_block):
    """List what to write of the row block in SMEM; returns how many units that is."""
    cursor, num_seqs = refs.cursor, worklist.active_seqs(config, refs)

    def list_tile(carry):
        seq, _, count = carry
        tile = worklist.tile_of(config, refs, seq, row_block)
        first = schedule.whole_blocks(jnp.maximum(tile.first_p, 0), config.write_tokens)
        end = schedule.blocks_of(jnp.maximum(tile.first_p + tile.num_rows, 0), config.write_tokens)
        count = lax.fori_loop(first, end, lambda i, count: _list_unit(config, refs, seq, tile, i, count), count)
        return *worklist.next_tile(config, refs, seq, row_block, tile), count

    def is_here(carry):
        seq, its_row_block, _ = carry
        return (seq < num_seqs) & (its_row_block == row_block)

    carry = cursor[worklist.WRITE_SEQ], cursor[worklist.WRITE_ROW_BLOCK], jnp.int32(0)
    cursor[worklist.WRITE_SEQ], cursor[worklist.WRITE_ROW_BLOCK], count = lax.while_loop(is_here, list_tile, carry)
    return count


def _list_unit(config: KernelConfig, refs: Refs, seq, tile, i, count):
    first_p = i * config.write_tokens
    page = schedule.whole_blocks(first_p, config.page_size)
    number = refs.page_indices[seq * config.pages_per_seq + jnp.minimum(page, config.pages_per_seq - 1)]
    unit = Unit(
        page=number,
        slot=first_p - page * config.page_size,
        first_row=tile.row + first_p - tile.first_p,
        lo=jnp.clip(tile.first_p - first_p, 0, config.write_tokens),
        hi=jnp.clip(tile.first_p + tile.num_rows - first_p, 0, config.write_tokens),
    )
    for field, value in enumerate(unit):
        refs.units[count * len(unit) + field] = value
    has_place = (number >= 0) & (number < config.num_pages) & (page < config.pages_per_seq)
    return jnp.where(has_place, count + 1, count)


def _unit(refs: Refs, i) -> Unit:
    return Unit(*(refs.units[i * len(Unit._fields) + field] for field in range(len(Unit._fields))))


def _read(config: KernelConfig, refs: Refs, i, place):
    unit = _unit(refs, i)
    pl.when(unit.hi - unit.lo < config.write_tokens)(lambda: _copy(config, refs, unit, place, _READS).start())


def _wait_read(config: KernelConfig, refs: Refs, i, place):
    unit = _unit(refs, i)
    pl.when(unit.hi - unit.lo < config.write_tokens)(lambda: _copy(config, refs, unit, place, _READS).wait())


def _merge(config: KernelConfig, refs: Refs, i, place):
    """Put the new rows among those that stay, and write the tile back."""
    unit = _unit(refs, i)
    row = lax.broadcasted_iota(jnp.int32, (config.write_tokens * config.token_rows, 1), 0)
    is_new = (row >= unit.lo * config.token_rows) & (row < unit.hi * config.token_rows)
    new = _new_tokens(config, refs, pl.ds(unit.first_row + config.write_tokens, config.write_tokens))
    refs.write_buffer[place] = jnp.where(is_new, new, refs.write_buffer[place])
    _copy(config, refs, unit, place, _WRITES).start()


def _new_tokens(config: KernelConfig, refs: Refs, rows):
    """These rows of k and v as the pages hold them."""
    pieces = []
    for head in range(config.num_kv_heads):
        for source, scale in ((refs.k_rows, config.options.k_scale), (refs.v_rows, config.options.v_scale)):
            parts = [source.at[head, part][rows, :][:, : config.part_lanes] for part in range(config.lane_parts)]
            pieces += [quantize(x, config.kv_dtype, scale) for x in parts]
    if not config.heads_form:
        return jnp.concatenate(pieces, axis=1)
    for i, piece in enumerate(pieces):  # only float32 may be stored by a stride
        refs.token_rows[pl.ds(i, config.write_tokens, stride=config.token_rows), :] = piece.astype(jnp.float32)
    return quantize(refs.token_rows[...], config.kv_dtype, None)


def _copy(config: KernelConfig, refs: Refs, unit: Unit, place, direction):
    count = config.write_tokens * config.token_rows
    rows = pl.ds(pl.multiple_of(unit.slot * config.token_rows, count), count)
    there, here = refs.kv_pages_hbm.at[unit.page, rows], refs.write_buffer.at[place]
    source, target = (there, here) if direction == _READS else (here, there)
    return pltpu.make_async_copy(source, target, refs.write_sems.at[direction])
