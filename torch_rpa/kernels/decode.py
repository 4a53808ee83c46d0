"""Attention of decode rows: for each item, all query heads of a set of KV heads in two matrix products.

    q of a product, block-diagonal           k of an item                      scores
    [heads, heads * head_dim]        @    [keys, heads * head_dim].T       =   [heads, keys]

            K0 lanes   K1 lanes                 v of the item                  of which the diagonal is kept
    head 0  | q0 q0 |         |      weights @ [keys, heads * head_dim]      = |  o0  |      |
    head 1  | q1 q1 |         |                                                |  o1  |      |
    head 2  |       | q2 q2   |                                                |      |  o2  |
    head 3  |       | q3 q3   |                                                |      |  o3  |

A product has the fewest KV heads whose query heads are whole registers of rows. The zeros cost little: K and V pass the
A product has the fewest KV heads whose query heads are whole registers of rows. The zeros cost little: K and V pass the
and the softmax of 32 heads is as long as that of one.

A sequence of a few rows (drafts to verify) is more rows of the same products, each with keys up to its own position. A
row has registers of its own, and its sums and merges are those of a single row: its result is the same, bit for bit.

One item is a chain of long latencies (product, maximum, exponential, product), so several items of whatever rows are
computed side by side, each for itself (flash decoding, https://pytorch.org/blog/flash-decoding), and then merged in
their order into the state of their rows: what a row gives does not depend on the items beside its own.

Where head_dim is no multiple of 128, K and V are not taken apart: the lanes ``K0 V0 K1 V1`` stay as they are, q has
zeros in V's lanes, and the product has V's sums beside sums over K that nobody reads.
"""

import functools
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
from torch_rpa.kernels.softmax import State
from torch_rpa.options import MOST_DECODE_ROWS


class Member(NamedTuple):
    """One place of a group: an item and its slot, or nothing, with the slot of the member before it."""

    is_item: Any
    slot: Any
    item: Item


class Rows(NamedTuple):
    """The rows of every member that are computed together: ``count`` from row ``first`` of its tile on."""

    first: Any
    count: int


def clear_batch(refs: Refs):
    """Once for a batch: zeros outside the diagonal of q."""
    refs.decode_q[...] = jnp.zeros(refs.decode_q.shape, jnp.float32)


def attend_group(config: KernelConfig, refs: Refs, fetch, row_block, slot):
    """The decode items from ``slot`` on, as many as make a group; returns how many. There is at least one."""

    def attend_single_rows():
        members = _receive(config, refs, fetch, row_block, slot, config.group_items, most_rows=1)
        _attend_rows(config, refs, members, Rows(0, 1))
        return _count(members)

    def attend_several_rows():
        members = _receive(config, refs, fetch, row_block, slot, config.few_items, most_rows=MOST_DECODE_ROWS)
        most = functools.reduce(jnp.maximum, (jnp.where(is_item, item.num_rows, 0) for is_item, _, item in members))
        count = config.pass_rows

        def attend(n, _):
            _attend_rows(config, refs, members, Rows(n * count, count))

        lax.fori_loop(0, schedule.blocks_of(most, count), attend, None)
        if config.puts_tokens:
            write.go_on_after_rows(config, refs, fetch, members)
        return _count(members)

    return lax.cond(worklist.item_at(refs, slot).num_rows == 1, attend_single_rows, attend_several_rows)


def _receive(config: KernelConfig, refs: Refs, fetch, row_block, slot, count, most_rows) -> list[Member]:
    """Up to ``count`` members, of so many rows at most, whose pages have come."""
    members, is_item, own_slot = [], True, slot
    for _ in range(count):
        item = worklist.item_at(refs, slot)
        is_item &= (item.row_block == row_block) & item.is_decode & (item.num_rows <= most_rows)
        own_slot = jnp.where(is_item, slot, own_slot)  # a slot further on may be on its way
        members.append(Member(is_item, own_slot, item))
        slot = worklist.slot_after(config, slot)
    for member in members:
        fetch.wait(member.slot, jnp.where(member.is_item, member.item.num_units, 0))
    if config.puts_tokens:
        put = write.put_one_row_each if most_rows == 1 else write.put_rows
        put(config, refs, members)
    return members


def _count(members: list[Member]):
    return sum(member.is_item.astype(jnp.int32) for member in members)


def _attend_rows(config: KernelConfig, refs: Refs, members: list[Member], rows: Rows):
    """These rows of every member, on as few pages as they need."""
    for place, member in enumerate(members):
        _put_q(config, refs, place, jnp.where(member.is_item, member.item.row + rows.first, 0), rows.count)
    all_inside, keys = _needs(config, members)
    if rows.count > 1:
        all_inside = jnp.bool_(False)  # their masks cost little
    else:
        pl.when(all_inside)(lambda: _attend_members(config, refs, members, rows, config.block_pages, is_edge=False))

    @pl.when(~all_inside)
    def _():
        for num_pages, is_fewest in schedule.fewest_pages(config, config.decode_pages, keys):
            pl.when(is_fewest)(lambda n=num_pages: _attend_members(config, refs, members, rows, n, is_edge=True))


