"""Attention of a prefill tile: the rows of each KV head's matrix in steps of ``step_rows``, over chunks of keys."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from torch_rpa import mask
from torch_rpa.kernels import schedule, softmax, worklist, write
from torch_rpa.kernels.config import KernelConfig, fill_lanes
from torch_rpa.kernels.load import load_kv
from torch_rpa.kernels.refs import Refs
from torch_rpa.kernels.schedule import Item
from torch_rpa.kernels.softmax import Chunk


class Rows(NamedTuple):
    """``count`` rows of a KV head's matrix from ``first`` on.

    Attributes:
        first_p, last_p: positions of the first and the last row that belongs to the item.
    """

    first: Any
    count: int
    first_p: Any
    last_p: Any


class Span(NamedTuple):
    """The keys of some slots, of which the tile sees some in ``start <= j < end``."""

    slots: Any
    first_key: Any
    start: Any
    end: Any


def attend_item(config: KernelConfig, refs: Refs, fetch, item: Item, slot):
    """Every KV head of the item's tile over its key block and those that follow; returns how many items that was."""
    span, count = _take_span(config, refs, fetch, item, slot)
    num_sets = config.num_kv_heads // config.prefill_heads

    def attend_set(i, _):
        _attend_set(config, refs, item, span, i)
        if config.puts_tokens:  # written by now
            pl.when(i == 0)(lambda: write.finish_tile(config, refs, fetch, item, span.end == item.end))

    if num_sets == 1:
        attend_set(0, None)
    else:
        lax.fori_loop(0, num_sets, attend_set, None)
    return count


def _take_span(config: KernelConfig, refs: Refs, fetch, item: Item, slot):
    """Wait for the item and those of the same tile that follow it; the span, and how many items are in it."""
    _receive(config, refs, fetch, item, slot, True)
    slots, count, is_open, own_slot = [slot], jnp.int32(1), ~item.is_last, slot
    for _ in range(config.span_blocks - 1):
        slot = worklist.slot_after(config, slot)
        _receive(config, refs, fetch, worklist.item_at(refs, slot), slot, is_open)
        count += is_open.astype(jnp.int32)
        own_slot = jnp.where(is_open, slot, own_slot)  # a slot further on may be on its way
        is_open &= ~worklist.item_at(refs, slot).is_last
        slots.append(own_slot)
    end = jnp.minimum(item.end, item.first_key + count * config.block_keys)
    return Span(slots, item.first_key, item.start, end), count


def _receive(config: KernelConfig, refs: Refs, fetch, item: Item, slot, is_item):
    """Wait for the pages of an item, if there is one in the slot, and put the update's new tokens into it."""
    fetch.wait(slot, jnp.where(is_item, item.num_units, 0))
    if config.puts_tokens:
        pl.when(is_item)(lambda: write.put_tile(config, refs, item, slot))


def _attend_set(config: KernelConfig, refs: Refs, item: Item, span: Span, head_set):
    """A set of heads: each step of rows that sees a key; masked only if some row of it does not see some key."""
    first_key, last_key = span.first_key, span.first_key + config.span_blocks * config.block_keys - 1

    def attend_step(step, _):
        rows = _rows_of_step(config, item, step)
        start, end = mask.key_range(rows.first_p, rows.last_p, item.end, **config.options.mask)
        sees_some = (start <= last_key) & (end > first_key)
        sees_all = mask.all_visible(rows.first_p, rows.last_p, first_key, last_key, **config.options.mask)
        sees_all &= (first_key >= span.start) & (last_key < span.end)
        is_edge = (sees_some | item.is_first) & ~sees_all  # the first span leaves a state, whatever it sees
        pl.when(sees_all)(lambda: _attend_rows(config, refs, item, rows, span, head_set, is_edge=False))
        # Blocks that no row sees would add zeros: leaving them out changes no bit.
        is_short = jnp.minimum(end, span.end) <= first_key + config.block_keys
        variants = {len(span.slots): ~is_short, 1: is_short} if config.span_blocks > 1 else {1: True}
        for num_blocks, applies in variants.items():
            keys = span._replace(slots=span.slots[:num_blocks])
            pl.when(is_edge & applies)(
                lambda keys=keys: _attend_rows(config, refs, item, rows, keys, head_set, is_edge=True)
            )

    lax.fori_loop(0, schedule.blocks_of(item.num_rows * config.group, config.step_rows), attend_step, None)


