"""What a user of the ops writes, for mypy: never run. Each ``type: ignore`` stands for an error that must be found."""

from typing import assert_type

import torch
from torch import Tensor

import torch_rpa


def attend(q: Tensor, k: Tensor, v: Tensor, kv_pages: Tensor, *metadata: Tensor) -> Tensor:
    kv_lens, page_indices, cu_q_lens, num_seqs = metadata
    batch = kv_lens, page_indices, cu_q_lens, num_seqs
    torch_rpa.check_batch(q, kv_pages, *batch, sliding_window=128)
    out = torch_rpa.ragged_paged_attention(q, kv_pages, *batch, sm_scale=0.125, causal=True, sinks=None)
    assert_type(out, Tensor)
    part = torch_rpa.ragged_paged_attention_with_lse(q, kv_pages, *batch, sliding_window=None, soft_cap=50.0)
    assert_type(part, tuple[Tensor, Tensor])
    out, _ = torch_rpa.merge_attention_states([out, part[0]], [part[1], part[1]])
    out, new_kv_pages = torch_rpa.ragged_paged_attention_update(q, k, v, kv_pages, *batch, k_scale=0.1, v_scale=0.1)
    assert_type(new_kv_pages, Tensor)
    return torch_rpa.ragged_paged_attention_update_(q, k, v, new_kv_pages, *batch, num_queries_per_block=64)


def pages(num_pages: int) -> Tensor:
    return torch_rpa.empty_kv_pages(num_pages, 16, 2, 64, dtype=torch.bfloat16, device="cpu")


def mistakes(q: Tensor, kv_pages: Tensor, m: Tensor) -> None:
    torch_rpa.ragged_paged_attention(q, kv_pages, m, m, m, m, scale=0.125)  # type: ignore[call-arg]
    torch_rpa.ragged_paged_attention(q, kv_pages, m, m, m, m, causal="no")  # type: ignore[arg-type]
    torch_rpa.ragged_paged_attention(q, kv_pages, m, m, m)  # type: ignore[call-arg]
    out = torch_rpa.ragged_paged_attention(q, kv_pages, m, m, m, m)
    assert_type(out, tuple[Tensor, Tensor])  # type: ignore[assert-type]
