"""Ragged paged attention as one Pallas kernel for TPU.

Every row attends over the pages of its own sequence. Decode rows and prefill tiles of one batch run in one launch; the
schedule follows in the kernel from kv_lens, cu_q_lens and num_seqs (``schedule.py``). The figure in ``config.py`` has the
names. Timeline of one row block, with the key blocks of its tiles in a row:

    [A] regroup q's rows by KV head         q @ rows of a KV head = one matrix operand (GQA)
    for each tile of the row block
        [B] clear the tile's state
        for each key block
            [C] fetch the block that comes num_slots - 1 items later, of whatever tile and row block that is
            [D] wait for this block's pages
            [E] online softmax: one matrix of ``group`` rows per KV head for decode, row steps for prefill
    [F] divide by the sums, put the rows back on [tokens, heads * head_dim], zeros in padding rows

q and out are taken as [tokens, heads * head_dim] and pages as [.., 2 * num_kv_heads * head_dim]: tokens on sublanes, so
that a head's K or V is a plain load, and so that the reshapes around the kernel fold into a model's projections. Rows of
a KV head lie in float32 scratch, where a row may begin at any sublane: a tile begins wherever its sequence does.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_rpa import mask
from torch_rpa.kernels import schedule, softmax
from torch_rpa.kernels.config import COPY_ROWS, LANES, KernelConfig, make_config
from torch_rpa.kernels.dma import PageFetch
from torch_rpa.kernels.softmax import State

# Places in the cursor: the next item to fetch, and the next one to work on.
_FETCH_SEQ, _FETCH_ROW_BLOCK, _FETCH_BLOCK, _FETCH_SLOT, _WORK_SEQ, _WORK_ROW_BLOCK, _WORK_SLOT = range(7)


class Refs(NamedTuple):
    """What the kernel reads and writes, in the order of its arguments; shapes are named in ``config.py``."""

    kv_lens: Any  # SMEM int32 [max_num_seqs]
    page_indices: Any  # SMEM int32 [max_num_seqs * pages_per_seq]
    cu_q_lens: Any  # SMEM int32 [max_num_seqs + 1]
    num_seqs: Any  # SMEM int32 [1]
    sinks: Any  # SMEM float32 [num_q_heads], or None
    q: Any  # VMEM [block_rows, num_q_heads * head_dim]
    kv_pages_hbm: Any  # HBM [num_pages, page_size, kv_width]
    out: Any  # VMEM, as q
    lse: Any  # VMEM float32 [block_rows, num_q_heads], or None
    q_rows: Any  # VMEM float32 [num_kv_heads, lane_parts, matrix rows, head_dim / lane_parts]
    acc_rows: Any  # as q_rows
    top: Any  # VMEM float32 [num_kv_heads, matrix rows, 128]
    total: Any  # as top
    kv_buffer: Any  # VMEM [num_slots, block_pages, page_size, kv_width]
    kv_sems: Any  # DMA semaphores [num_slots]
    cursor: Any  # SMEM int32 [7], kept from one row block to the next


class Rows(NamedTuple):
    """Rows of a KV head's matrix: ``count`` of them from ``first`` on, the first at position ``first_p``."""

    first: Any
    count: int
    first_p: Any
    last_p: Any


class Keys(NamedTuple):
    """``num_pages`` pages of a slot from ``first_page`` on, the first key of which is ``first_key``."""

    slot: Any
    first_page: Any
    num_pages: int
    first_key: Any
    count: int


