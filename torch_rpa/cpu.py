"""Ragged paged attention on CPU tensors: blockwise, so that memory does not grow with tokens x context x heads.

Each sequence goes by tiles of query rows, and each tile by blocks of its keys with the online softmax (Milakov and
Gimelshein 2018; Dao et al. 2022): only the pages of one block are ever gathered. The query heads that share a KV head
are the rows of one matrix, for decode as for prefill. What a row gives depends on its own sequence only, bit for bit.
"""

import torch

from torch_rpa import mask
from torch_rpa.options import AttentionOptions
from torch_rpa.pages import gather_kv_pages, token_slots, write_kv_pages_

# A tile's scores are [num_q_heads, rows, keys] in float32: 16 MiB for 32 heads.
_ROWS_PER_TILE = 128
_KEYS_PER_BLOCK = 1024


def attend(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    kv_lens: torch.Tensor,
    page_indices: torch.Tensor,
    cu_q_lens: torch.Tensor,
    num_seqs: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out, as q, and lse, float32 [num_tokens, num_q_heads]; the arguments are those of the op."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32)
    lens, starts = _active_sequences(kv_lens, cu_q_lens, num_seqs, page_indices.shape[1] * kv_pages.shape[1], len(q))
    sinks = None if sinks is None else sinks.float()
    tile_rows = options.num_queries_per_block or _ROWS_PER_TILE
    for s, kv_len in enumerate(lens):
        pages = page_indices[s].to(torch.int64).clamp(0, len(kv_pages) - 1)
        for row in range(starts[s], starts[s + 1], tile_rows):
            rows = slice(row, min(row + tile_rows, starts[s + 1]))
            first_p = kv_len - (starts[s + 1] - row)
            out[rows], lse[rows] = _attend_tile(q[rows], kv_pages, pages, first_p, kv_len, sinks, options)
    return out, lse


def attend_update_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_pages: torch.Tensor,
    kv_lens: torch.Tensor,
    page_indices: torch.Tensor,
    cu_q_lens: torch.Tensor,
    num_seqs: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    options: AttentionOptions,
) -> torch.Tensor:
    """Write the rows of k and v to their own positions in kv_pages, in place, then attend; returns out."""
    lens, starts = _active_sequences(kv_lens, cu_q_lens, num_seqs, page_indices.shape[1] * kv_pages.shape[1], len(q))
    slots = token_slots(lens, page_indices, starts, len(q), kv_pages)
    write_kv_pages_(kv_pages, k, v, slots, options.k_scale, options.v_scale)
    return attend(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks, options=options)[0]


def _active_sequences(kv_lens, cu_q_lens, num_seqs, max_kv_len, num_tokens):
    """kv_lens and cu_q_lens of the active sequences, as lists.

    Values that ``check_batch`` refuses are brought into range, so that they can neither crash nor read outside.
    """
    count = min(max(int(num_seqs[0]), 0), len(kv_lens))
    lens = kv_lens[:count].clamp(0, max_kv_len).tolist()
    starts = cu_q_lens[: count + 1].clamp(0, num_tokens).cummax(0).values.tolist()
    return lens, starts


def _attend_tile(q, kv_pages, pages, first_p, kv_len, sinks, options):
    """One tile of rows at positions first_p, first_p + 1, ... of one sequence whose page numbers are ``pages``."""
    num_rows, num_q_heads, head_dim = q.shape
    page_size = kv_pages.shape[1]
    last_p = first_p + num_rows - 1
    start, end = mask.key_range(first_p, last_p, kv_len, **options.mask)
    start, end = max(start, 0), min(end, kv_len)
    block_pages = options.num_kv_pages_per_block or max(1, _KEYS_PER_BLOCK // page_size)

    # [num_kv_heads, group * rows, head_dim]: the rows of one KV head are one matrix.
    num_kv_heads = kv_pages[0].numel() // (2 * page_size * head_dim)
    group = num_q_heads // num_kv_heads
    tile = q.view(num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)
    tile = tile.float() * options.score_scale
    state = _initial_state(num_kv_heads, group, num_rows, head_dim, sinks)
    p = torch.arange(first_p, first_p + num_rows)[:, None]

    for page in range(start // page_size, -(-end // page_size), block_pages):
        j0, j1 = max(start, page * page_size), min(end, (page + block_pages) * page_size)
        kv = gather_kv_pages(kv_pages, pages[page : -(-j1 // page_size)], head_dim)
        # Only the keys that the tile can see: whatever else stands on these pages may be NaN.
        kv = kv[j0 - page * page_size : j1 - page * page_size].view(j1 - j0, num_kv_heads, 2, head_dim)
        keys, values = kv.permute(2, 1, 0, 3)  # each [num_kv_heads, keys, head_dim]
        scores = tile @ keys.transpose(1, 2)
        if options.soft_cap is not None:
            scores = torch.tanh(scores / options.soft_cap) * options.soft_cap
        if not mask.all_visible(first_p, last_p, j0, j1 - 1, **options.mask):
            hidden = ~mask.visible(p, torch.arange(j0, j1)[None, :], **options.mask)
            scores.view(num_kv_heads, group, num_rows, -1).masked_fill_(hidden, -torch.inf)
        state = _online_softmax(state, scores, values)
    return _finish(state, num_rows, num_q_heads, options.value_scale, q.dtype)


def _initial_state(num_kv_heads, group, num_rows, head_dim, sinks):
    """Running maximum, sum of exponentials and weighted values, before any key: a sink is a logit without a value."""
    rows = group * num_rows
    acc = torch.zeros(num_kv_heads, rows, head_dim, dtype=torch.float32)
    if sinks is None:
        total = torch.zeros(num_kv_heads, rows, 1, dtype=torch.float32)
        return torch.full_like(total, -torch.inf), total, acc
    top = sinks.view(num_kv_heads, group, 1).expand(-1, -1, num_rows).reshape(num_kv_heads, rows, 1)
    return top, torch.isfinite(top).float(), acc


def _online_softmax(state, scores, values):
    top, total, acc = state
    new_top = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
    # A row that has seen no key yet has a maximum of -inf; 0 in its place keeps exp free of NaN.
    shift = new_top.masked_fill(new_top == -torch.inf, 0.0)
    weights = torch.exp(scores - shift)
    decay = torch.exp(top - shift)
    return new_top, total * decay + weights.sum(dim=-1, keepdim=True), acc * decay + weights @ values


def _finish(state, num_rows, num_q_heads, value_scale, dtype):
    """out [rows, num_q_heads, head_dim] and lse [rows, num_q_heads] from the final state."""
    top, total, acc = state
    out = (acc * (value_scale / total)).masked_fill(total == 0, 0.0)
    lse = (top + total.log()).view(num_q_heads, num_rows).T
    return out.view(num_q_heads, num_rows, -1).transpose(0, 1).to(dtype), lse
