"""Ragged paged attention as one Pallas kernel for TPU.

Every row attends over the pages of its own sequence. Decode rows and prefill tiles of one batch run in one launch; the
schedule follows in the kernel from kv_lens, cu_q_lens and num_seqs. The figure in ``config.py`` has the names. Timeline
of one row block:

    [A] regroup q's rows by KV head (``rows.py``), and those of k and v for the update op
    while the next item of the list belongs to the row block (``worklist.py``)
        [B] wait for its pages (``dma.py``); the update op puts new tokens there and writes them back (``write.py``)
        [C] online softmax: decode rows by groups of items (``decode.py``), a prefill tile head by head (``prefill.py``)
        [D] fetch into the slots that became free, of whatever tile, sequence and row block comes next
    [E] divide by the sums, put the rows back on [tokens, heads * head_dim], zeros in padding rows (``rows.py``)

q and out are taken as [tokens, heads * head_dim] and pages as [.., 2 * num_kv_heads * head_dim]: tokens on sublanes, so
that a head's K or V is a plain load, and so that the reshapes around the kernel fold into a model's projections.
Pages in heads form stay as they are in HBM, and are regrouped by the loads (``load.py``).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_rpa.kernels import decode, prefill, rows, worklist, write
from torch_rpa.kernels.config import KernelConfig, make_config
from torch_rpa.kernels.dma import PageFetch
from torch_rpa.kernels.refs import Refs
from torch_rpa.kernels.refuse import refuse_on_tpu
from torch_rpa.kernels.schedule import Item


def attend(
    q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks, options, *, with_lse, interpret=False, chip=None
):
    """Attention over pages of either form by the Pallas kernel; the arguments are those of the op, as JAX arrays.

    Returns:
        out, as q, and lse, float32 [num_tokens, num_q_heads], or None without ``with_lse``.
    """
    metadata = kv_lens, page_indices, cu_q_lens, num_seqs
    out, lse, _ = _call(q, None, None, kv_pages, metadata, sinks, options, with_lse, interpret, chip)
    return out, lse


def attend_update(
    q, k, v, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks, options, *, interpret=False, chip=None
):
    """Write k and v to the pages, in place, and attend, in one launch; the arguments are those of the op.

    Returns:
        out, as q, and the pages, as kv_pages.
    """
    metadata = kv_lens, page_indices, cu_q_lens, num_seqs
    out, _, new_pages = _call(q, k, v, kv_pages, metadata, sinks, options, False, interpret, chip)
    return out, new_pages


def _call(q, k, v, kv_pages, metadata, sinks, options, with_lse, interpret, chip):
    kv_lens, page_indices, cu_q_lens, num_seqs = metadata
    if q.shape[0] == 0 or page_indices.size == 0:  # no row belongs to a sequence
        return jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf, jnp.float32), kv_pages
    config = make_config(
        q, kv_pages, page_indices, options,
        with_lse=with_lse, with_sinks=sinks is not None, with_update=k is not None, chip=chip,
    )  # fmt: skip
    if config.cannot_fit and not interpret:
        q = refuse_on_tpu(q, f"torch_rpa cannot run this call: {config.vmem_problem}")
    scalars = [kv_lens, page_indices.reshape(-1), cu_q_lens, num_seqs]
    scalars += [] if sinks is None else [sinks.astype(jnp.float32)]
    rows = [x.reshape(config.num_tokens, -1) for x in (q, k, v) if x is not None]
    page_rows = kv_pages.reshape(config.pages_shape)
    results = list(_pallas_call(config, interpret)(*scalars, *rows, page_rows))
    new_pages = results.pop(0).reshape(kv_pages.shape) if config.with_update else None
    return results[0].reshape(q.shape), results[1] if with_lse else None, new_pages


def _pallas_call(config: KernelConfig, interpret):
    pages, first = pl.BlockSpec(memory_space=pl.ANY), _first_step(config)

    def rows_spec(heads, lanes, index):
        return pl.BlockSpec((config.block_rows, heads * lanes), index)

    def computed(i, *_):
        return jnp.maximum(i - first, 0), 0

    def written(i, *_):
        return jnp.minimum(i, config.num_row_blocks - 1), 0

    q_spec = rows_spec(config.num_q_heads, config.head_dim, computed)
    new_spec = rows_spec(config.num_kv_heads, config.head_dim, written)
    num_scalars, update = 4 + config.with_sinks, int(config.with_update)
    return pl.pallas_call(
        lambda *refs: _kernel(config, _name_refs(config, refs)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=num_scalars,
            grid=(config.num_row_blocks + first,),
            in_specs=[q_spec, *[new_spec] * (2 * update), pages],
            out_specs=[*[pages] * update, q_spec, *[rows_spec(config.num_q_heads, 1, computed)] * config.with_lse],
            scratch_shapes=_scratch_shapes(config),
        ),
        out_shape=_out_shapes(config),
        input_output_aliases={num_scalars + 3: 0} if config.with_update else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=config.vmem_limit_bytes,
            disable_bounds_checks=True,  # page numbers are clipped; the checks would cost more than the DMA
        ),
        interpret=interpret,
        name="ragged_paged_attention",
    )


def _out_shapes(config: KernelConfig):
    out, lse = (config.num_tokens, config.num_q_heads * config.head_dim), (config.num_tokens, config.num_q_heads)
    return [
        *[jax.ShapeDtypeStruct(config.pages_shape, config.kv_dtype)] * config.with_update,
        jax.ShapeDtypeStruct(out, config.q_dtype),
        *[jax.ShapeDtypeStruct(lse, jnp.float32)] * config.with_lse,
    ]


def _scratch_shapes(config: KernelConfig):
    update = [
        *[pltpu.VMEM(config.new_rows_shape, jnp.float32)] * 2,
        *[pltpu.VMEM(config.token_rows_shape, jnp.float32)] * config.heads_form,
        pltpu.SemaphoreType.DMA,
        pltpu.SMEM((1,), jnp.int32),
    ]
    rows_of_their_own = [
        pltpu.VMEM(config.row_buffer_shape, config.kv_dtype),
        pltpu.SemaphoreType.DMA((config.row_batches,)),
        pltpu.SMEM((config.row_batches,), jnp.int32),
    ]
    return [
        *[pltpu.VMEM(shape, jnp.float32) for shape in config.float32_scratch],
        pltpu.VMEM(config.kv_buffer_shape, config.kv_dtype),
        pltpu.SemaphoreType.DMA((config.num_slots,)),
        *(update if config.with_update else []),
        *(rows_of_their_own if config.puts_tokens else []),
        pltpu.SMEM((worklist.CURSOR_SIZE,), jnp.int32),
        pltpu.SMEM((config.num_slots * len(Item._fields),), jnp.int32),
    ]


def _name_refs(config: KernelConfig, refs) -> Refs:
    """The refs of a call by name; None for those of a part that is left out."""
    left_out = set() if config.with_sinks else {"sinks"}
    left_out |= set() if config.with_lse else {"lse"}
    update = {"k", "v", "kv_pages_in", "k_rows", "v_rows", "token_rows", "tile_write_sem", "tile_writes"}
    left_out |= set() if config.with_update else update
    left_out |= set() if config.puts_tokens else {"row_buffer", "row_write_sems", "row_writes"}
    left_out |= set() if config.heads_form else {"token_rows"}
    refs = iter(refs)
    return Refs(**{name: None if name in left_out else next(refs) for name in Refs._fields})


def _first_step(config: KernelConfig):
    """The grid step that computes the first row block."""
    return config.num_row_blocks if config.writes_first else 0


def _kernel(config: KernelConfig, refs: Refs):
    """One row block."""
    step, first = pl.program_id(0), _first_step(config)
    fetch = PageFetch(config, refs.page_indices, refs.kv_pages_hbm, refs.kv_buffer, refs.kv_sems)

    @pl.when(step == 0)
    def _():
        decode.clear_batch(refs)
        worklist.start_batch(config, refs, only_new=config.writes_first)

    if config.writes_first:
        pl.when(step < first)(lambda: write.write_block(config, refs, fetch, step))

        @pl.when(step == first)
        def _():
            worklist.start_batch(config, refs)

        pl.when(step >= first)(lambda: _attend_block(config, refs, fetch, step - first))
    else:
        _attend_block(config, refs, fetch, step)
    if config.puts_tokens:
        pl.when(step == first + config.num_row_blocks - 1)(lambda: write.wait_for_rows(config, refs))


def _attend_block(config: KernelConfig, refs: Refs, fetch, row_block):
    worklist.fetch_next(config, refs, fetch)
    rows.regroup_q(config, refs, row_block)  # [A]
    if config.puts_tokens:
        write.regroup_new(config, refs, row_block)

    def attend(slot):
        item = worklist.item_at(refs, slot)
        count = lax.cond(
            item.is_decode,
            lambda: decode.attend_group(config, refs, fetch, row_block, slot),  # [B] [C]
            lambda: prefill.attend_item(config, refs, fetch, item, slot),  # [B] [C]
        )
        worklist.fetch_next(config, refs, fetch, freed=count)  # [D]
        return count

    worklist.for_each_item(config, refs, row_block, attend)
    rows.write_rows(config, refs, row_block)  # [E]
