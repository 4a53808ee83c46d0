"""The ops of ``torch.ops.rpa`` as typed functions, for editors and type checkers: the same names, arguments, order."""

from typing import TypedDict, Unpack

import torch
from torch import Tensor

__all__ = [
    "Options",
    "ragged_paged_attention",
    "ragged_paged_attention_update",
    "ragged_paged_attention_update_",
    "ragged_paged_attention_with_lse",
]


class Options(TypedDict, total=False):
    """The keyword options that all four functions take. Another value of one is another compiled program.

    sm_scale                factor of the scores, usually ``head_dim ** -0.5`` (default: 1.0)
    causal                  a query sees no later key (default: True)
    sliding_window          a query sees only keys fewer than this many tokens away; None for no window
    soft_cap                scores become ``soft_cap * tanh(score / soft_cap)``; None for no cap
    mask_value              accepted for callers of torch_xla's op; changes no result
    k_scale, v_scale        what a stored key, a stored value is multiplied by, and a new one divided by; None for 1.0,
                            required with int8 pages
    sinks                   [num_q_heads], float32 or q's dtype: one more logit of each row, without a value
    num_kv_pages_per_block  pages that the kernel fetches at a time; None lets it choose
    num_queries_per_block   rows of a sequence that it computes together; None lets it choose
    vmem_limit_bytes        what the TPU kernel may take of VMEM; None for its own limit
    """

    sm_scale: float
    causal: bool
    sliding_window: int | None
    soft_cap: float | None
    mask_value: float | None
    k_scale: float | None
    v_scale: float | None
    sinks: Tensor | None
    num_kv_pages_per_block: int | None
    num_queries_per_block: int | None
    vmem_limit_bytes: int | None


def ragged_paged_attention(
    q: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    **options: Unpack[Options],
) -> Tensor:
    """Attention of every row of a ragged batch over its own sequence's pages, which are only read.

    Row i of sequence s stands at position ``kv_lens[s] - q_len + i`` of it, where ``q_len = cu_q_lens[s + 1] -
    cu_q_lens[s]``, and sees the keys up to there (all of them with ``causal=False``), fewer with a window.

    Args:
        q: [num_tokens, num_q_heads, head_dim]; float32, bfloat16, or float16 on CPU.
        kv_pages: [num_pages, page_size, 2 * num_kv_heads, head_dim] with heads interleaved K0 V0 K1 V1 ..., or flat
            [num_pages, page_size, 2 * num_kv_heads * head_dim]; q's dtype, float8_e4m3fn, float8_e5m2 or int8.
            ``torch_rpa.empty_kv_pages`` makes them in the form that is fastest on a device.
        kv_lens: int32 [max_num_seqs], tokens of each sequence in the cache, this step's included.
        page_indices: int32 [max_num_seqs, pages_per_seq], the pages of each sequence in order; -1 where there is none.
        cu_q_lens: int32 [max_num_seqs + 1]; rows of sequence s are ``cu_q_lens[s] : cu_q_lens[s + 1]``.
        num_seqs: int32 [1], how many of the sequences there are.
        **options: see ``Options``.

    Returns:
        q's shape and dtype. Zeros in rows that see no key, and in rows at or past ``cu_q_lens[num_seqs]``.

    Raises:
        ValueError: a shape or an option that is not as above; the message names it.
        TypeError: a dtype that is not as above, or an option of a wrong kind.
        NotImplementedError: what the device cannot do, with every reason and what would work.
        RuntimeError: an input requires grad and grad mode is on: the ops are for inference.
        Values of the metadata are not looked at, unless TORCH_RPA_CHECK=1 is set: see ``torch_rpa.check_batch``.

    One sequence that decodes its 20th token, and one that reads a prompt of 3 tokens:

        >>> import torch, torch_rpa
        >>> q = torch.randn(4, 6, 64)  # row 0 decodes, rows 1 to 3 are the prompt
        >>> kv_pages = torch.randn(8, 16, 4, 64)  # 8 pages of 16 tokens, 2 KV heads
        >>> kv_lens = torch.tensor([20, 3], dtype=torch.int32)
        >>> page_indices = torch.tensor([[5, 2], [7, -1]], dtype=torch.int32)
        >>> cu_q_lens = torch.tensor([0, 1, 4], dtype=torch.int32)
        >>> num_seqs = torch.tensor([2], dtype=torch.int32)
        >>> out = torch_rpa.ragged_paged_attention(
        ...     q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale=64**-0.5
        ... )
        >>> out.shape
        torch.Size([4, 6, 64])
    """
    return torch.ops.rpa.ragged_paged_attention(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, **options)


