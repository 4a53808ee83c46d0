"""Rows of q and out between their two forms: [rows, heads * head_dim] in HBM, and one matrix for each KV head.

Matrix row ``r * group + g`` of a KV head is row r for the g-th query head that shares it, as float32: a float32 row may
begin at any sublane, so that a tile begins wherever its sequence does. The regrouping is done by the loads and stores
themselves, with a stride of ``group`` sublanes.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from torch_rpa.kernels import schedule, softmax
from torch_rpa.kernels.config import KernelConfig, fill_lanes
from torch_rpa.kernels.refs import Refs
from torch_rpa.kernels.worklist import active_seqs


def regroup_q(config: KernelConfig, refs: Refs, row_block):
    """q's rows as float32, the query heads of a KV head next to each other: matrix row r * group + g."""
    count = config.copy_rows

    def regroup(i, _):
        rows, lanes = pl.ds(pl.multiple_of(i * count, count), count), config.part_lanes
        for head, part, matrix_rows, lane in _places(config, i * count, count):
            q = refs.q[rows, lane : lane + lanes].astype(jnp.float32)
            refs.q_rows.at[head // config.group, part][matrix_rows, :] = fill_lanes(q)

    lax.fori_loop(0, schedule.blocks_of(count_rows(config, refs, row_block), count), regroup, None)


def write_rows(config: KernelConfig, refs: Refs, row_block):
    """out (and lse) of the row block: every row divided by its sum, zeros where no sequence has a row."""
    end_row, count = count_rows(config, refs, row_block), config.copy_rows
    head_lanes = lax.broadcasted_iota(jnp.int32, (count, config.num_q_heads), 1)

    def write(i, _):
        rows, lanes = pl.ds(pl.multiple_of(i * count, count), count), config.part_lanes
        lse = jnp.full((count, config.num_q_heads), -jnp.inf, jnp.float32)
        for head, part, matrix_rows, lane in _places(config, i * count, count):
            kv_head = head // config.group
            sink = refs.sinks[head] if config.with_sinks else None
            top, total = refs.top_rows.at[kv_head][matrix_rows, :], refs.total_rows.at[kv_head][matrix_rows, :]
            factor, head_lse = softmax.finish(top[:, :1], total.sum(axis=1, keepdims=True), sink)
            acc = refs.acc_rows.at[kv_head, part][matrix_rows, :][:, :lanes] * (factor * config.value_scale)
            refs.out[rows, lane : lane + lanes] = acc.astype(refs.out.dtype)
            lse = jnp.where(head_lanes == head, head_lse, lse)
        if config.with_lse:
            refs.lse[rows, :] = lse

    def clear_padding(i, _):
        rows = pl.ds(pl.multiple_of(i * count, count), count)
        is_row = i * count + lax.broadcasted_iota(jnp.int32, (count, 1), 0) < end_row
        refs.out[rows, :] = jnp.where(is_row, refs.out[rows, :], jnp.zeros((), refs.out.dtype))
        if config.with_lse:
            refs.lse[rows, :] = jnp.where(is_row, refs.lse[rows, :], -jnp.inf)

    lax.fori_loop(0, schedule.blocks_of(end_row, count), write, None)
    lax.fori_loop(schedule.whole_blocks(end_row, count), config.block_rows // count, clear_padding, None)


def count_rows(config: KernelConfig, refs: Refs, row_block):
    """How many rows of the row block belong to a sequence: the first ones."""
    end_row = jnp.clip(refs.cu_q_lens[active_seqs(config, refs)], 0, config.num_tokens)
    return jnp.clip(end_row - row_block * config.block_rows, 0, config.block_rows)


def _places(config: KernelConfig, first_row, count):
    """For every piece of a query head: head, part, its rows in its KV head's matrix, its first lane in q and out."""
    for head in range(config.num_q_heads):
        matrix_rows = pl.ds(first_row * config.group + head % config.group, count, stride=config.group)
        for part in range(config.lane_parts):
            yield head, part, matrix_rows, head * config.head_dim + part * config.part_lanes
