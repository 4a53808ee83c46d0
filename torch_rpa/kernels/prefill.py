"""Attention of a prefill tile: the rows of each KV head's matrix in steps of ``step_rows``, over chunks of keys."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from torch_rpa import mask
from torch_rpa.kernels import schedule, softmax
from torch_rpa.kernels.config import LANES, KernelConfig, fill_lanes
from torch_rpa.kernels.refs import Refs
from torch_rpa.kernels.schedule import Item
from torch_rpa.kernels.softmax import State

_CLEAR_ROWS = 8


class Rows(NamedTuple):
    """``count`` rows of a KV head's matrix from ``first`` on.

    Attributes:
        first_p, last_p: positions of the first and the last row that belongs to the item.
    """

    first: Any
    count: int
    first_p: Any
    last_p: Any


def attend_item(config: KernelConfig, refs: Refs, fetch, item: Item, slot):
    """Every KV head of the item's tile over its key block; returns how many items that were: 1."""
    fetch.wait(slot, item.num_units)
    pl.when(item.is_first)(lambda: _clear_tile(config, refs, item))
    heads, lanes = config.heads_per_step, config.heads_per_step * 2 * config.head_dim

    def attend_heads(i, _):
        first_lane = i * lanes if isinstance(i, int) else pl.multiple_of(i * lanes, LANES)
        for n in range(heads):
            _attend_head(config, refs, item, i * heads + n, lambda n=n: _load_kv(config, refs, slot, first_lane, n))

    if config.num_kv_heads == heads:
        attend_heads(0, None)
    else:
        lax.fori_loop(0, config.num_kv_heads // heads, attend_heads, None)
    return jnp.int32(1)


def _clear_tile(config: KernelConfig, refs: Refs, item: Item):
    """No key seen yet. Rows past the tile are those of later tiles, which clear them again."""
    first = item.row * config.group

    def clear(i, _):
        for ref, value in ((refs.acc_rows, 0.0), (refs.top_rows, softmax.LOWEST), (refs.total_rows, 0.0)):
            rows = (slice(None),) * (len(ref.shape) - 2) + (pl.ds(first + i * _CLEAR_ROWS, _CLEAR_ROWS), slice(None))
            shape = (*ref.shape[:-2], _CLEAR_ROWS, ref.shape[-1])
            ref[rows] = jnp.full(shape, value, jnp.float32)

    lax.fori_loop(0, schedule.blocks_of(item.num_rows * config.group, _CLEAR_ROWS), clear, None)


def _attend_head(config: KernelConfig, refs: Refs, item: Item, head, load_kv):
    """Each step of rows that sees one of the keys; masked only if some row of it does not see some key."""
    first_key, last_key = item.first_key, item.first_key + config.block_keys - 1

    def attend_step(step, _):
        rows = _rows_of_step(config, item, step)
        start, end = mask.key_range(rows.first_p, rows.last_p, item.end, **config.options.mask)
        sees_some = (start <= last_key) & (end > first_key)
        sees_all = mask.all_visible(rows.first_p, rows.last_p, first_key, last_key, **config.options.mask)
        sees_all &= (first_key >= item.start) & (last_key < item.end)
        for is_edge, applies in ((False, sees_all), (True, sees_some & ~sees_all)):
            pl.when(applies)(lambda is_edge=is_edge: _attend_rows(config, refs, item, rows, head, load_kv, is_edge))

    lax.fori_loop(0, schedule.blocks_of(item.num_rows * config.group, config.step_rows), attend_step, None)


def _attend_rows(config: KernelConfig, refs: Refs, item: Item, rows: Rows, head, load_kv, is_edge):
    k, v = load_kv()
    q = _read_rows(config, refs.q_rows, head, rows).astype(config.compute_dtype)
    scores = softmax.logits(q, k, scale=config.options.score_scale, soft_cap=config.options.soft_cap)
    if is_edge:
        scores, v = _hide(config, item, rows, scores, v)
    matrix_rows = pl.ds(rows.first, rows.count)
    top, total = refs.top_rows[head, matrix_rows, :], refs.total_rows[head, matrix_rows, :]
    state = softmax.update(State(top, total, _read_rows(config, refs.acc_rows, head, rows)), scores, v)
    refs.top_rows[head, matrix_rows, :] = state.top
    refs.total_rows[head, matrix_rows, :] = state.total
    _write_rows(config, refs.acc_rows, head, rows, state.acc)


def _rows_of_step(config: KernelConfig, item: Item, step) -> Rows:
    first = step * config.step_rows
    last = jnp.minimum(first + config.step_rows, item.num_rows * config.group) - 1
    first_p = item.first_p + schedule.whole_blocks(first, config.group)
    last_p = item.first_p + schedule.whole_blocks(last, config.group)
    return Rows(item.row * config.group + first, config.step_rows, first_p, last_p)


def _hide(config: KernelConfig, item: Item, rows: Rows, scores, v):
    """Scores with -inf where a row does not see a key, values with zeros where no row needs a key: 0 * NaN is NaN."""

    def needed(j):
        return (j >= item.start) & (j < item.end)

    row = rows.first - item.row * config.group + lax.broadcasted_iota(jnp.int32, (rows.count, 1), 0)
    if config.group > 1:  # row // group by way of float32: vector units have no integer division
        row = ((row.astype(jnp.float32) + 0.5) * (1 / config.group)).astype(jnp.int32)
    j = item.first_key + lax.broadcasted_iota(jnp.int32, (1, config.block_keys), 1)
    seen = needed(j) & mask.visible(item.first_p + row, j, **config.options.mask)
    j = item.first_key + lax.broadcasted_iota(jnp.int32, (config.block_keys, 1), 0)
    return jnp.where(seen, scores, -jnp.inf), jnp.where(needed(j), v, jnp.zeros_like(v))


def _load_kv(config: KernelConfig, refs: Refs, slot, first_lane, n):
    """k and v [keys, head_dim] of the n-th head of those whose lanes begin at ``first_lane``."""
    head_dim, lanes = config.head_dim, config.heads_per_step * 2 * config.head_dim
    kv = refs.kv_buffer[slot, :, :, pl.ds(first_lane, lanes)]
    kv = kv[:, :, 2 * n * head_dim : 2 * (n + 1) * head_dim]
    kv = config.widen(kv).reshape(config.block_keys, 2 * head_dim)
    return kv[:, :head_dim], kv[:, head_dim:]


def _read_rows(config: KernelConfig, ref, head, rows: Rows):
    """[rows, head_dim] from scratch that keeps a head's lanes in parts."""
    pieces = [ref[head, part, pl.ds(rows.first, rows.count), :] for part in range(config.lane_parts)]
    pieces = [piece[:, : config.part_lanes] for piece in pieces]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)


def _write_rows(config: KernelConfig, ref, head, rows: Rows, new):
    lanes = config.part_lanes
    for part in range(config.lane_parts):
        piece = new[:, part * lanes : (part + 1) * lanes]
        ref[head, part, pl.ds(rows.first, rows.count), :] = fill_lanes(piece)