def ragged_paged_attention_with_lse(
    q: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """``ragged_paged_attention``, and the log of each row's softmax denominator: the same arguments and errors.

    Returns:
        out, as q, and lse, float32 [num_tokens, num_q_heads], the sink included; -inf (with a sink: the sink) in rows
        that see no key. ``torch_rpa.merge_attention_states`` puts parts of a context together by it.

    One decode row over 20 tokens, in two parts of which each has its own pages:

        >>> import torch, torch_rpa
        >>> def int32(*numbers):
        ...     return torch.tensor(numbers, dtype=torch.int32)
        >>> q, kv_pages = torch.randn(1, 6, 64), torch.randn(8, 16, 4, 64)
        >>> last_page = torch_rpa.ragged_paged_attention_with_lse(
        ...     q, kv_pages, int32(4), int32([2]), int32(0, 1), int32(1), sm_scale=64**-0.5
        ... )
        >>> pages_before = torch_rpa.ragged_paged_attention_with_lse(
        ...     q, kv_pages, int32(16), int32([5]), int32(0, 1), int32(1), sm_scale=64**-0.5
        ... )
        >>> outs, lses = zip(last_page, pages_before)
        >>> out, lse = torch_rpa.merge_attention_states(outs, lses)
        >>> out.shape, lse.shape
        (torch.Size([1, 6, 64]), torch.Size([1, 6]))
    """
    return torch.ops.rpa.ragged_paged_attention_with_lse(
        q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, **options
    )


def ragged_paged_attention_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """``ragged_paged_attention_update_`` on a copy of the pages: the same arguments and errors.

    Returns:
        out, as q, and new_kv_pages, as kv_pages, which keeps what it held.

    The first two tokens of a sequence:

        >>> import torch, torch_rpa
        >>> q, k, v = torch.randn(2, 6, 64), torch.randn(2, 2, 64), torch.randn(2, 2, 64)
        >>> kv_pages = torch_rpa.empty_kv_pages(8, 16, 2, 64, dtype=torch.float32, device="cpu")
        >>> kv_lens = torch.tensor([2], dtype=torch.int32)
        >>> page_indices = torch.tensor([[3]], dtype=torch.int32)
        >>> cu_q_lens = torch.tensor([0, 2], dtype=torch.int32)
        >>> num_seqs = torch.tensor([1], dtype=torch.int32)
        >>> out, new_kv_pages = torch_rpa.ragged_paged_attention_update(
        ...     q, k, v, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale=64**-0.5
        ... )
        >>> bool(torch.equal(new_kv_pages[3, :2, 0], k[:, 0])), bool(kv_pages.any())
        (True, False)
    """
    return torch.ops.rpa.ragged_paged_attention_update(
        q, k, v, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, **options
    )


def ragged_paged_attention_update_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    cu_q_lens: Tensor,
    num_seqs: Tensor,
    **options: Unpack[Options],
) -> Tensor:
    """Write this step's k and v to the pages in place, then attend as ``ragged_paged_attention`` does.

    Args:
        k, v: [num_tokens, num_kv_heads, head_dim] in q's dtype, this step's new tokens. Row i is written at its own
            position of its own sequence, divided by ``k_scale``, ``v_scale`` and rounded to the pages' dtype.
        kv_pages: as there; contiguous. A page that is written to belongs to one sequence only; its other slots keep
            their bytes, as do all other pages.
        q, kv_lens, page_indices, cu_q_lens, num_seqs, **options: as there.

    Returns:
        q's shape and dtype.

    Raises:
        what ``ragged_paged_attention`` raises.

    The first two tokens of a sequence, then its third:

        >>> import torch, torch_rpa
        >>> kv_pages = torch_rpa.empty_kv_pages(8, 16, 2, 64, dtype=torch.float32, device="cpu")
        >>> page_indices = torch.tensor([[3]], dtype=torch.int32)
        >>> num_seqs = torch.tensor([1], dtype=torch.int32)
        >>> for num_new, kv_len in ((2, 2), (1, 3)):
        ...     q, k, v = (torch.randn(num_new, heads, 64) for heads in (6, 2, 2))
        ...     kv_lens = torch.tensor([kv_len], dtype=torch.int32)
        ...     cu_q_lens = torch.tensor([0, num_new], dtype=torch.int32)
        ...     out = torch_rpa.ragged_paged_attention_update_(
        ...         q, k, v, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale=64**-0.5
        ...     )
        >>> kv_pages[3].any(dim=-1).any(dim=-1).sum().item()
        3
    """
    return torch.ops.rpa.ragged_paged_attention_update_(
        q, k, v, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, **options
    )
