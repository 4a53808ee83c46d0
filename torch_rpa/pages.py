"""The paged KV cache: its two forms, where a token stands in it, and writing new tokens to it (CPU tensors).

    heads form  [num_pages, page_size, 2 * num_kv_heads, head_dim]     K0 V0 K1 V1 ... along the third dimension
    flat form   [num_pages, page_size, 2 * num_kv_heads * head_dim]    the same elements in the same order

A token's *slot* is ``page * page_size + offset``: its row when the pages are seen as one long list of tokens.
"""

import torch

from torch_rpa import bridges, chips
from torch_rpa.validation import (
    FLOAT_DTYPES,
    MAX_HEAD_DIM,
    PAGE_SIZES,
    QUANTIZED_DTYPES,
    dtype_name,
    is_head_dim,
    tpu_reasons,
)

# The finite range of each 8-bit page dtype.
_FINITE_RANGE = {torch.float8_e4m3fn: (-448.0, 448.0), torch.float8_e5m2: (-57344.0, 57344.0), torch.int8: (-128, 127)}


def empty_kv_pages(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor:
    """Zeroed pages in the form that is fastest on ``device``.

    Args:
        num_pages, page_size, num_kv_heads, head_dim: the sizes; page_size a power of two from 8 to 256.
        dtype: q's dtype, or torch.float8_e4m3fn, torch.float8_e5m2 or torch.int8.
        device: "cpu", "xla" or "meta".

    Returns:
        [num_pages, page_size, 2 * num_kv_heads, head_dim], or flat [num_pages, page_size, 2 * num_kv_heads * head_dim]
        on a TPU whose kernel takes such pages. Under
        ``torch_rpa.sharding.use_mesh`` sharded by head, with one KV head for each chip if those are more.

    Raises:
        ValueError, TypeError: sizes or a dtype that no op takes.
    """
    for name, size in (("num_pages", num_pages), ("num_kv_heads", num_kv_heads)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if page_size not in PAGE_SIZES:
        raise ValueError(f"page_size must be a power of two from 8 to 256, got {page_size}")
    if not is_head_dim(head_dim):
        raise ValueError(f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}")
    if dtype_name(dtype) not in FLOAT_DTYPES + QUANTIZED_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(FLOAT_DTYPES + QUANTIZED_DTYPES)}, got {dtype}")
    device = torch.device(device)
    bridge = bridges.of(device)
    if bridge is None:
        return torch.zeros((num_pages, page_size, 2 * num_kv_heads, head_dim), dtype=dtype, device=device)
    if bridge.head_sharding() is not None:
        num_kv_heads = bridge.head_sharding().stored_kv_heads(num_kv_heads)
    shape = (num_pages, page_size, 2 * num_kv_heads, head_dim)
    flat_shape = (num_pages, page_size, 2 * num_kv_heads * head_dim)
    if bridge.device_kind() == "tpu" and not tpu_reasons((1, num_kv_heads, head_dim), flat_shape, dtype_name(dtype)):
        shape = flat_shape
    return bridge.zeros_pages(shape, dtype, device)


def best_page_size(device: torch.device | str) -> int:
    """Tokens in a page that are fastest on ``device``; where that makes no difference, few, which wastes least."""
    bridge = bridges.of(device)
    return chips.PAGE_SIZE if bridge is not None and bridge.device_kind() == "tpu" else 16


def heads_view(kv_pages: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Pages of either form as [num_pages, page_size, 2 * num_kv_heads, head_dim], without a copy."""
    return kv_pages.view(kv_pages.shape[0], kv_pages.shape[1], -1, head_dim)


def token_slots(
    kv_lens: list[int], page_indices: torch.Tensor, cu_q_lens: list[int], num_tokens: int, kv_pages: torch.Tensor
) -> torch.Tensor:
    """The slot that each row of the batch is written to.

    Args:
        kv_lens, cu_q_lens: of the active sequences only.
        page_indices: int32 [max_num_seqs, pages_per_seq].
        kv_pages: of either form.

    Returns:
        int64 [num_tokens]; -1 for padding rows, and where a row has no place (metadata that ``check_batch`` refuses).
    """
    num_pages, page_size = kv_pages.shape[:2]
    slots = torch.full((num_tokens,), -1, dtype=torch.int64)
    if page_indices.shape[1] == 0:
        return slots
    for s, kv_len in enumerate(kv_lens):
        first, last = cu_q_lens[s], cu_q_lens[s + 1]
        position = torch.arange(kv_len - (last - first), kv_len)
        page_of_row = position.div(page_size, rounding_mode="floor")
        inside = (position >= 0) & (page_of_row < page_indices.shape[1])
        page = page_indices[s, page_of_row.where(inside, 0)].to(torch.int64)
        inside &= (page >= 0) & (page < num_pages)
        slots[first:last] = (page * page_size + position % page_size).where(inside, -1)
    return slots


def quantize(x: torch.Tensor, dtype: torch.dtype, scale: float | None) -> torch.Tensor:
    """``x / scale`` as ``dtype``: rounded to nearest even, clamped to the finite range (int8 takes NaN as 0)."""
    if scale is not None:
        x = x.float() / scale
    if dtype not in _FINITE_RANGE:
        return x.to(dtype)
    x = x.float().clamp(*_FINITE_RANGE[dtype])
    return x.round().nan_to_num(0.0).to(dtype) if dtype == torch.int8 else x.to(dtype)


def write_kv_pages_(
    kv_pages: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    k_scale: float | None,
    v_scale: float | None,
) -> None:
    """Write k and v [num_tokens, num_kv_heads, head_dim] to their slots, in place; slot -1 is skipped."""
    rows = torch.nonzero(slots >= 0)[:, 0]
    tokens = heads_view(kv_pages, k.shape[2]).flatten(0, 1)  # [slots, 2 * num_kv_heads, head_dim]
    new = torch.empty((len(rows), *tokens.shape[1:]), dtype=kv_pages.dtype)
    new[:, 0::2] = quantize(k[rows], kv_pages.dtype, k_scale)
    new[:, 1::2] = quantize(v[rows], kv_pages.dtype, v_scale)
    _bytes(tokens)[slots[rows]] = _bytes(new)


def gather_kv_pages(kv_pages: torch.Tensor, pages: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The named pages (int64 [n]) in order, as float32 [n * page_size, 2 * num_kv_heads, head_dim]."""
    gathered = _bytes(heads_view(kv_pages, head_dim)).index_select(0, pages)
    return gathered.view(kv_pages.dtype).flatten(0, 1).float()


def _bytes(x: torch.Tensor) -> torch.Tensor:
    # Indexing is not implemented for fp8 on the CPU, so 8-bit pages are moved as bytes.
    return x.view(torch.uint8) if x.element_size() == 1 else x
