"""The oracle: the contract of the ops, written to be read. Slow, and its memory grows with the context.

It shares no code with the implementations it judges. Run it in float64 to compare against them:

    out, lse, kv_pages = reference.ragged_paged_attention(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs)
"""

import torch

FINITE_RANGE = {torch.float8_e4m3fn: (-448.0, 448.0), torch.float8_e5m2: (-57344.0, 57344.0), torch.int8: (-128, 127)}


def ragged_paged_attention(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    kv_lens: torch.Tensor,
    page_indices: torch.Tensor,
    cu_q_lens: torch.Tensor,
    num_seqs: torch.Tensor,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    sm_scale: float = 1.0,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of every row over its own sequence, one sequence and one head at a time.

    Args:
        q: [num_tokens, num_q_heads, head_dim] on the CPU, as are all other tensors.
        kv_pages: [num_pages, page_size, 2 * num_kv_heads, head_dim], or flat; not changed.
        kv_lens, page_indices, cu_q_lens, num_seqs: the metadata of the contract.
        k, v: [num_tokens, num_kv_heads, head_dim], new tokens to write to a copy of the pages first, or None.
        dtype: what to compute in.

    Returns:
        out [num_tokens, num_q_heads, head_dim] and lse [num_tokens, num_q_heads], both in ``dtype``, and the pages
        after the write (kv_pages itself where k is None).
    """
    num_tokens, num_q_heads, head_dim = q.shape
    if k is not None:
        kv_pages = write_kv_pages(k, v, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, k_scale, v_scale)
    page_size = kv_pages.shape[1]
    pages = kv_pages.reshape(kv_pages.shape[0], page_size, -1, head_dim).to(dtype)
    group = num_q_heads // (pages.shape[2] // 2)
    out = torch.zeros(num_tokens, num_q_heads, head_dim, dtype=dtype)
    lse = torch.full((num_tokens, num_q_heads), -torch.inf, dtype=dtype)

    for s in range(int(num_seqs[0])):
        rows = slice(int(cu_q_lens[s]), int(cu_q_lens[s + 1]))
        q_len, kv_len = rows.stop - rows.start, int(kv_lens[s])
        p = torch.arange(kv_len - q_len, kv_len)[:, None]
        j = torch.arange(kv_len)[None, :]
        seen = _seen(p, j, causal, sliding_window)
        # Keys that no row sees may stand on pages that were freed: their entries are not read.
        needed = torch.nonzero(seen.any(dim=0))[:, 0]
        seen = seen[:, needed]
        page = page_indices[s].long()[needed // page_size]
        kv = pages[page, needed % page_size]  # [needed keys, 2 * num_kv_heads, head_dim]
        for head in range(num_q_heads):
            key, value = kv[:, 2 * (head // group)], kv[:, 2 * (head // group) + 1]
            score = (q[rows, head].to(dtype) @ key.T) * sm_scale * (1.0 if k_scale is None else k_scale)
            if soft_cap is not None:
                score = soft_cap * torch.tanh(score / soft_cap)
            logits = score.masked_fill(~seen, -torch.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks[head].to(dtype).expand(q_len, 1)], dim=1)
            lse[rows, head] = torch.logsumexp(logits, dim=1)
            weights = torch.softmax(logits, dim=1)[:, : len(needed)]
            weights = weights.nan_to_num(0.0)  # a row that sees nothing: zeros
            out[rows, head] = weights @ value * (1.0 if v_scale is None else v_scale)
    return out, lse, kv_pages


def _seen(p: torch.Tensor, j: torch.Tensor, causal: bool, sliding_window: int | None) -> torch.Tensor:
    seen = torch.ones(torch.broadcast_shapes(p.shape, j.shape), dtype=torch.bool)
    if causal:
        seen &= j <= p
    if sliding_window is not None:
        seen &= (p - j).abs() < sliding_window
    return seen


def write_kv_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_pages: torch.Tensor,
    kv_lens: torch.Tensor,
    page_indices: torch.Tensor,
    cu_q_lens: torch.Tensor,
    num_seqs: torch.Tensor,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> torch.Tensor:
    """A copy of kv_pages with every new token's k and v at its own position of its own sequence."""
    new_pages = kv_pages.clone()
    page_size = kv_pages.shape[1]
    heads = new_pages.view(kv_pages.shape[0], page_size, -1, k.shape[2])
    for s in range(int(num_seqs[0])):
        first, last = int(cu_q_lens[s]), int(cu_q_lens[s + 1])
        for row in range(first, last):
            position = int(kv_lens[s]) - (last - first) + (row - first)
            slot = heads[int(page_indices[s, position // page_size]), position % page_size]
            slot[0::2] = quantize(k[row], kv_pages.dtype, k_scale)
            slot[1::2] = quantize(v[row], kv_pages.dtype, v_scale)
    return new_pages


def quantize(x: torch.Tensor, dtype: torch.dtype, scale: float | None) -> torch.Tensor:
    """x / scale, rounded to nearest even and clamped to what ``dtype`` can hold; a plain cast wraps or gives NaN."""
    if scale is not None:
        x = x.to(torch.float32) / scale
    if dtype in FINITE_RANGE:
        x = x.to(torch.float32).clamp(*FINITE_RANGE[dtype])
        x = x.round() if dtype == torch.int8 else x
    return x.to(dtype)