def _needs(config: KernelConfig, members: list[Member]):
    """Whether all rows of all members see all keys, and how many of its block's first keys some member needs."""
    all_inside, most = True, 0
    for is_item, _, item in members:
        last_p, last_key = item.first_p + item.num_rows - 1, item.first_key + config.block_keys - 1
        sees_all = mask.all_visible(item.first_p, last_p, item.first_key, last_key, **config.options.mask)
        all_inside &= is_item & sees_all & (item.first_key >= item.start) & (last_key < item.end)
        most = jnp.maximum(most, jnp.where(is_item, item.end - item.first_key, 0))
    return all_inside, jnp.minimum(most, config.block_keys)


def _put_q(config: KernelConfig, refs: Refs, place, first_row, count):
    """The queries of ``count`` rows on the diagonals of q, for the member at a place of the group."""
    width, group = config.part_lanes, config.group
    for r in range(count):
        row = jnp.minimum(first_row + r, config.block_rows - 1)  # what comes behind a tile is not used
        for head in range(config.num_kv_heads):
            head_set, product, n = _place_of(config, head)
            for part in range(config.lane_parts):
                lane = n * config.k_lanes.step + part * width
                q = refs.q_rows.at[head, part][pl.ds(row * group, group), :][:, :width]
                index = head_set, product, place * count + r, pl.ds(n * group, group), pl.ds(lane, width)
                refs.decode_q[index] = q


def _place_of(config: KernelConfig, head):
    """Of a KV head: its set, its product in the set and its place there."""
    head_set, head = divmod(head, config.set_heads)
    return head_set, *divmod(head, config.product_heads)


def _attend_members(config: KernelConfig, refs: Refs, members: list[Member], rows: Rows, num_pages, is_edge):
    """Every head set of every member, on the first ``num_pages`` of its block; ``is_edge`` if some key is not seen."""

    def attend_set(head_set, _):
        parts = _attend_each(config, refs, members, rows, head_set, num_pages, is_edge)
        merge = _merge_one_row if rows.count == 1 else _merge_rows
        merge(config, refs, members, rows, head_set, parts)

    if config.num_head_sets == 1:
        attend_set(0, None)
    else:
        lax.fori_loop(0, config.num_head_sets, attend_set, None)


def _attend_each(config: KernelConfig, refs: Refs, members, rows: Rows, head_set, num_pages, is_edge) -> list[State]:
    """The state of every member alone, stage by stage: the matrix unit works in program order, and must not wait."""
    kv = [_load_kv(config, refs, member.slot, head_set, num_pages) for member in members]
    scores = [_score(config, refs, place, rows, head_set, k) for place, (k, _) in enumerate(kv)]
    values = [v for _, v in kv]
    if is_edge:
        hide = functools.partial(_hide, config, rows)
        scores, values = zip(*map(hide, members, scores, values), strict=True)
    tops = [softmax.raise_top(softmax.LOWEST, s) for s in scores]
    weights = [softmax.weigh(s, top) for s, top in zip(scores, tops, strict=True)]
    sums = [_sum_values(config, rows, w, v) for w, v in zip(weights, values, strict=True)]
    return [State(t, softmax.add_up(w), a) for t, w, a in zip(tops, weights, sums, strict=True)]


def _score(config: KernelConfig, refs: Refs, place, rows: Rows, head_set, k):
    """[matrix rows of a set, keys]: of each product, row after row, the query heads of its KV heads."""
    scale, soft_cap, width = config.score_scale, config.options.soft_cap, config.product_heads * config.k_lanes.step
    scores = []
    for product in range(config.num_products):
        q = refs.decode_q[head_set, product, place * rows.count : (place + 1) * rows.count]
        q = q.reshape(-1, width).astype(config.compute_dtype)
        k_lanes = k[:, product * width : (product + 1) * width]
        scores.append(softmax.logits(q, k_lanes, scale=scale, soft_cap=soft_cap))
    return jnp.concatenate(scores, axis=0)


def _sum_values(config: KernelConfig, rows: Rows, weights, v):
    """[matrix rows of a set, head_dim]: every row's weighted values of its own KV head."""
    count, width, sums = rows.count * config.product_rows, config.product_heads * config.v_lanes.step, []
    for product in range(config.num_products):
        of_product = slice(product * count, (product + 1) * count)
        acc = softmax.sum_values(weights[of_product], v[:, product * width : (product + 1) * width])
        sums.append(_diagonal(config, acc))
    return jnp.concatenate(sums, axis=0)