def attend(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks, options, *, with_lse, interpret=False):
    """Attention over pages of either form by the Pallas kernel; the arguments are those of the op, as JAX arrays.

    Returns:
        out, as q, and lse, float32 [num_tokens, num_q_heads], or None without ``with_lse``.
    """
    if q.shape[0] == 0 or page_indices.size == 0:  # no row belongs to a sequence
        return jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    config = make_config(q, kv_pages, page_indices, options, with_lse=with_lse, with_sinks=sinks is not None)
    scalars = [kv_lens, page_indices.reshape(-1), cu_q_lens, num_seqs]
    scalars += [] if sinks is None else [sinks.astype(jnp.float32)]
    arrays = [q.reshape(config.num_tokens, -1), kv_pages.reshape(config.num_pages, config.page_size, -1)]
    out, *lse = _pallas_call(config, interpret)(*scalars, *arrays)
    return out.reshape(q.shape), lse[0] if with_lse else None


def _pallas_call(config: KernelConfig, interpret):
    def rows_spec(lanes):
        return pl.BlockSpec((config.block_rows, lanes), lambda i, *_: (i, 0))

    width, lse_shape = config.num_q_heads * config.head_dim, (config.num_tokens, config.num_q_heads)
    out_shape = [jax.ShapeDtypeStruct((config.num_tokens, width), config.q_dtype)]
    out_shape += [jax.ShapeDtypeStruct(lse_shape, jnp.float32)] * config.with_lse
    return pl.pallas_call(
        lambda *refs: _kernel(config, _name_refs(config, refs)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4 + config.with_sinks,
            grid=(config.num_row_blocks,),
            in_specs=[rows_spec(width), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=[rows_spec(width)] + [rows_spec(config.num_q_heads)] * config.with_lse,
            scratch_shapes=_scratch_shapes(config),
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=config.vmem_limit_bytes
        ),
        interpret=interpret,
        name="ragged_paged_attention",
    )


def _scratch_shapes(config: KernelConfig):
    return [
        *[pltpu.VMEM(config.rows_shape, jnp.float32)] * 2,
        *[pltpu.VMEM(config.statistics_shape, jnp.float32)] * 2,
        pltpu.VMEM(config.kv_buffer_shape, config.kv_dtype),
        pltpu.SemaphoreType.DMA((config.num_slots,)),
        pltpu.SMEM((7,), jnp.int32),
    ]


def _name_refs(config: KernelConfig, refs) -> Refs:
    refs = list(refs)
    if not config.with_sinks:
        refs.insert(Refs._fields.index("sinks"), None)
    if not config.with_lse:
        refs.insert(Refs._fields.index("lse"), None)
    return Refs(*refs)


def _kernel(config: KernelConfig, refs: Refs):
    """One row block."""
    row_block = pl.program_id(0)
    fetch = PageFetch(refs.page_indices, refs.kv_pages_hbm, refs.kv_buffer, refs.kv_sems, config.pages_per_seq)

    @pl.when(row_block == 0)
    def _():
        _start_batch(config, refs, fetch)

    _regroup_q(config, refs)  # [A]

    def is_here(work):
        seq, its_row_block, _, num_seqs = work
        return (seq < num_seqs) & (its_row_block == row_block)

    def attend_tile(work):
        seq, _, slot, num_seqs = work
        tile = _tile(config, refs, seq, row_block)
        slot = _attend_tile(config, refs, fetch, seq, tile, slot)
        return *_next_tile(config, refs, seq, row_block, tile), slot, num_seqs

    work = refs.cursor[_WORK_SEQ], refs.cursor[_WORK_ROW_BLOCK], refs.cursor[_WORK_SLOT], _num_seqs(config, refs)
    seq, its_row_block, slot, _ = lax.while_loop(is_here, attend_tile, work)
    refs.cursor[_WORK_SEQ], refs.cursor[_WORK_ROW_BLOCK], refs.cursor[_WORK_SLOT] = seq, its_row_block, slot
    _write_rows(config, refs, row_block)  # [F]


# ---- The list of work -------------------------------------------------------------------------------------------


def _start_batch(config: KernelConfig, refs: Refs, fetch):
    """Put both cursors on the first item, and begin to fetch as many items as there are slots to spare."""
    seq, row_block = _first_tile_from(config, refs, jnp.int32(0), jnp.int32(0))
    for place, value in ((_FETCH_SEQ, seq), (_WORK_SEQ, seq), (_FETCH_ROW_BLOCK, row_block), (_WORK_ROW_BLOCK, row_block)):
        refs.cursor[place] = value
    for place in (_FETCH_BLOCK, _FETCH_SLOT, _WORK_SLOT):
        refs.cursor[place] = 0

    def fetch_one(_, carry):
        _fetch_next(config, refs, fetch)
        return carry

    lax.fori_loop(0, config.num_slots - 1, fetch_one, 0)


def _fetch_next(config: KernelConfig, refs: Refs, fetch):
    """[C] Begin to fetch the next item's pages, if there is one, and move the cursor on."""
    cursor = refs.cursor
    seq, row_block = cursor[_FETCH_SEQ], cursor[_FETCH_ROW_BLOCK]

    @pl.when(seq < _num_seqs(config, refs))
    def _():
        tile = _tile(config, refs, seq, row_block)
        block = jnp.maximum(cursor[_FETCH_BLOCK], tile.first_block)
        fetch.start(cursor[_FETCH_SLOT], seq, block, *schedule.needed_pages(config, tile, block))
        cursor[_FETCH_SLOT] = _next_slot(config, cursor[_FETCH_SLOT])
        is_last = block + 1 >= tile.end_block
        cursor[_FETCH_BLOCK] = jnp.where(is_last, 0, block + 1)

        @pl.when(is_last)
        def _():
            cursor[_FETCH_SEQ], cursor[_FETCH_ROW_BLOCK] = _next_tile(config, refs, seq, row_block, tile)


def _tile(config: KernelConfig, refs: Refs, seq, row_block) -> schedule.Tile:
    kv_len = jnp.clip(refs.kv_lens[seq], 0, config.pages_per_seq * config.page_size)
    return schedule.make_tile(config, row_block, *_rows_of(config, refs, seq), kv_len)


def _next_tile(config: KernelConfig, refs: Refs, seq, row_block, tile):
    """The sequence and the row block of the tile after this one: the same sequence's next rows, or the next sequence."""
    next_seq, its_row_block = _first_tile_from(config, refs, seq + 1, row_block)
    return jnp.where(tile.past_block, seq, next_seq), jnp.where(tile.past_block, row_block + 1, its_row_block)


def _first_tile_from(config: KernelConfig, refs: Refs, seq, row_block):
    """The first sequence from ``seq`` on that has rows, and the row block where they begin."""
    num_seqs = _num_seqs(config, refs)

    def has_rows(seq):
        first_row, end_row = _rows_of(config, refs, jnp.minimum(seq, config.max_num_seqs - 1))
        return (seq >= num_seqs) | (end_row > first_row)

    def skip(carry):
        seq, _ = carry
        return seq + 1, has_rows(seq + 1)

    seq, _ = lax.while_loop(lambda carry: ~carry[1], skip, (seq, has_rows(seq)))
    first_row, _ = _rows_of(config, refs, jnp.minimum(seq, config.max_num_seqs - 1))
    # Never back, whatever cu_q_lens holds: both cursors must walk the same list to its end.
    return seq, jnp.maximum(row_block, schedule.whole_blocks(first_row, config.block_rows))


def _rows_of(config: KernelConfig, refs: Refs, seq):
    return tuple(jnp.clip(refs.cu_q_lens[s], 0, config.num_tokens) for s in (seq, seq + 1))


def _num_seqs(config: KernelConfig, refs: Refs):
    return jnp.clip(refs.num_seqs[0], 0, config.max_num_seqs)


def _next_slot(config: KernelConfig, slot):
    return jnp.where(slot + 1 == config.num_slots, 0, slot + 1)


# ---- One tile ---------------------------------------------------------------------------------------------------


def _attend_tile(config: KernelConfig, refs: Refs, fetch, seq, tile, slot):
    """All key blocks of one tile; returns the slot of the item after them."""
    _clear_state(config, refs, tile)  # [B]

    def attend_block(block, slot):
        _fetch_next(config, refs, fetch)  # [C]
        fetch.wait(slot, *schedule.needed_pages(config, tile, block))  # [D]
        pl.when(tile.is_decode)(lambda: _attend_decode(config, refs, tile, slot, block))  # [E]
        pl.when(~tile.is_decode)(lambda: _attend_prefill(config, refs, tile, slot, block))
        return _next_slot(config, slot)

    return lax.fori_loop(tile.first_block, tile.end_block, attend_block, slot)


def _clear_state(config: KernelConfig, refs: Refs, tile):
    """No key seen yet; rows past the tile belong to later tiles, which clear them again."""

    def clear(first, count):
        rows = pl.ds(first, count)
        lanes = config.rows_shape[3]
        refs.acc_rows[:, :, rows, :] = jnp.zeros((config.num_kv_heads, config.lane_parts, count, lanes), jnp.float32)
        refs.top[:, rows, :] = jnp.full((config.num_kv_heads, count, LANES), softmax.LOWEST, jnp.float32)
        refs.total[:, rows, :] = jnp.zeros((config.num_kv_heads, count, LANES), jnp.float32)

    first = tile.row * config.group
    pl.when(tile.is_decode)(lambda: clear(first, config.group))

    @pl.when(~tile.is_decode)
    def _():
        lax.fori_loop(0, _num_row_steps(config, tile), lambda i, _: clear(first + i * 8, 8), None)


def _num_row_steps(config: KernelConfig, tile, rows=8):
    return schedule.blocks_of(tile.num_rows * config.group, rows)


def _attend_decode(config: KernelConfig, refs: Refs, tile, slot, block):
    """One row: the query heads of each KV head are one matrix of ``group`` rows."""
    rows = Rows(tile.row * config.group, config.group, tile.first_p, tile.first_p)

    def attend_chunk(chunk, _):
        keys = _chunk_keys(config, slot, block, chunk, config.decode_chunk_pages)
        _for_each_head(config, lambda head, kv: _attend_rows(config, refs, tile, rows, keys, head, kv), keys, refs)

    chunks = schedule.needed_chunks(tile, block, config.block_keys, config.decode_chunk_pages * config.page_size)
    lax.fori_loop(*chunks, attend_chunk, None)


def _attend_prefill(config: KernelConfig, refs: Refs, tile, slot, block):
    """Many rows: steps of ``step_rows`` matrix rows, each over the chunks that it can see."""

    def attend_chunk(chunk, _):
        keys = _chunk_keys(config, slot, block, chunk, config.prefill_chunk_pages)

        def attend_head(head, kv):
            def attend_step(step, _):
                rows = _step_rows(config, tile, step)
                start, end = mask.key_range(rows.first_p, rows.last_p, tile.end, **config.options.mask)
                sees_some = (start < keys.first_key + keys.count) & (end > keys.first_key)
                pl.when(sees_some)(lambda: _attend_rows(config, refs, tile, rows, keys, head, kv))

            lax.fori_loop(0, _num_row_steps(config, tile, config.step_rows), attend_step, None)

        _for_each_head(config, attend_head, keys, refs)

    chunks = schedule.needed_chunks(tile, block, config.block_keys, config.prefill_chunk_pages * config.page_size)
    lax.fori_loop(*chunks, attend_chunk, None)


def _step_rows(config: KernelConfig, tile, step) -> Rows:
    first = step * config.step_rows
    last = jnp.minimum(first + config.step_rows, tile.num_rows * config.group) - 1
    first_p = tile.first_p + schedule.whole_blocks(first, config.group)
    last_p = tile.first_p + schedule.whole_blocks(last, config.group)
    return Rows(tile.row * config.group + first, config.step_rows, first_p, last_p)


def _chunk_keys(config: KernelConfig, slot, block, chunk, chunk_pages) -> Keys:
    first_page = chunk * chunk_pages
    first_key = block * config.block_keys + first_page * config.page_size
    return Keys(slot, first_page, chunk_pages, first_key, chunk_pages * config.page_size)


def _for_each_head(config: KernelConfig, attend_head, keys: Keys, refs: Refs):
    """Call ``attend_head(head, load_kv)`` for every KV head; ``load_kv()`` gives its k and v [keys, head_dim]."""
    heads, lanes = config.heads_per_step, config.heads_per_step * 2 * config.head_dim

    def attend_heads(i, _):
        first_lane = i * lanes if isinstance(i, int) else pl.multiple_of(i * lanes, LANES)
        for n in range(heads):
            attend_head(i * heads + n, lambda n=n: _load_kv(config, refs, keys, first_lane, n))

    num_steps = config.num_kv_heads // heads
    if num_steps == 1:
        attend_heads(0, None)
    else:
        lax.fori_loop(0, num_steps, attend_heads, None)


def _load_kv(config: KernelConfig, refs: Refs, keys: Keys, first_lane, n):
    """k and v [keys, head_dim] of the n-th head of those whose lanes begin at ``first_lane``."""
    head_dim, lanes = config.head_dim, config.heads_per_step * 2 * config.head_dim
    pages = pl.ds(keys.first_page, keys.num_pages)
    kv = refs.kv_buffer[keys.slot, pages, :, pl.ds(first_lane, lanes)]
    kv = kv[:, :, 2 * n * head_dim : 2 * (n + 1) * head_dim]
    if kv.dtype.itemsize == 1 and kv.dtype != jnp.int8:
        kv = kv.astype(jnp.float32)  # Mosaic casts fp8 to and from float32 only
    kv = kv.astype(config.compute_dtype).reshape(keys.count, 2 * head_dim)
    return kv[:, :head_dim], kv[:, head_dim:]


def _attend_rows(config: KernelConfig, refs: Refs, tile, rows: Rows, keys: Keys, head, load_kv):
    """[E] Rows of one KV head's matrix over one chunk of keys, masked only where some row does not see some key."""
    last_key = keys.first_key + keys.count - 1
    sees_all = mask.all_visible(rows.first_p, rows.last_p, keys.first_key, last_key, **config.options.mask)
    sees_all &= (keys.first_key >= tile.start) & (last_key < tile.end)

    def attend(masked):
        k, v = load_kv()
        q = _read_rows(refs.q_rows, head, rows).astype(config.compute_dtype)
        scores = softmax.logits(q, k, scale=config.options.score_scale, soft_cap=config.options.soft_cap)
        if masked:
            scores, v = _hide(config, tile, rows, keys, scores, v)
        matrix_rows = pl.ds(rows.first, rows.count)
        top, total = refs.top[head, matrix_rows, :1], refs.total[head, matrix_rows, :1]
        state = softmax.update(State(top, total, _read_rows(refs.acc_rows, head, rows)), scores, v)
        refs.top[head, matrix_rows, :] = jnp.broadcast_to(state.top, (rows.count, LANES))
        refs.total[head, matrix_rows, :] = jnp.broadcast_to(state.total, (rows.count, LANES))
        _write_parts(refs.acc_rows, head, rows, state.acc)

    pl.when(sees_all)(lambda: attend(masked=False))
    pl.when(~sees_all)(lambda: attend(masked=True))


def _hide(config: KernelConfig, tile, rows: Rows, keys: Keys, scores, v):
    """Scores with -inf where a row does not see a key, values with zeros where no row needs a key: 0 * NaN = NaN."""
    row = lax.broadcasted_iota(jnp.int32, (rows.count, 1), 0)
    if config.group > 1:  # row // group by way of float32: vector units have no integer division
        row = ((row.astype(jnp.float32) + 0.5) * (1 / config.group)).astype(jnp.int32)
    j = keys.first_key + lax.broadcasted_iota(jnp.int32, (1, keys.count), 1)
    needed = (j >= tile.start) & (j < tile.end)
    seen = needed & mask.visible(rows.first_p + row, j, **config.options.mask)
    j = keys.first_key + lax.broadcasted_iota(jnp.int32, (keys.count, 1), 0)
    needed = (j >= tile.start) & (j < tile.end)
    return jnp.where(seen, scores, -jnp.inf), jnp.where(needed, v, jnp.zeros_like(v))


# ---- Rows in and out --------------------------------------------------------------------------------------------


def _read_rows(ref, head, rows: Rows):
    """[rows, head_dim] from scratch that keeps a head's lanes in parts."""
    parts = [ref[head, part, pl.ds(rows.first, rows.count), :] for part in range(ref.shape[1])]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _write_parts(ref, head, rows: Rows, new):
    lanes = ref.shape[3]
    for part in range(ref.shape[1]):
        ref[head, part, pl.ds(rows.first, rows.count), :] = new[:, part * lanes : (part + 1) * lanes]


def _regroup_q(config: KernelConfig, refs: Refs):
    """[A] q's rows as float32, the query heads of a KV head next to each other: matrix row r * group + g."""

    def regroup(i, _):
        rows, lanes = pl.ds(pl.multiple_of(i * COPY_ROWS, COPY_ROWS), COPY_ROWS), config.rows_shape[3]
        for head, part, matrix_rows, lane in _places(config, i * COPY_ROWS):
            q = refs.q[rows, lane : lane + lanes].astype(jnp.float32)
            refs.q_rows.at[head // config.group, part][matrix_rows, :] = q

    lax.fori_loop(0, config.block_rows // COPY_ROWS, regroup, None)


def _write_rows(config: KernelConfig, refs: Refs, row_block):
    """[F] out (and lse) of the row block: every row divided by its sum, zeros where no sequence has a row."""
    end_row = jnp.clip(refs.cu_q_lens[_num_seqs(config, refs)], 0, config.num_tokens) - row_block * config.block_rows
    head_lanes = lax.broadcasted_iota(jnp.int32, (COPY_ROWS, config.num_q_heads), 1)

    def write(i, _):
        rows, lanes = pl.ds(pl.multiple_of(i * COPY_ROWS, COPY_ROWS), COPY_ROWS), config.rows_shape[3]
        is_row = i * COPY_ROWS + lax.broadcasted_iota(jnp.int32, (COPY_ROWS, 1), 0) < end_row
        lse = jnp.full((COPY_ROWS, config.num_q_heads), -jnp.inf, jnp.float32)
        for head, part, matrix_rows, lane in _places(config, i * COPY_ROWS):
            kv_head = head // config.group
            sink = refs.sinks[head] if config.with_sinks else None
            statistics = refs.top.at[kv_head][matrix_rows, :], refs.total.at[kv_head][matrix_rows, :]
            factor, head_lse = softmax.finish(*(x[:, :1] for x in statistics), sink)
            acc = refs.acc_rows.at[kv_head, part][matrix_rows, :] * (factor * config.options.value_scale)
            refs.out[rows, lane : lane + lanes] = jnp.where(is_row, acc, 0.0).astype(refs.out.dtype)
            lse = jnp.where(is_row & (head_lanes == head), head_lse, lse)
        if config.with_lse:
            refs.lse[rows, :] = lse

    lax.fori_loop(0, config.block_rows // COPY_ROWS, write, None)


def _places(config: KernelConfig, first_row):
    """For every piece of a query head: head, part, its rows in the matrix of its KV head, its first lane in q and out."""
    for head in range(config.num_q_heads):
        matrix_rows = pl.ds(first_row * config.group + head % config.group, COPY_ROWS, stride=config.group)
        for part in range(config.lane_parts):
            yield head, part, matrix_rows, head * config.head_dim + part * config.rows_shape[3]
