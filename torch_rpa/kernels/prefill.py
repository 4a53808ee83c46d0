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

    def attend_step(step, _):
        _attend_step(config, refs, item, span, step, finish)

    def finish(step, head_set):
        """What was put into the slots is in the pages beside the first heads of the first rows that see the span."""
        if config.puts_tokens:
            is_first = (head_set == 0) & ((step == 0) | ~_sees_some(config, item, span, step - 1))
            write.finish_tile(config, refs, fetch, item, span.end == item.end, is_first)

    lax.fori_loop(0, schedule.blocks_of(item.num_rows * config.group, config.step_rows), attend_step, None)
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


def _sees_some(config: KernelConfig, item: Item, span: Span, step):
    """Whether a step of rows attends to the span: some row sees a key, or the span is the first and leaves a state."""
    rows = _rows_of_step(config, item, step)
    start, end = mask.key_range(rows.first_p, rows.last_p, item.end, **config.options.mask)
    return item.is_first | (start <= _last_key(config, span)) & (end > span.first_key)


def _attend_step(config: KernelConfig, refs: Refs, item: Item, span: Span, step, finish):
    """A step of rows that sees a key, by the shortest code that does.

    That is a matter of time only: masks that hide nothing, blocks that no row sees and a state of no key change no bit.
    """
    rows, first_key, last_key = _rows_of_step(config, item, step), span.first_key, _last_key(config, span)
    sees_all = mask.all_visible(rows.first_p, rows.last_p, first_key, last_key, **config.options.mask)
    sees_all &= (first_key >= span.start) & (last_key < span.end)
    is_plain = sees_all & ~item.is_first

    def attend(num_pages, is_edge, is_first):
        product = Product(config, refs, item, rows, span, num_pages, is_edge, is_first)
        product.attend(lambda head_set: finish(step, head_set))

    pl.when(is_plain)(lambda: attend(config.edge_pages[-1], is_edge=False, is_first=False))

    @pl.when(_sees_some(config, item, span, step) & ~is_plain)
    def _():
        _, end = mask.key_range(rows.first_p, rows.last_p, item.end, **config.options.mask)
        num_keys = jnp.maximum(jnp.minimum(end, span.end) - first_key, 0)
        for num_pages, is_fewest in schedule.fewest_pages(config, config.edge_pages, num_keys):
            for is_first in (True, False):
                applies = is_fewest & (item.is_first == is_first)
                pl.when(applies)(lambda n=num_pages, first=is_first: attend(n, is_edge=True, is_first=first))


def _last_key(config: KernelConfig, span: Span):
    return span.first_key + config.span_blocks * config.block_keys - 1


class Product(NamedTuple):
    """Some rows of every KV head, and the keys of a span's first pages.

    Attributes:
        is_edge: some row may not see some key.
        is_first: no row has a state yet.
    """

    config: KernelConfig
    refs: Refs
    item: Item
    rows: Rows
    span: Span
    num_pages: int
    is_edge: bool
    is_first: bool

    def attend(self, after_set):
        """Every head, a set of them after the other; ``after_set(head_set)`` is called after each."""
        heads = self.config.prefill_heads(self.is_edge, self.is_first)

        def attend_set(head_set, _):
            self._attend_set(head_set, heads)
            after_set(head_set)

        if heads == self.config.num_kv_heads:
            attend_set(0, None)
        else:
            lax.fori_loop(0, self.config.num_kv_heads // heads, attend_set, None)

    def _attend_set(self, head_set, heads):
        """Heads one after the other; in the source, each one's scores stand before the sums of the head before it.

        The matrix unit works in program order: it computes scores while the vector units weigh those of the last head.
        """
        kv, first, chunk = self._load(head_set, heads), head_set * heads, None
        for n in range(heads + 1):
            before = chunk
            if n < heads:
                chunk = self._score(first + n, kv[n][0])
            if n > 0:
                self._accumulate(first + n - 1, before, kv[n - 1][1])

    def _load(self, head_set, heads):
        """k and v [keys, head_dim] of every head of a set of so many."""
        head_dim, block_pages = self.config.head_dim, min(self.num_pages, self.config.block_pages)
        slots = self.span.slots[: self.num_pages // block_pages]
        blocks = [load_kv(self.config, self.refs, slot, head_set, heads, block_pages) for slot in slots]
        kv = jnp.concatenate(blocks, axis=0)
        pieces = [kv[:, i * head_dim : (i + 1) * head_dim] for i in range(2 * heads)]
        return list(zip(pieces[0::2], pieces[1::2], strict=True))

    def _score(self, head, k) -> Chunk:
        """The scores of a head's rows, -inf where a row does not see a key."""
        config = self.config
        q = _read_rows(config, self.refs.q_rows, head, self.rows).astype(config.compute_dtype)
        scores = softmax.logits(q, k, scale=config.score_scale, soft_cap=config.options.soft_cap)
        if self.is_edge:
            scores = _hide_scores(config, scores, _bounds(config, self.item, self.rows, self.span), self.span.first_key)
        return softmax.enter(None if self.is_first else self.refs.top_rows[head, self._matrix_rows, :], scores)

    def _accumulate(self, head, chunk: Chunk, values):
        """Add the weighted values to the state of a head's rows."""
        config, refs, total, acc = self.config, self.refs, None, None
        if self.is_edge:
            values = _hide_values(config, self.span, values)
        if not self.is_first:
            total, acc = refs.total_rows[head, self._matrix_rows, :], _read_rows(config, refs.acc_rows, head, self.rows)
        state = softmax.accumulate(total, acc, chunk, values)
        refs.top_rows[head, self._matrix_rows, :] = state.top
        refs.total_rows[head, self._matrix_rows, :] = state.total
        _write_rows(config, refs.acc_rows, head, self.rows, state.acc)

    @property
    def _matrix_rows(self):
        return pl.ds(self.rows.first, self.rows.count)


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
