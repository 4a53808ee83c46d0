"""Which rows and which keys the kernel works on, and in which order: plain functions of integers.

The work of a batch is one list:

    for each row block
        for each sequence with rows in it              a tile; first those of prefill, then decode rows
            for each key block that the tile can see   an item of work

Prefill waits for the matrix units and decode for HBM: the pages of the decode rows come in while prefill tiles compute.
Decode rows come last also because a prefill tile's last step may reach into the rows behind it (``prefill.py``).
Every item's pages can be fetched long before its turn, because the next item follows from the metadata alone. The
arguments may be Python integers or the scalars of a kernel.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from torch_rpa import mask
from torch_rpa.kernels.config import KernelConfig


class Tile(NamedTuple):
    """The rows of one sequence inside one row block, and the keys that they need.

    Attributes:
        row: its first row, counted from the start of the row block.
        num_rows: how many; 0 for a sequence without rows.
        first_p: position of its first row in the sequence.
        is_decode: the sequence has one row in all.
        start, end: the keys ``start <= j < end`` hold all that its rows see.
        first_block, end_block: the key blocks with such keys, at least one; for prefill from a whole span on.
        past_block: the sequence goes on in the next row block.
    """

    row: int
    num_rows: int
    first_p: int
    is_decode: bool
    start: int
    end: int
    first_block: int
    end_block: int
    past_block: bool


def make_tile(config: KernelConfig, row_block, first_row, end_row, kv_len, only_new=False) -> Tile:
    """The tile of ``row_block`` and the sequence with rows first_row .. end_row - 1 and ``kv_len`` keys.

    With ``only_new``, the keys that it needs are those of its own rows.
    """
    block_start = row_block * config.block_rows
    block_end = block_start + config.block_rows
    tile_start, tile_end = jnp.maximum(first_row, block_start), jnp.minimum(end_row, block_end)
    first_p = kv_len - (end_row - tile_start)
    last_p = first_p + tile_end - tile_start - 1
    start, end = mask.key_range(first_p, last_p, kv_len, **config.options.mask)
    start, end = jnp.where(only_new, first_p, start), jnp.where(only_new, last_p + 1, end)
    start, end = jnp.maximum(start, 0), jnp.clip(end, 0, kv_len)
    is_decode = end_row - first_row == 1
    # A prefill tile's spans are counted from the sequence's start, or sums would depend on where its rows fall. What
    # stands before ``start`` is not fetched.
    first_block = whole_blocks(start, config.block_keys)
    span_start = whole_blocks(first_block, config.span_blocks) * config.span_blocks
    first_block = jnp.where(is_decode, first_block, span_start)
    end_block = jnp.maximum(blocks_of(end, config.block_keys), first_block + 1)
    return Tile(
        row=tile_start - block_start,
        num_rows=tile_end - tile_start,
        first_p=first_p,
        is_decode=is_decode,
        start=start,
        end=end,
        first_block=first_block,
        end_block=end_block,
        past_block=end_row > block_end,
    )


class Item(NamedTuple):
    """One key block of one tile: what the kernel has to know of it once its pages are on their way.

    Attributes:
        row_block: the tile's; the number of row blocks for an item past the end of the list.
        seq: the tile's sequence.
        row, num_rows, first_p, is_decode, start, end: the tile's.
        is_first, is_last: whether the block is the tile's first, its last.
        first_key: position of the block's first key.
        num_units: how much of it is fetched, see ``Pages``.
    """

    row_block: int
    seq: int
    row: int
    num_rows: int
    first_p: int
    is_decode: bool
    start: int
    end: int
    is_first: bool
    is_last: bool
    first_key: int
    num_units: int


def make_item(config: KernelConfig, row_block, seq, tile: Tile, block) -> Item:
    """The item of key block ``block`` of a tile of sequence ``seq``."""
    pages = needed_pages(config, tile, block)
    return Item(
        row_block=row_block,
        seq=seq,
        row=tile.row,
        num_rows=tile.num_rows,
        first_p=tile.first_p,
        is_decode=tile.is_decode,
        start=tile.start,
        end=tile.end,
        is_first=block == tile.first_block,
        is_last=block + 1 == tile.end_block,
        first_key=block * config.block_keys,
        num_units=(pages.end_full - pages.first) * config.units_per_page + pages.tail_units,
    )


class Pages(NamedTuple):
    """What a key block fetches: pages ``first <= i < end_full`` of the sequence, ``tail_units`` of page end_full."""

    first: int
    end_full: int
    tail_units: int


def needed_pages(config: KernelConfig, tile: Tile, block) -> Pages:
    """What the key block ``block`` of a tile's sequence has to fetch."""
    first = jnp.maximum(whole_blocks(tile.start, config.page_size), block * config.block_pages)
    end = jnp.minimum(tile.end, (block + 1) * config.block_keys)
    # Of the last page as many units as hold tokens; all of them is a full page.
    units = blocks_of(end, config.unit_tokens)
    end_full = jnp.maximum(whole_blocks(units, config.units_per_page), first)
    tail_units = jnp.maximum(units - end_full * config.units_per_page, 0)
    return Pages(first, end_full, tail_units)


def fewest_pages(config: KernelConfig, choices, num_keys):
    """(num_pages, whether it is the fewest that hold ``num_keys``) for every one of ascending ``choices``."""
    fewer = -1
    for num_pages in choices:
        keys = num_pages * config.page_size
        yield num_pages, (num_keys > fewer) & (num_keys <= keys)
        fewer = keys


def whole_blocks(count, size: int):
    """``count // size`` for count >= 0, as a shift where that is possible: scalar cores divide slowly."""
    if size & (size - 1) == 0:
        return count >> (size.bit_length() - 1)
    return count // size if isinstance(count, int) else lax.div(count, jnp.int32(size))


def blocks_of(count, size: int):
    """How many blocks of ``size`` hold ``count >= 0`` things."""
    return whole_blocks(count + size - 1, size)
