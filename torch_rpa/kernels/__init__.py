"""The pure JAX entry: ragged paged attention on JAX arrays. Nothing here imports torch.

Lowered for TPU, a call runs the Pallas kernel in ``kernel.py``; for any other device, the plain XLA form in ``xla.py``.
"""

import jax
import jax.numpy as jnp

from torch_rpa.kernels import kernel, xla
from torch_rpa.kernels.refuse import refuse_on_tpu
from torch_rpa.options import AttentionOptions
from torch_rpa.validation import ArgSpec, check_static, tpu_reasons

__all__ = ["ragged_paged_attention", "ragged_paged_attention_update", "ragged_paged_attention_with_lse"]


def ragged_paged_attention_with_lse(
    q,
    kv_pages,
    kv_lens,
    page_indices,
    cu_q_lens,
    num_seqs,
    *,
    sinks=None,
    mask_value=None,
    interpret=False,
    backend="auto",
    chip=None,
    **options,
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
        interpret: run the Pallas kernel in an interpreter: True for the HLO interpreter, or a
            ``pltpu.InterpretParams`` for the TPU interpreter.
        backend: "auto" for the Pallas kernel on TPU and plain XLA ops elsewhere, "xla" for plain XLA ops everywhere.
        chip: the TPU that the call is compiled for, "v4", "v5e", "v5p", "v6e" or "7x", or None for blocks that fit on
            every one but v4, which has a quarter of the others' vector memory, or less.
        **options: the fields of ``torch_rpa.options.AttentionOptions``: sm_scale, causal, sliding_window, ...

    Returns:
        out, as q, and lse, float32 [num_tokens, num_q_heads].

    Raises:
        ValueError, TypeError: an argument that is not as above.
        NotImplementedError: what the device cannot do; for TPU some of it when the call is lowered.
    """
    args = _args(kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks, q=q)
    return _attend(args, options, interpret, backend, chip, with_lse=True)


def ragged_paged_attention(
    q,
    kv_pages,
    kv_lens,
    page_indices,
    cu_q_lens,
    num_seqs,
    *,
    sinks=None,
    mask_value=None,
    interpret=False,
    backend="auto",
    chip=None,
    **options,
):
    """``ragged_paged_attention_with_lse`` without the lse: the same arguments, returns out."""
    args = _args(kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks, q=q)
    return _attend(args, options, interpret, backend, chip, with_lse=False)[0]


def ragged_paged_attention_update(
    q, k, v, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, *,
    sinks=None, mask_value=None, interpret=False, backend="auto", chip=None, **options,
):  # fmt: skip
    """Write this step's k and v [num_tokens, num_kv_heads, head_dim] to the pages, then attend.

    The other arguments and the errors are those of ``ragged_paged_attention_with_lse``. Donate kv_pages to ``jax.jit``
    to have it updated in place.

    Returns:
        out, as q, and new_kv_pages, as kv_pages.
    """
    args = _args(kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks, q=q, k=k, v=v)
    args, options = _prepare(args, options)

    def by_kernel(args, interpret=False):
        return kernel.attend_update(**args, options=options, interpret=interpret, chip=chip)

    def by_xla(args):
        to_write = {name: x for name, x in args.items() if name not in ("q", "sinks")}
        to_read = {name: x for name, x in args.items() if name not in ("k", "v")}
        to_read["kv_pages"] = xla.write_kv_pages(**to_write, options=options)
        return xla.attend(**to_read, options=options)[0], to_read["kv_pages"]

    return _on_device(by_kernel, by_xla, args, interpret, backend)


def _attend(args, options, interpret, backend, chip, with_lse):
    args, options = _prepare(args, options)

    def by_kernel(args, interpret=False):
        return kernel.attend(**args, options=options, with_lse=with_lse, interpret=interpret, chip=chip)

    def by_xla(args):
        out, lse = xla.attend(**args, options=options)
        return out, lse if with_lse else None

    return _on_device(by_kernel, by_xla, args, interpret, backend)


def _on_device(by_kernel, by_xla, args, interpret, backend):
    """``by_kernel`` in the interpreter and where the call is lowered for TPU, ``by_xla`` elsewhere or on request."""
    if backend not in ("auto", "xla"):
        raise ValueError(f"backend must be 'auto' or 'xla', got {backend!r}")
    if interpret:
        return by_kernel(args, interpret)
    if backend == "xla":
        return by_xla(args)
    pages = args["kv_pages"]
    reasons = tpu_reasons(args["q"].shape, pages.shape, pages.dtype.name, args["page_indices"].shape)
    if reasons:
        args = args | {"q": refuse_on_tpu(args["q"], "torch_rpa cannot run this call: " + "; ".join(reasons))}
        return by_xla(args)
    return jax.lax.platform_dependent(args, tpu=by_kernel, default=by_xla)


def _args(kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks, **rows):
    """The arrays of a call by name; ``rows`` are those with a row for each token."""
    metadata = {"kv_lens": kv_lens, "page_indices": page_indices, "cu_q_lens": cu_q_lens, "num_seqs": num_seqs}
    return {**rows, "kv_pages": kv_pages, **metadata, "sinks": sinks}


def _prepare(args, options):
    """The checked call: arguments as JAX arrays, options as one value."""
    given = {name: x for name, x in args.items() if x is not None or name != "sinks"}
    for name, x in given.items():
        if not hasattr(x, "dtype"):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    options = AttentionOptions(**options)
    check_static({name: ArgSpec(x.shape, x.dtype.name, "jax") for name, x in given.items()}, options)
    capacity = args["page_indices"].shape[1] * args["kv_pages"].shape[1]
    return {name: None if x is None else jnp.asarray(x) for name, x in args.items()}, options.within(capacity)