def _attend_rows(config: KernelConfig, refs: Refs, item: Item, rows: Rows, span: Span, head_set, is_edge):
    """Heads one after the other; in the source, each one's scores stand before the sums of the head before it.

    The matrix unit works in program order: it computes scores while the vector units weigh those of the head before.
    """
    kv = _load_kv(config, refs, span, head_set)
    bounds = _bounds(config, item, rows, span) if is_edge else None
    chunk = None
    for n in range(config.prefill_heads + 1):
        before, head = chunk, head_set * config.prefill_heads + n
        if n < config.prefill_heads:
            chunk = _score(config, refs, item, head, rows, kv[n][0], bounds, span.first_key)
        if n > 0:
            values = _hide_values(config, span, kv[n - 1][1]) if is_edge else kv[n - 1][1]
            _accumulate(config, refs, item, head - 1, rows, before, values)


def _score(config: KernelConfig, refs: Refs, item: Item, head, rows: Rows, k, bounds, first_key) -> Chunk:
    """The scores of a head's rows, -inf where a row does not see a key."""
    q = _read_rows(config, refs.q_rows, head, rows).astype(config.compute_dtype)
    scores = softmax.logits(q, k, scale=config.score_scale, soft_cap=config.options.soft_cap)
    if bounds is not None:
        scores = _hide_scores(config, scores, bounds, first_key)
    top = refs.top_rows[head, pl.ds(rows.first, rows.count), :]
    return softmax.enter(jnp.where(item.is_first, softmax.LOWEST, top), scores)


def _accumulate(config: KernelConfig, refs: Refs, item: Item, head, rows: Rows, chunk: Chunk, values):
    """Add the weighted values to the state of a head's rows; before the first span of a tile there is none."""
    matrix_rows = pl.ds(rows.first, rows.count)
    total = jnp.where(item.is_first, 0.0, refs.total_rows[head, matrix_rows, :])
    acc = jnp.where(item.is_first, 0.0, _read_rows(config, refs.acc_rows, head, rows))
    state = softmax.accumulate(total, acc, chunk, values)
    refs.top_rows[head, matrix_rows, :] = state.top
    refs.total_rows[head, matrix_rows, :] = state.total
    _write_rows(config, refs.acc_rows, head, rows, state.acc)


def _rows_of_step(config: KernelConfig, item: Item, step) -> Rows:
    first = step * config.step_rows
    last = jnp.minimum(first + config.step_rows, item.num_rows * config.group) - 1
    first_p = item.first_p + schedule.whole_blocks(first, config.group)
    last_p = item.first_p + schedule.whole_blocks(last, config.group)
    return Rows(item.row * config.group + first, config.step_rows, first_p, last_p)


def _bounds(config: KernelConfig, item: Item, rows: Rows, span: Span):
    """int32 [rows, 1], twice: every row sees the keys ``start <= j < end`` of the span."""
    row = rows.first - item.row * config.group + lax.broadcasted_iota(jnp.int32, (rows.count, 1), 0)
    if config.group > 1:  # row // group by way of float32: vector units have no integer division
        row = ((row.astype(jnp.float32) + 0.5) * (1 / config.group)).astype(jnp.int32)
    p = item.first_p + row
    start, end = mask.key_range(p, p, span.end, **config.options.mask)
    return jnp.maximum(start, span.start), jnp.minimum(end, span.end)


def _hide_scores(config: KernelConfig, scores, bounds, first_key):
    """Scores with -inf where a row does not see a key."""
    start, end = bounds
    j = first_key + lax.broadcasted_iota(jnp.int32, (1, scores.shape[1]), 1)
    seen = j < end
    if config.options.sliding_window is not None:
        seen &= j >= start
    return jnp.where(seen, scores, -jnp.inf)


def _hide_values(config: KernelConfig, span: Span, values):
    """Values with zeros where no row needs a key; what is there may be NaN, and 0 * NaN is NaN."""
    j = span.first_key + lax.broadcasted_iota(jnp.int32, (len(values), 1), 0)
    return jnp.where((j >= span.start) & (j < span.end), values, jnp.zeros_like(values))


def _load_kv(config: KernelConfig, refs: Refs, span: Span, head_set):
    """k and v [keys, head_dim] of every head of a set."""
    head_dim, heads = config.head_dim, config.prefill_heads
    blocks = [load_kv(config, refs, slot, head_set, heads, config.block_pages) for slot in span.slots]
    kv = jnp.concatenate(blocks, axis=0)
    pieces = [kv[:, i * head_dim : (i + 1) * head_dim] for i in range(2 * heads)]
    return list(zip(pieces[0::2], pieces[1::2], strict=True))


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
