"""The arrays that one launch of the kernel reads and writes, by name, with their shapes."""

from typing import Any, NamedTuple


class Refs(NamedTuple):
    """Every ref of the kernel, in the order of its arguments; sizes are named in ``config.py``.

    Matrix row ``r * group + g`` of a KV head is row r of the row block for the g-th query head that shares it.
    """

    kv_lens: Any  # SMEM int32 [max_num_seqs]
    page_indices: Any  # SMEM int32 [max_num_seqs * pages_per_seq]
    cu_q_lens: Any  # SMEM int32 [max_num_seqs + 1]
    num_seqs: Any  # SMEM int32 [1]
    sinks: Any  # SMEM float32 [num_q_heads], or None
    q: Any  # VMEM [block_rows, num_q_heads * head_dim]
    k: Any  # VMEM [block_rows, num_kv_heads * head_dim], or None for the read-only op
    v: Any  # VMEM, as k
    kv_pages_in: Any  # HBM, as kv_pages_hbm: the same memory under another name, or None for the read-only op
    kv_pages_hbm: Any  # HBM [num_pages, page_size * token_rows, kv_width / token_rows]
    out: Any  # VMEM, as q
    lse: Any  # VMEM float32 [block_rows, num_q_heads], or None
    q_rows: Any  # VMEM float32 [num_kv_heads, lane_parts, matrix rows, 128]: the last lanes may be zeros
    acc_rows: Any  # VMEM, as q_rows
    top_rows: Any  # VMEM float32 [num_kv_heads, matrix rows, 128], the same in every lane
    total_rows: Any  # VMEM, as top_rows, but spread out over the lanes
    decode_q: Any  # VMEM float32 [group_items, num_head_sets, query heads of a set, k lanes of a set]
    decode_acc: Any  # VMEM float32 [num_head_sets, query heads of a set, head_dim]: of an unfinished row
    decode_top: Any  # VMEM float32 [num_head_sets, query heads of a set, 128], the same in every lane
    decode_total: Any  # VMEM, as decode_top, but spread out over the lanes
    kv_buffer: Any  # VMEM [num_slots, block_pages, page_size, kv_width], or in heads form as ``kv_buffer_shape``
    kv_sems: Any  # DMA semaphores [num_slots]
    k_rows: Any  # VMEM float32 [num_kv_heads, lane_parts, rows, 128], or None
    v_rows: Any  # VMEM, as k_rows
    token_rows: Any  # VMEM float32 [unit_tokens * token_rows, head_dim]: new tokens in heads form, or None
    tile_write_sem: Any  # DMA semaphore of writes from kv_buffer, or None
    tile_writes: Any  # SMEM int32 [1]: tiles of tokens on their way from kv_buffer, or None
    row_buffer: Any  # VMEM [row_batches, group_items, write_tokens * token_rows, kv_width / token_rows], or None
    row_write_sems: Any  # DMA semaphores [row_batches] of writes from row_buffer, or None
    row_writes: Any  # SMEM int32 [row_batches]: tiles on their way from row_buffer, or None
    cursor: Any  # SMEM int32: where the batch stands (``worklist.py``), kept from one row block to the next
    items: Any  # SMEM int32 [num_slots * len(Item)]: what is in each slot
