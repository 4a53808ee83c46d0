"""The pure JAX entry: ragged paged attention on JAX arrays. Nothing here imports torch.

Until the Pallas kernel for TPU lands, every device runs the plain XLA form in ``xla.py``.
"""

from torch_rpa.kernels import xla
from torch_rpa.options import AttentionOptions
from torch_rpa.validation import ArgSpec, check_static

__all__ = ["ragged_paged_attention", "ragged_paged_attention_update", "ragged_paged_attention_with_lse"]


def ragged_paged_attention_with_lse(
    q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, *, sinks=None, mask_value=None, interpret=False, **options
):
    """Attention of every row of a ragged batch over its own sequence's pages.

    Args:
        q: [num_tokens, num_q_heads, head_dim], float32 or bfloat16.
        kv_pages: [num_pages, page_size, 2 * num_kv_heads, head_dim] with heads interleaved K0 V0 K1 V1 ..., or flat
            [num_pages, page_size, 2 * num_kv_heads * head_dim]; q's dtype, float8_e4m3fn, float8_e5m2 or int8.
        kv_lens: int32 [max_num_seqs], tokens of each sequence in the cache, this step's included.
        page_indices: int32 [max_num_seqs, pages_per_seq].
        cu_q_lens: int32 [max_num_seqs + 1]; rows of sequence s are ``cu_q_lens[s] : cu_q_lens[s + 1]``.
        num_seqs: int32 [1].
        sinks: [num_q_heads], float32 or q's dtype: one more logit of each row, without a value.
        mask_value: accepted for callers of the older ops; changes no result.
        interpret: run the Pallas kernel in the interpreter.
        **options: the fields of ``torch_rpa.options.AttentionOptions``: sm_scale, causal, sliding_window, ...

    Returns:
        out, as q, and lse, float32 [num_tokens, num_q_heads].

    Raises:
        ValueError, TypeError: an argument that is not as above.
        NotImplementedError: what the device cannot do; ``interpret`` before the Pallas kernel exists.
    """
    tensors = {"q": q, "kv_pages": kv_pages, **_metadata(kv_lens, page_indices, cu_q_lens, num_seqs), "sinks": sinks}
    options = _check(tensors, options, interpret)
    return xla.attend(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks, options)


def ragged_paged_attention(*args, **kwargs):
    """``ragged_paged_attention_with_lse`` without the lse: the same arguments, returns out."""
    return ragged_paged_attention_with_lse(*args, **kwargs)[0]


def ragged_paged_attention_update(
    q, k, v, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, *,
    sinks=None, mask_value=None, interpret=False, **options,
):  # fmt: skip
    """Write this step's k and v [num_tokens, num_kv_heads, head_dim] to the pages, then attend.

    The other arguments and the errors are those of ``ragged_paged_attention_with_lse``. Donate kv_pages to ``jax.jit``
    to have it updated in place.

    Returns:
        out, as q, and new_kv_pages, as kv_pages.
    """
    metadata = _metadata(kv_lens, page_indices, cu_q_lens, num_seqs)
    options = _check({"q": q, "k": k, "v": v, "kv_pages": kv_pages, **metadata, "sinks": sinks}, options, interpret)
    new_kv_pages = xla.write_kv_pages(k, v, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, options)
    return xla.attend(q, new_kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks, options)[0], new_kv_pages


def _metadata(kv_lens, page_indices, cu_q_lens, num_seqs):
    return {"kv_lens": kv_lens, "page_indices": page_indices, "cu_q_lens": cu_q_lens, "num_seqs": num_seqs}


def _check(tensors, options, interpret) -> AttentionOptions:
    if interpret:
        raise NotImplementedError("interpret=True runs the Pallas kernel, which does not exist yet; leave it out")
    specs = {name: ArgSpec(x.shape, x.dtype.name, "jax") for name, x in tensors.items() if x is not None}
    options = AttentionOptions(**options)
    check_static(specs, options)
    return options