def _diagonal(config: KernelConfig, acc):
    """[rows, head_dim]: of every query head the lanes of its own KV head, from [rows, product_heads * lanes]."""
    row = lax.broadcasted_iota(jnp.int32, (config.product_rows, 1), 0)
    row = jnp.concatenate([row] * (len(acc) // config.product_rows), axis=0)
    first, step = config.v_lanes
    diagonal = acc[:, first : first + config.head_dim]
    for n in range(1, config.product_heads):
        lane = first + n * step
        diagonal = jnp.where(row >= n * config.group, acc[:, lane : lane + config.head_dim], diagonal)
    return diagonal


def _load_kv(config: KernelConfig, refs: Refs, slot, head_set, num_pages):
    """k and v [keys, lanes] of a set."""
    kv = load_kv(config, refs, slot, head_set, config.set_heads, num_pages)
    if not config.splits_kv:
        return kv, kv
    halves = [kv[:, i * config.head_dim : (i + 1) * config.head_dim] for i in range(2 * config.set_heads)]
    return jnp.concatenate(halves[0::2], axis=1), jnp.concatenate(halves[1::2], axis=1)


def _hide(config: KernelConfig, rows: Rows, member: Member, scores, v):
    """Scores with -inf where their row sees no key, values with zeros where none does.

    There v may be anything, and 0 * NaN is NaN.
    """
    item = member.item
    start, end = jnp.where(member.is_item, item.start, 0), jnp.where(member.is_item, item.end, 0)

    def needed(shape, axis):
        j = item.first_key + lax.broadcasted_iota(jnp.int32, shape, axis)
        return j, (j >= start) & (j < end)

    j, is_needed = needed((1, len(v)), 1)
    p = (item.first_p + rows.first + r for r in range(rows.count))
    seen = [is_needed & mask.visible(row_p, j, **config.options.mask) for row_p in p] * config.num_products
    pieces = [scores[i * config.product_rows : (i + 1) * config.product_rows] for i in range(len(seen))]
    pieces = [jnp.where(*args, -jnp.inf) for args in zip(seen, pieces, strict=True)]
    return jnp.concatenate(pieces, axis=0), jnp.where(needed((len(v), 1), 0)[1], v, jnp.zeros_like(v))


def _load_state(refs: Refs, head_set, first, count) -> State:
    """The state between groups of these rows of a tile: of each product, row after row."""
    kept = refs.decode_top, refs.decode_total, refs.decode_acc
    return State(*(ref[head_set, :, pl.ds(first, count)].reshape(-1, ref.shape[-1]) for ref in kept))


def _store_state(config: KernelConfig, refs: Refs, head_set, rows: Rows, state: State):
    shape = config.num_products, rows.count, config.product_rows
    for ref, value in zip((refs.decode_top, refs.decode_total, refs.decode_acc), state, strict=True):
        ref[head_set, :, pl.ds(rows.first, rows.count)] = value.reshape(*shape, -1)


def _after(member: Member, state: State, part: State) -> State:
    """The state of a member's rows after it, from that after the member before."""
    is_new = member.is_item & member.item.is_first
    state = State(*(jnp.where(is_new, *pair) for pair in zip(softmax.EMPTY, state, strict=True)))
    return softmax.merge(state, part)


def _merge_one_row(config: KernelConfig, refs: Refs, members: list[Member], rows: Rows, head_set, parts: list[State]):
    """The state of every member's row after it; that of the last one is kept for the next group."""
    state, states = _load_state(refs, head_set, *rows), []
    for member, part in zip(members, parts, strict=True):
        state = _after(member, state, part)
        states.append(state)
    _store_state(config, refs, head_set, rows, state)
    for member, state in zip(members, states, strict=True):
        done = member.is_item & member.item.is_last & (rows.first < member.item.num_rows)
        row = member.item.row + rows.first
        pl.when(done)(lambda state=state, row=row: _put_state(config, refs, head_set, row, state))


def _merge_rows(config: KernelConfig, refs: Refs, members: list[Member], rows: Rows, head_set, parts: list[State]):
    """The same for several rows of each member, whose state is too large for registers."""
    for member, part in zip(members, parts, strict=True):
        state = _after(member, _load_state(refs, head_set, *rows), part)
        _store_state(config, refs, head_set, rows, state)
        done, first = member.is_item & member.item.is_last, member.item.row + rows.first

        def put(r, _, first=first):
            _put_state(config, refs, head_set, first + r, _load_state(refs, head_set, rows.first + r, 1))

        count = jnp.minimum(member.item.num_rows - rows.first, rows.count)
        lax.fori_loop(0, jnp.where(done, count, 0), put, None)


def _put_state(config: KernelConfig, refs: Refs, head_set, row, state: State):
    """A finished row's state to where those of prefill rows stand."""
    matrix_rows = pl.ds(row * config.group, config.group)
    width = config.part_lanes
    pieces = [fill_lanes(state.acc[:, part * width : (part + 1) * width]) for part in range(config.lane_parts)]
    for n in range(config.set_heads):
        product, place = divmod(n, config.product_heads)
        first = product * config.product_rows + place * config.group
        head, heads = head_set * config.set_heads + n, slice(first, first + config.group)
        refs.top_rows.at[head][matrix_rows, :] = state.top[heads]
        refs.total_rows.at[head][matrix_rows, :] = state.total[heads]
        for part, piece in enumerate(pieces):
            refs.acc_rows.at[head, part][matrix_rows, :] = piece[heads]
