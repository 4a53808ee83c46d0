"""The contract in plain XLA ops, for devices without Mosaic (PJRT CPU).

Shapes are fixed and lengths are data, so no length recompiles; loops have dynamic trip counts, so that the cost follows
the lengths in the batch and not the size of the page table:

    for each tile of query rows                    rows of one sequence: 1 for decode, several for prefill
        for each block of keys that it can see     whole pages, aligned to the start of the sequence
            fetch the pages, update the online softmax
        write the tile's rows

Decode sequences (one row) and prefill sequences run in two such loops, so that a decode row does not pay for a prefill
tile. A row's result depends on its own sequence only: tiles and blocks are counted from the sequence's start.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from torch_rpa import mask
from torch_rpa.kernels.quantize import quantize
from torch_rpa.options import AttentionOptions
from torch_rpa.validation import page_shape

_KEYS_PER_BLOCK = 128
# Rows of the matrix that a prefill tile gives one KV head: query rows times query heads per KV head.
_ROWS_PER_MATRIX = 128


class Sequences(NamedTuple):
    """The batch with everything that may be garbage brought into range; each int32 [max_num_seqs].

    Sequences at or past num_seqs have q_len = kv_len = 0.
    """

    first_row: jax.Array
    q_len: jax.Array
    kv_len: jax.Array


class Tiles(NamedTuple):
    """The tiles of one loop: ``count`` of them are real; ``seq`` and ``first_row`` are int32 [most tiles possible].

    ``first_row`` counts from the start of the sequence.
    """

    count: jax.Array
    seq: jax.Array
    first_row: jax.Array


def attend(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks, options: AttentionOptions):
    """Attention over pages of either form; the arguments are those of the op, as JAX arrays.

    Returns:
        out, as q, and lse, float32 [num_tokens, num_q_heads].
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads = page_shape(kv_pages.shape, head_dim)
    if num_tokens == 0 or page_indices.size == 0:  # no row belongs to a sequence
        return jnp.zeros_like(q), jnp.full((num_tokens, num_q_heads), -jnp.inf, jnp.float32)
    kv_pages = kv_pages.reshape(num_pages, page_size, num_kv_heads, 2, head_dim)
    block_pages = options.num_kv_pages_per_block or max(1, _KEYS_PER_BLOCK // page_size)
    block_pages = min(block_pages, page_indices.shape[1])
    tile_rows = options.num_queries_per_block or max(1, _ROWS_PER_MATRIX * num_kv_heads // num_q_heads)
    tile_rows = min(tile_rows, num_tokens)
    seqs = _sequences(kv_lens, cu_q_lens, num_seqs, num_tokens, page_indices.shape[1] * page_size)
    # A block or a tile at the very end may reach past the arrays: pad them rather than shift the block.
    page_indices = jnp.pad(jnp.clip(page_indices, 0, num_pages - 1), ((0, 0), (0, block_pages)))
    q = jnp.pad(q, ((0, tile_rows), (0, 0), (0, 0)))
    carry = (
        jnp.zeros(q.shape, q.dtype),
        jnp.full((num_tokens + tile_rows, num_q_heads), -jnp.inf, jnp.float32),
    )
    for rows in sorted({1, tile_rows}):
        is_mine = (seqs.q_len == 1) if rows == 1 < tile_rows else (seqs.q_len > (tile_rows > 1))
        tiles = _tiles(jnp.where(is_mine, seqs.q_len, 0), rows, num_tokens)

        def attend_tile(t, carry, tiles=tiles, rows=rows):
            s = tiles.seq[t]
            row = seqs.first_row[s] + tiles.first_row[t]
            first_p = seqs.kv_len[s] - seqs.q_len[s] + tiles.first_row[t]
            result = _attend_tile(
                lax.dynamic_slice_in_dim(q, row, rows), kv_pages, page_indices[s], first_p, seqs.kv_len[s],
                block_pages, sinks, options,
            )  # fmt: skip
            inside = jnp.arange(rows) < seqs.q_len[s] - tiles.first_row[t]
            return tuple(_put_rows(a, row, new, inside) for a, new in zip(carry, result, strict=True))

        carry = lax.fori_loop(0, tiles.count, attend_tile, carry)
    out, lse = carry
    return out[:num_tokens], lse[:num_tokens]


def write_kv_pages(k, v, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, options: AttentionOptions):
    """kv_pages with row i's k and v [num_tokens, num_kv_heads, head_dim] at its own position of its own sequence."""
    num_tokens, _, head_dim = k.shape
    if num_tokens == 0 or page_indices.size == 0:  # no row belongs to a sequence
        return kv_pages
    num_pages, page_size, num_kv_heads = page_shape(kv_pages.shape, head_dim)
    seqs = _sequences(kv_lens, cu_q_lens, num_seqs, num_tokens, page_indices.shape[1] * page_size)
    row = jnp.arange(num_tokens, dtype=jnp.int32)
    s = jnp.searchsorted(seqs.first_row + seqs.q_len, row, side="right").astype(jnp.int32)
    s = jnp.minimum(s, len(seqs.q_len) - 1)
    position = seqs.kv_len[s] - seqs.q_len[s] + row - seqs.first_row[s]
    page = page_indices[s, jnp.clip(position // page_size, 0, page_indices.shape[1] - 1)]
    # Padding rows, and rows without a place, go past the last slot, where a scatter drops them.
    inside = (row >= seqs.first_row[s]) & (row < seqs.first_row[s] + seqs.q_len[s])
    inside &= (position >= 0) & (page >= 0) & (page < num_pages)
    slot = jnp.where(inside, page * page_size + position % page_size, num_pages * page_size)
    new = [
        quantize(x, kv_pages.dtype, _divisor(scale, x.shape))
        for x, scale in ((k, options.k_scale), (v, options.v_scale))
    ]
    new = _as_bits(jnp.stack(new, axis=2)).reshape(num_tokens, -1)
    if num_tokens == 1:  # XLA makes of one row's scatter an update of a slice, and copies all pages before it
        slot, new = jnp.pad(slot, (0, 1), constant_values=num_pages * page_size), jnp.pad(new, ((0, 1), (0, 0)))
    tokens = _as_bits(kv_pages).reshape(num_pages * page_size, num_kv_heads * 2 * head_dim)
    tokens = tokens.at[slot].set(new, mode="drop")
    return lax.bitcast_convert_type(tokens, kv_pages.dtype).reshape(kv_pages.shape)


def _sequences(kv_lens, cu_q_lens, num_seqs, num_tokens, max_kv_len) -> Sequences:
    active = jnp.arange(len(kv_lens)) < num_seqs[0]
    # Past the last active sequence cu_q_lens is garbage: repeat the last good value.
    starts = lax.cummax(jnp.where(jnp.pad(active, (1, 0), constant_values=True), jnp.clip(cu_q_lens, 0, num_tokens), 0))
    kv_len = jnp.where(active, jnp.clip(kv_lens, 0, max_kv_len), 0)
    return Sequences(starts[:-1], jnp.diff(starts), kv_len)


def _tiles(q_len, rows, num_tokens) -> Tiles:
    """Cut sequences of ``q_len`` rows into tiles of ``rows``."""
    last = jnp.cumsum(-(-q_len // rows))
    t = jnp.arange(min(len(q_len) + num_tokens // rows, num_tokens), dtype=jnp.int32)
    seq = jnp.minimum(jnp.searchsorted(last, t, side="right"), len(q_len) - 1)
    first_tile = last - -(-q_len // rows)
    return Tiles(last[-1], seq, (t - first_tile[seq]) * rows)


def _attend_tile(q, kv_pages, pages, first_p, kv_len, block_pages, sinks, options):
    """out and lse of one tile of rows, at positions first_p, first_p + 1, ... of a sequence with these pages."""
    rows, num_q_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _, _ = kv_pages.shape
    group = num_q_heads // num_kv_heads
    block_keys = block_pages * page_size
    p = first_p + jnp.arange(rows)
    start, end = mask.key_range(first_p, first_p + rows - 1, kv_len, **options.mask)
    start, end = jnp.maximum(start, 0), jnp.minimum(end, kv_len)

    # The rows of the query heads that share a KV head are one matrix: [num_kv_heads, group * rows, head_dim].
    tile = q.reshape(rows, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
    tile = tile.astype(jnp.float32) * options.score_scale

    def attend_block(block, state):
        first_page = block * block_pages
        keys, values = _fetch(kv_pages, lax.dynamic_slice_in_dim(pages, first_page, block_pages))
        j = first_page * page_size + jnp.arange(block_keys)
        needed = (j >= start) & (j < end)
        scores = jnp.einsum("hrd,hdj->hrj", tile, keys)
        if options.soft_cap is not None:
            scores = jnp.tanh(scores / options.soft_cap) * options.soft_cap
        seen = needed & mask.visible(p[:, None], j[None, :], **options.mask)
        seen = jnp.tile(jnp.broadcast_to(seen, (rows, block_keys)), (group, 1))
        scores = jnp.where(seen, scores, -jnp.inf)
        # What is not needed may be NaN, and 0 * NaN is NaN.
        return _online_softmax(state, scores, jnp.where(needed[:, None], values, 0.0))

    state = _initial_state(num_kv_heads, group, rows, head_dim, sinks)
    state = lax.fori_loop(start // block_keys, -(-end // block_keys), attend_block, state)
    top, total, acc = state
    out = jnp.where(total == 0, 0.0, acc * (options.value_scale / total))
    out, lse = out.reshape(num_q_heads, rows, head_dim), (top + jnp.log(total)).reshape(num_q_heads, rows)
    return out.transpose(1, 0, 2).astype(q.dtype), lse.T


def _fetch(kv_pages, pages):
    """The named pages' keys, float32 [num_kv_heads, head_dim, keys], and values, [num_kv_heads, keys, head_dim].

    They are second operands, which XLA's products on CPUs rearrange unless they stand just so.
    """

    def widen():
        kv = kv_pages[pages].reshape(-1, *kv_pages.shape[2:]).astype(jnp.float32)
        return kv[:, :, 0].transpose(1, 2, 0), kv[:, :, 1].transpose(1, 0, 2)

    # XLA's CPU compiler computes in float32 and would hoist one widened copy of all pages out of the loops. It does not
    # hoist out of a branch; the page numbers are never negative.
    shapes = jax.eval_shape(widen)
    return lax.cond(pages[0] >= 0, widen, lambda: tuple(jnp.zeros(x.shape, jnp.float32) for x in shapes))


def _initial_state(num_kv_heads, group, rows, head_dim, sinks):
    """Running maximum, sum of exponentials and weighted values, before any key: a sink is a logit without a value."""
    shape = (num_kv_heads, group * rows, 1)
    acc = jnp.zeros((num_kv_heads, group * rows, head_dim), jnp.float32)
    if sinks is None:
        return jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32), acc
    top = jnp.repeat(sinks.astype(jnp.float32), rows).reshape(shape)
    return top, jnp.isfinite(top).astype(jnp.float32), acc


def _online_softmax(state, scores, values):
    """One step of the online softmax: scores [heads, rows, keys], values [heads, keys, head_dim]."""
    top, total, acc = state
    new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
    # A row that has seen no key yet has a maximum of -inf; 0 in its place keeps exp free of NaN.
    shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    weights = jnp.exp(scores - shift)
    decay = jnp.exp(top - shift)
    acc = acc * decay + jnp.einsum("hrj,hjd->hrd", weights, values)
    return new_top, total * decay + weights.sum(axis=-1, keepdims=True), acc


def _put_rows(array, row, new, inside):
    """array with rows row, row + 1, ... replaced by ``new`` where ``inside``."""
    old = lax.dynamic_slice_in_dim(array, row, len(new))
    inside = inside.reshape(-1, *[1] * (new.ndim - 1))
    return lax.dynamic_update_slice_in_dim(array, jnp.where(inside, new, old), row, axis=0)


def _divisor(scale, shape):
    """The scale behind a barrier, for each element: XLA would multiply by the reciprocal of a constant, which rounds
    otherwise; newer releases see a scalar through the barrier."""
    return None if scale is None else lax.optimization_barrier(jnp.full(shape, scale, jnp.float32))


def _as_bits(x):
    """x as integers where XLA's CPU compiler would widen it to move it, and so change the bits of a NaN."""
    widened = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") if widened else x
