"""Attention of one decode row: all query heads of a set of KV heads in two matrix products.

    q of a set, block-diagonal               k of a chunk                      scores
    [heads, set_heads * head_dim]    @    [keys, set_heads * head_dim].T   =   [heads, keys]

            K0 lanes   K1 lanes                 v of the chunk                 acc, of which the diagonal is used
    head 0  | q0 q0 |         |      weights @ [keys, set_heads * head_dim]  = |  o0  |      |
    head 1  | q1 q1 |         |                                                |  o1  |      |
    head 2  |       | q2 q2   |                                                |      |  o2  |
    head 3  |       | q3 q3   |                                                |      |  o3  |

The zeros cost nothing: K and V pass the matrix unit once either way, and that is what a decode step pays for. In return
all heads' scores lie in one dense array, and the softmax of 32 heads is as long as that of one.

Where head_dim is no multiple of 128, K and V are not taken apart: the lanes ``K0 V0 K1 V1`` stay as they are, q has zeros
in V's lanes, and acc has V's sums beside sums over K that nobody reads.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from torch_rpa import mask
from torch_rpa.kernels import schedule, softmax
from torch_rpa.kernels.config import LANES, KernelConfig
from torch_rpa.kernels.refs import Keys, Refs
from torch_rpa.kernels.softmax import State


def clear_batch(config: KernelConfig, refs: Refs):
    """Once for a batch: zeros outside the diagonal of q."""
    refs.decode_q[...] = jnp.zeros(refs.decode_q.shape, jnp.float32)


def start_row(config: KernelConfig, refs: Refs, row):
    """Put the row's queries on the diagonal; no key seen yet."""
    for head, part, place in _diagonal(config, config.k_lanes):
        q = refs.q_rows.at[head, part][pl.ds(row * config.group, config.group), :]
        refs.decode_q.at[place[0]][place[1:]] = q
    refs.decode_acc[...] = jnp.zeros(refs.decode_acc.shape, jnp.float32)
    refs.decode_top[...] = jnp.full(refs.decode_top.shape, softmax.LOWEST, jnp.float32)
    refs.decode_total[...] = jnp.zeros(refs.decode_total.shape, jnp.float32)


def finish_row(config: KernelConfig, refs: Refs, row):
    """Put the row's results where those of prefill rows stand."""
    matrix_rows = pl.ds(row * config.group, config.group)
    for head, part, (head_set, heads, lanes) in _diagonal(config, config.v_lanes):
        refs.acc_rows.at[head, part][matrix_rows, :] = refs.decode_acc[head_set, heads, lanes]
        refs.top_rows.at[head][matrix_rows, :] = refs.decode_top[head_set, heads, :]
        refs.total_rows.at[head][matrix_rows, :] = refs.decode_total[head_set, heads, :]


def attend_block(config: KernelConfig, refs: Refs, tile: schedule.Tile, slot, block):
    """The row over the chunks of one key block that it needs."""
    chunk_pages = config.decode_chunk_pages
    chunk_keys = chunk_pages * config.page_size

    def attend_chunk(chunk, _):
        first_key = block * config.block_keys + chunk * chunk_keys
        keys = Keys(slot, chunk * chunk_pages, chunk_pages, first_key, chunk_keys)
        is_inside = (first_key >= tile.start) & (first_key + chunk_keys <= tile.end)
        pl.when(is_inside)(lambda: _attend_chunk(config, refs, tile, keys, is_edge=False))
        pl.when(~is_inside)(lambda: _attend_chunk(config, refs, tile, keys, is_edge=True))

    lax.fori_loop(*schedule.needed_chunks(tile, block, config.block_keys, chunk_keys), attend_chunk, None)


def _attend_chunk(config: KernelConfig, refs: Refs, tile, keys: Keys, is_edge):
    """Every head set over one chunk; ``is_edge`` if some of its keys are not seen."""

    def attend_set(head_set, _):
        k, v = _load_kv(config, refs, keys, head_set)
        q = refs.decode_q[head_set].astype(config.compute_dtype)
        scores = softmax.logits(q, k, scale=config.options.score_scale, soft_cap=config.options.soft_cap)
        if is_edge:
            scores, v = _hide(config, tile, keys, scores, v)
        state = State(refs.decode_top[head_set][:, :1], refs.decode_total[head_set][:, :1], refs.decode_acc[head_set])
        state = softmax.update(state, scores, v)
        refs.decode_top[head_set] = jnp.broadcast_to(state.top, refs.decode_top.shape[1:])
        refs.decode_total[head_set] = jnp.broadcast_to(state.total, refs.decode_total.shape[1:])
        refs.decode_acc[head_set] = state.acc

    if config.num_head_sets == 1:
        attend_set(0, None)
    else:
        lax.fori_loop(0, config.num_head_sets, attend_set, None)


def _load_kv(config: KernelConfig, refs: Refs, keys: Keys, head_set):
    """k [keys, k_lanes] and v [keys, v_lanes] of a set."""
    lanes = config.set_heads * 2 * config.head_dim
    first_lane = head_set * lanes if isinstance(head_set, int) else pl.multiple_of(head_set * lanes, LANES)
    kv = refs.kv_buffer[keys.slot, pl.ds(keys.first_page, keys.num_pages), :, pl.ds(first_lane, lanes)]
    kv = config.widen(kv).reshape(keys.count, lanes)
    if not config.splits_kv:
        return kv, kv
    halves = [kv[:, i * config.head_dim : (i + 1) * config.head_dim] for i in range(2 * config.set_heads)]
    return jnp.concatenate(halves[0::2], axis=1), jnp.concatenate(halves[1::2], axis=1)


def _hide(config: KernelConfig, tile, keys: Keys, scores, v):
    """Scores with -inf and values with zeros where the row sees no key; there v may be anything, and 0 * NaN is NaN."""

    def seen(shape, axis):
        j = keys.first_key + lax.broadcasted_iota(jnp.int32, shape, axis)
        return (j >= tile.start) & (j < tile.end) & mask.visible(tile.first_p, j, **config.options.mask)

    scores = jnp.where(seen((1, keys.count), 1), scores, -jnp.inf)
    return scores, jnp.where(seen((keys.count, 1), 0), v, jnp.zeros_like(v))


def _diagonal(config: KernelConfig, lanes):
    """For every piece of a KV head: head, part, and its place (set, query heads, lanes) in q or acc.

    Args:
        lanes: of a head, k_lanes or v_lanes: where its piece begins and how far it is to the next head's.
    """
    width = config.head_dim // config.lane_parts
    for head in range(config.num_kv_heads):
        head_set, n = divmod(head, config.set_heads)
        for part in range(config.lane_parts):
            lane = lanes.first + n * lanes.step + part * width
            heads = slice(n * config.group, (n + 1) * config.group)
            yield head, part, (head_set, heads, slice(lane, lane + width))
