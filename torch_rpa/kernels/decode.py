"""Attention of decode rows: for each item, all query heads of a set of KV heads in two matrix products.

    q of a set, block-diagonal               k of an item                      scores
    [heads, set_heads * head_dim]    @    [keys, set_heads * head_dim].T   =   [heads, keys]

            K0 lanes   K1 lanes                 v of the item                  of which the diagonal is kept
    head 0  | q0 q0 |         |      weights @ [keys, set_heads * head_dim]  = |  o0  |      |
    head 1  | q1 q1 |         |                                                |  o1  |      |
    head 2  |       | q2 q2   |                                                |      |  o2  |
    head 3  |       | q3 q3   |                                                |      |  o3  |

The zeros cost little: K and V pass the matrix unit once either way, and that is what a decode step pays for. In return
all heads' scores lie in one dense array, and the softmax of 32 heads is as long as that of one.

One item is a chain of long latencies (product, maximum, exponential, product), so several items of whatever rows are
computed side by side, each for itself (flash decoding, https://pytorch.org/blog/flash-decoding), and then merged in
their order into the state of their rows: what a row gives does not depend on the items beside its own.

Where head_dim is no multiple of 128, K and V are not taken apart: the lanes ``K0 V0 K1 V1`` stay as they are, q has
zeros in V's lanes, and the product has V's sums beside sums over K that nobody reads.
"""

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


class Member(NamedTuple):
    """One place of a group: an item and its slot, or nothing, with the slot of the member before it."""

    is_item: Any
    slot: Any
    item: Item


def clear_batch(refs: Refs):
    """Once for a batch: zeros outside the diagonal of q."""
    refs.decode_q[...] = jnp.zeros(refs.decode_q.shape, jnp.float32)


def attend_group(config: KernelConfig, refs: Refs, fetch, row_block, slot):
    """The decode items from ``slot`` on, as many as make a group; returns how many. There is at least one."""
    members = _members(config, refs, row_block, slot)
    for place, member in enumerate(members):
        fetch.wait(member.slot, jnp.where(member.is_item, member.item.num_units, 0))
        _put_q(config, refs, place, jnp.where(member.is_item, member.item.row, 0))
    if config.puts_tokens:
        write.put_rows(config, refs, members)
    all_inside, keys = _needs(config, members)
    pl.when(all_inside)(lambda: _attend_members(config, refs, members, config.block_pages, is_edge=False))

    @pl.when(~all_inside)
    def _():
        for num_pages, is_fewest in schedule.fewest_pages(config, config.decode_pages, keys):
            pl.when(is_fewest)(lambda n=num_pages: _attend_members(config, refs, members, n, is_edge=True))

    return sum(member.is_item.astype(jnp.int32) for member in members)


def _needs(config: KernelConfig, members: list[Member]):
    """Whether all keys of all members are seen, and how many of its block's first keys some member needs."""
    all_inside, most = True, 0
    for is_item, _, item in members:
        all_inside &= is_item & (item.first_key >= item.start) & (item.first_key + config.block_keys <= item.end)
        most = jnp.maximum(most, jnp.where(is_item, item.end - item.first_key, 0))
    return all_inside, jnp.minimum(most, config.block_keys)


def _members(config: KernelConfig, refs: Refs, row_block, slot) -> list[Member]:
    members, is_item, own_slot = [], True, slot
    for _ in range(config.group_items):
        item = worklist.item_at(refs, slot)
        is_item &= (item.row_block == row_block) & item.is_decode
        own_slot = jnp.where(is_item, slot, own_slot)  # a slot further on may be on its way
        members.append(Member(is_item, own_slot, item))
        slot = worklist.slot_after(config, slot)
    return members


def _put_q(config: KernelConfig, refs: Refs, place, row):
    """The row's queries on the diagonal of the group's q number ``place``."""
    width = config.part_lanes
    for head in range(config.num_kv_heads):
        head_set, n = divmod(head, config.set_heads)
        for part in range(config.lane_parts):
            lane = n * config.k_lanes.step + part * width
            q = refs.q_rows.at[head, part][pl.ds(row * config.group, config.group), :][:, :width]
            refs.decode_q[place, head_set, n * config.group : (n + 1) * config.group, lane : lane + width] = q


def _attend_members(config: KernelConfig, refs: Refs, members: list[Member], num_pages, is_edge):
    """Every head set of every member, on the first ``num_pages`` of its block; ``is_edge`` if some key is not seen."""

    def attend_set(head_set, _):
        parts = _attend_each(config, refs, members, head_set, num_pages, is_edge)
        states = _merge(config, refs, members, head_set, parts)
        for member, state in zip(members, states, strict=True):
            done = member.is_item & member.item.is_last
            pl.when(done)(lambda state=state, item=member.item: _put_state(config, refs, head_set, item.row, state))

    if config.num_head_sets == 1:
        attend_set(0, None)
    else:
        lax.fori_loop(0, config.num_head_sets, attend_set, None)


