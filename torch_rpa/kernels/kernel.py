"""Ragged paged attention as one Pallas kernel for TPU.

Every row attends over the pages of its own sequence. Decode rows and prefill tiles of one batch run in one launch; the
schedule follows in the kernel from kv_lens, cu_q_lens and num_seqs. The figure in ``config.py`` has the names. Timeline
of one row block:

    [A] regroup q's rows by KV head (``rows.py``)
    while the next item of the list belongs to the row block (``worklist.py``)
        [B] wait for its pages (``dma.py``)
        [C] online softmax: decode rows by groups of items (``decode.py``), a prefill tile head by head (``prefill.py``)
        [D] fetch into the slots that became free, of whatever tile, sequence and row block comes next
    [E] divide by the sums, put the rows back on [tokens, heads * head_dim], zeros in padding rows (``rows.py``)

q and out are taken as [tokens, heads * head_dim] and pages as [.., 2 * num_kv_heads * head_dim]: tokens on sublanes, so
that a head's K or V is a plain load, and so that the reshapes around the kernel fold into a model's projections.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_rpa.kernels import decode, prefill, rows, worklist
from torch_rpa.kernels.config import KernelConfig, make_config
from torch_rpa.kernels.dma import PageFetch
from torch_rpa.kernels.refs import Refs
from torch_rpa.kernels.schedule import Item


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
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=config.vmem_limit_bytes,
            disable_bounds_checks=True,  # page numbers are clipped; the checks would cost more than the DMA
        ),
        interpret=interpret,
        name="ragged_paged_attention",
    )


def _scratch_shapes(config: KernelConfig):
    return [
        *[pltpu.VMEM(shape, jnp.float32) for shape in config.float32_scratch],
        pltpu.VMEM(config.kv_buffer_shape, config.kv_dtype),
        pltpu.SemaphoreType.DMA((config.num_slots,)),
        pltpu.SMEM((worklist.CURSOR_SIZE,), jnp.int32),
        pltpu.SMEM((config.num_slots * len(Item._fields),), jnp.int32),
    ]


def _name_refs(config: KernelConfig, refs) -> Refs:
    refs = list(refs)
    for name, is_given in (("sinks", config.with_sinks), ("lse", config.with_lse)):
        if not is_given:
            refs.insert(Refs._fields.index(name), None)
    return Refs(*refs)


def _kernel(config: KernelConfig, refs: Refs):
    """One row block."""
    row_block = pl.program_id(0)
    fetch = PageFetch(config, refs.page_indices, refs.kv_pages_hbm, refs.kv_buffer, refs.kv_sems)

    @pl.when(row_block == 0)
    def _():
        decode.clear_batch(refs)
        worklist.start_batch(config, refs, fetch)

    rows.regroup_q(config, refs, row_block)  # [A]

    def attend_items(work):
        slot, _ = work
        item = worklist.item_at(refs, slot)
        count = lax.cond(
            item.is_decode,
            lambda: decode.attend_group(config, refs, fetch, row_block, slot),  # [B] [C]
            lambda: prefill.attend_item(config, refs, fetch, item, slot),  # [B] [C]
        )
        worklist.fetch_next(config, refs, fetch, count)  # [D]
        slot = worklist.slot_after(config, slot, count)
        return slot, worklist.is_in(refs, slot, row_block)

    slot = refs.cursor[worklist.WORK_SLOT]
    slot, _ = lax.while_loop(lambda work: work[1], attend_items, (slot, worklist.is_in(refs, slot, row_block)))
    refs.cursor[worklist.WORK_SLOT] = slot
    rows.write_rows(config, refs, row_block)  # [E]
