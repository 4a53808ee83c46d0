"""Which rows and which keys the kernel works on, and in which order: plain functions of integers.

The work of a batch is one list, in the order of the rows:

    for each row block
        for each sequence with rows in it              a tile
            for each key block that the tile can see   an item of work

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
        first_block, end_block: the key blocks with such keys; at least one.
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


def make_tile(config: KernelConfig, row_block, first_row, end_row, kv_len) -> Tile:
    """The tile of ``row_block`` and the sequence with rows first_row .. end_row - 1 and ``kv_len`` keys."""
    block_start = row_block * config.block_rows
    block_end = block_start + config.block_rows
    tile_start, tile_end = jnp.maximum(first_row, block_start), jnp.minimum(end_row, block_end)
    first_p = kv_len - (end_row - tile_start)
    last_p = first_p + tile_end - tile_start - 1
    start, end = mask.key_range(first_p, last_p, kv_len, **config.options.mask)
    start, end = jnp.maximum(start, 0), jnp.clip(end, 0, kv_len)
    first_block = whole_blocks(start, config.block_keys)
    end_block = jnp.maximum(blocks_of(end, config.block_keys), first_block + 1)
    return Tile(
        row=tile_start - block_start,
        num_rows=tile_end - tile_start,
        first_p=first_p,
        is_decode=end_row - first_row == 1,
        start=start,
        end=end,
        first_block=first_block,
        end_block=end_block,
        past_block=end_row > block_end,
    )


def needed_pages(config: KernelConfig, tile: Tile, block):
    """The pages ``first <= i < end`` of a tile's sequence that its key block ``block`` fetches."""
    first = jnp.maximum(whole_blocks(tile.start, config.page_size), block * config.block_pages)
    end = jnp.minimum(blocks_of(tile.end, config.page_size), (block + 1) * config.block_pages)
    return first, jnp.minimum(end, config.pages_per_seq)


def needed_chunks(tile: Tile, block, block_keys, chunk_keys):
    """The chunks ``first <= c < end`` of key block ``block``, counted from its start, with keys that the tile needs."""
    first = whole_blocks(jnp.maximum(tile.start - block * block_keys, 0), chunk_keys)
    end = blocks_of(jnp.clip(tile.end - block * block_keys, 0, block_keys), chunk_keys)
    return first, end


def whole_blocks(count, size: int):
    """``count // size`` for count >= 0, as a shift where that is possible: scalar cores divide slowly."""
    if size & (size - 1) == 0:
        return count >> (size.bit_length() - 1)
    return count // size if isinstance(count, int) else lax.div(count, jnp.int32(size))


def blocks_of(count, size: int):
    """How many blocks of ``size`` hold ``count >= 0`` things."""
    return whole_blocks(count + size - 1, size)