def _attend_each(config: KernelConfig, refs: Refs, members: list[Member], head_set, num_pages, is_edge) -> list[State]:
    """The state of every member alone, stage by stage: the matrix unit works in program order, and must not wait."""
    kv = [_load_kv(config, refs, member.slot, head_set, num_pages) for member in members]
    q = [refs.decode_q[place, head_set].astype(config.compute_dtype) for place in range(len(members))]
    scale, soft_cap = config.score_scale, config.options.soft_cap
    scores = [softmax.logits(q, k, scale=scale, soft_cap=soft_cap) for q, (k, _) in zip(q, kv, strict=True)]
    values = [v for _, v in kv]
    if is_edge:
        scores, values = zip(*map(lambda *args: _hide(config, *args), members, scores, values), strict=True)
    tops = [softmax.raise_top(softmax.LOWEST, s) for s in scores]
    weights = [softmax.weigh(s, top) for s, top in zip(scores, tops, strict=True)]
    sums = [softmax.sum_values(w, v) for w, v in zip(weights, values, strict=True)]
    return [State(t, softmax.add_up(w), _diagonal(config, a)) for t, w, a in zip(tops, weights, sums, strict=True)]


def _merge(config: KernelConfig, refs: Refs, members: list[Member], head_set, parts: list[State]) -> list[State]:
    """The state of every member's row after it; that of the last one is kept for the next group."""
    kept = refs.decode_top, refs.decode_total, refs.decode_acc
    state, states = State(*(ref[head_set] for ref in kept)), []
    for member, part in zip(members, parts, strict=True):
        is_new = member.is_item & member.item.is_first
        state = State(*(jnp.where(is_new, *pair) for pair in zip(softmax.EMPTY, state, strict=True)))
        state = softmax.merge(state, part)
        states.append(state)
    for ref, value in zip(kept, state, strict=True):
        ref[head_set] = value
    return states


def _load_kv(config: KernelConfig, refs: Refs, slot, head_set, num_pages):
    """k and v [keys, lanes] of a set."""
    kv = load_kv(config, refs, slot, head_set, config.set_heads, num_pages)
    if not config.splits_kv:
        return kv, kv
    halves = [kv[:, i * config.head_dim : (i + 1) * config.head_dim] for i in range(2 * config.set_heads)]
    return jnp.concatenate(halves[0::2], axis=1), jnp.concatenate(halves[1::2], axis=1)


def _hide(config: KernelConfig, member: Member, scores, v):
    """Scores with -inf and values with zeros where the row sees no key; there v may be anything, and 0 * NaN is NaN."""
    item = member.item
    start, end = jnp.where(member.is_item, item.start, 0), jnp.where(member.is_item, item.end, 0)

    def seen(shape, axis):
        j = item.first_key + lax.broadcasted_iota(jnp.int32, shape, axis)
        return (j >= start) & (j < end) & mask.visible(item.first_p, j, **config.options.mask)

    scores = jnp.where(seen((1, len(v)), 1), scores, -jnp.inf)
    return scores, jnp.where(seen((len(v), 1), 0), v, jnp.zeros_like(v))


def _diagonal(config: KernelConfig, acc):
    """[heads, head_dim]: of every query head the lanes of its own KV head, from [heads, set_heads * lanes]."""
    head = lax.broadcasted_iota(jnp.int32, (acc.shape[0], 1), 0)
    diagonal = jnp.zeros((acc.shape[0], config.head_dim), jnp.float32)
    for n in range(config.set_heads):
        first, step = config.v_lanes
        lane = first + n * step
        is_mine = (head >= n * config.group) & (head < (n + 1) * config.group)
        diagonal = jnp.where(is_mine, acc[:, lane : lane + config.head_dim], diagonal)
    return diagonal


def _put_state(config: KernelConfig, refs: Refs, head_set, row, state: State):
    """A finished row's state to where those of prefill rows stand."""
    matrix_rows = pl.ds(row * config.group, config.group)
    width = config.part_lanes
    pieces = [fill_lanes(state.acc[:, part * width : (part + 1) * width]) for part in range(config.lane_parts)]
    for n in range(config.set_heads):
        head, heads = head_set * config.set_heads + n, slice(n * config.group, (n + 1) * config.group)
        refs.top_rows.at[head][matrix_rows, :] = state.top[heads]
        refs.total_rows.at[head][matrix_rows, :] = state.total[heads]
        for part, piece in enumerate(pieces):
            refs.acc_rows.at[head, part][matrix_rows, :] = piece[heads]
