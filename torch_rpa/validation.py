"""Static checks of the arguments: what a caller got wrong, and what a device cannot do.

They read shapes, dtypes and devices only, given as plain ``ArgSpec`` values, so that torch tensors, fake tensors and
JAX arrays share them; this module imports neither torch nor JAX. Values are checked in ``metadata.py``. One rule:

    ValueError            the caller's mistake (TypeError where it is a dtype): names the argument, what it was and what
                          was expected
    NotImplementedError   valid, but not on this device: lists every reason at once
"""

from typing import NamedTuple

from torch_rpa.options import AttentionOptions

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
QUANTIZED_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")
PAGE_SIZES = (8, 16, 32, 64, 128, 256)
MAX_HEAD_DIM = 256
TPU_HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
# Scalar memory of every chip; all but 16 KiB, for the other metadata and the kernel's own scalars, may be page table.
TPU_SMEM_BYTES = 2**20
TPU_MAX_TABLE_BYTES = TPU_SMEM_BYTES - 16 * 2**10


class ArgSpec(NamedTuple):
    """What the static checks need of one tensor: its shape, dtype name ("float32") and device name ("cpu")."""

    shape: tuple
    dtype: str
    device: str


class PageShape(NamedTuple):
    """The sizes of a page array, whichever of the two forms it has."""

    num_pages: int
    page_size: int
    num_kv_heads: int


# Argument -> shape as the contract names it. kv_pages is looked at apart: it has two forms.
_SHAPES = {
    "q": "[num_tokens, num_q_heads, head_dim]",
    "k": "[num_tokens, num_kv_heads, head_dim]",
    "v": "[num_tokens, num_kv_heads, head_dim]",
    "kv_lens": "[max_num_seqs]",
    "page_indices": "[max_num_seqs, pages_per_seq]",
    "cu_q_lens": "[max_num_seqs + 1]",
    "num_seqs": "[1]",
    "sinks": "[num_q_heads]",
}
_METADATA = ("kv_lens", "page_indices", "cu_q_lens", "num_seqs")
_PAGE_FORMS = (
    "[num_pages, page_size, 2 * num_kv_heads, head_dim] with heads interleaved K0 V0 K1 V1 ..., "
    "or flat [num_pages, page_size, 2 * num_kv_heads * head_dim]"
)


def dtype_name(dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def check_static(args: dict[str, ArgSpec], options: AttentionOptions, platform: str | None = None) -> None:
    """Check ranks, dtypes, shapes, devices and options of one call.

    Args:
        args: the tensors by argument name; ``k`` and ``v`` only for the update ops, ``sinks`` only where given.
        options: the rest of the call.
        platform: what stands behind an XLA device, "cpu" or "tpu".

    Raises:
        ValueError, TypeError: the caller's mistake, the first one found.
        NotImplementedError: with every reason why the device cannot do it.
    """
    _check_ranks(args)
    _check_dtypes(args)
    _check_devices(args)
    _check_metadata_shapes(args)
    _check_heads(args)
    options.check()
    _check_scales(args, options)
    reasons = not_supported_reasons(args, platform)
    if reasons:
        raise NotImplementedError("torch_rpa cannot run this call: " + "; ".join(reasons))


def page_shape(kv_pages_shape, head_dim) -> PageShape:
    """Sizes of pages of either form: heads [num_pages, page_size, 2 * num_kv_heads, head_dim], or flat."""
    num_pages, page_size, width = kv_pages_shape[0], kv_pages_shape[1], kv_pages_shape[2]
    return PageShape(num_pages, page_size, width // 2 if len(kv_pages_shape) == 4 else width // (2 * head_dim))


def is_head_dim(head_dim) -> bool:
    """Whether some device supports it."""
    return head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD_DIM


def _check_ranks(args):
    for name, spec in args.items():
        if name == "kv_pages":
            if len(spec.shape) not in (3, 4):
                raise ValueError(f"kv_pages must be {_PAGE_FORMS}; got shape {list(spec.shape)}")
            continue
        rank = _SHAPES[name].count(",") + 1
        if len(spec.shape) != rank:
            hint = "; flatten the batch into one row per token" if name in "qkv" else ""
            raise ValueError(f"{name} must be {_SHAPES[name]}, got shape {list(spec.shape)}{hint}")


def _check_dtypes(args):
    q_dtype = args["q"].dtype
    if q_dtype not in FLOAT_DTYPES:
        raise TypeError(f"q must be one of {', '.join(FLOAT_DTYPES)}, got {q_dtype}")
    for name in ("k", "v"):
        if name in args and args[name].dtype != q_dtype:
            raise TypeError(f"{name} must have q's dtype {q_dtype}, got {args[name].dtype}")
    if args["kv_pages"].dtype not in (q_dtype, *QUANTIZED_DTYPES):
        raise TypeError(
            f"kv_pages must have q's dtype {q_dtype} or one of {', '.join(QUANTIZED_DTYPES)}, "
            f"got {args['kv_pages'].dtype}"
        )
    for name in _METADATA:
        if args[name].dtype != "int32":
            fix = f"; write {name}.to(torch.int32)" if args[name].dtype.startswith(("int", "uint")) else ""
            raise TypeError(f"{name} must be int32, got {args[name].dtype}{fix}")
    if "sinks" in args and args["sinks"].dtype not in ("float32", q_dtype):
        raise TypeError(f"sinks must be float32 or q's dtype {q_dtype}, got {args['sinks'].dtype}")


def _check_devices(args):
    device = args["q"].device
    for name, spec in args.items():
        if spec.device != device:
            raise ValueError(f"{name} must be on q's device {device}, got {spec.device}; all tensors go together")


def _check_metadata_shapes(args):
    max_num_seqs = args["page_indices"].shape[0]
    for name, length, meaning in (
        ("kv_lens", max_num_seqs, "max_num_seqs"),
        ("cu_q_lens", max_num_seqs + 1, "max_num_seqs + 1"),
        ("num_seqs", 1, "a tensor of one element"),
    ):
        if args[name].shape[0] != length:
            raise ValueError(
                f"{name} must be {_SHAPES[name]} with {meaning} = {length} "
                f"(page_indices is {list(args['page_indices'].shape)}), got shape {list(args[name].shape)}"
            )


def _check_heads(args):
    num_tokens, num_q_heads, head_dim = args["q"].shape
    if num_q_heads == 0 or head_dim == 0:
        raise ValueError(f"q must be {_SHAPES['q']} with heads and a head_dim, got shape {list(args['q'].shape)}")
    _check_orientation(args)
    if not is_head_dim(head_dim):
        raise ValueError(f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim} (q's last dimension)")
    _check_pages(args["kv_pages"].shape, head_dim)
    num_kv_heads = page_shape(args["kv_pages"].shape, head_dim).num_kv_heads
    for name in ("k", "v"):
        if name in args and tuple(args[name].shape) != (num_tokens, num_kv_heads, head_dim):
            raise ValueError(
                f"{name} must be {_SHAPES[name]} = [{num_tokens}, {num_kv_heads}, {head_dim}] to go with q "
                f"{list(args['q'].shape)} and kv_pages {list(args['kv_pages'].shape)}, "
                f"got shape {list(args[name].shape)}"
            )
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_q_heads must be a multiple of num_kv_heads, got {num_q_heads=} and {num_kv_heads=}; "
            f"q must be {_SHAPES['q']} (never transposed), got shape {list(args['q'].shape)}"
        )
    if "sinks" in args and args["sinks"].shape[0] != num_q_heads:
        raise ValueError(f"sinks must be [num_q_heads] = [{num_q_heads}], got shape {list(args['sinks'].shape)}")


def _check_orientation(args):
    """A head_dim that stands where the heads belong; pages in heads form tell it, or what q and k have in common."""
    pages = args["kv_pages"].shape
    sizes = {name: args[name].shape[1:] for name in ("q", "k", "v") if name in args}
    shared = [size for size in reversed(sizes["q"]) if size in sizes.get("k", ())]
    head_dim = pages[3] if len(pages) == 4 else next(iter(shared), None)
    for name, (heads, dim) in sizes.items():
        if heads == head_dim != dim:
            raise ValueError(
                f"{name} must be {_SHAPES[name]}, got shape {list(args[name].shape)} with {head_dim=} in the middle: "
                f"is {name} transposed?"
            )


def _check_pages(shape, head_dim):
    got = f"kv_pages must be {_PAGE_FORMS}; got shape {list(shape)}"
    if shape[0] == 0:
        raise ValueError(f"{got}, which has no page")
    if not any(shape[1] == size for size in PAGE_SIZES):
        raise ValueError(f"{got}, whose page_size {shape[1]} is not a power of two from 8 to 256")
    if len(shape) == 3:
        if shape[2] == 0 or shape[2] % (2 * head_dim):
            raise ValueError(f"{got}, whose width {shape[2]} is not a multiple of 2 * head_dim = {2 * head_dim}")
        return
    if shape[3] != head_dim:
        raise ValueError(f"{got}, whose head_dim {shape[3]} is not q's {head_dim}")
    if shape[2] == 0 or shape[2] % 2:
        raise ValueError(f"{got}, whose third dimension {shape[2]} is not 2 * num_kv_heads")


def _check_scales(args, options):
    if args["kv_pages"].dtype != "int8":
        return
    for name in ("k_scale", "v_scale"):
        if getattr(options, name) is None:
            raise ValueError(f"{name} must be given for int8 kv_pages, got None; a stored key is int8 * k_scale")


def not_supported_reasons(args: dict[str, ArgSpec], platform: str | None = None) -> list[str]:
    """Every reason why q's device cannot do a valid call, each with what would work; empty where it can."""
    kind = args["q"].device.split(":")[0]
    reasons = []
    if args["q"].dtype == "float16" and kind not in ("cpu", "meta"):
        reasons.append(f"float16 runs on CPU tensors only, not on {kind}; use bfloat16")
    if platform == "tpu":
        q, pages, table = args["q"], args["kv_pages"], args["page_indices"]
        reasons += tpu_reasons(q.shape, pages.shape, pages.dtype, table.shape)
    return reasons


def tpu_reasons(q_shape, kv_pages_shape, kv_dtype: str, page_indices_shape=(0, 0)) -> list[str]:
    """Why the TPU kernel cannot take heads, pages or a page table of this shape, each with what would work; empty
    where it can. Without a table it is about heads and pages alone."""
    reasons, head_dim = [], q_shape[2]
    if head_dim not in TPU_HEAD_DIMS:
        reasons.append(f"head_dim on TPU is one of {', '.join(map(str, TPU_HEAD_DIMS))}, got {head_dim}; pad the heads")
    num_kv_heads = page_shape(kv_pages_shape, head_dim).num_kv_heads
    if len(kv_pages_shape) == 4 and not _is_addressable_in_heads_form(num_kv_heads, head_dim, kv_dtype):
        reasons.append(
            "pages in heads form on TPU need head_dim 128 and 2 * num_kv_heads of 2 (not with 8 bits), 4 or a multiple "
            f"of 8, got shape {list(kv_pages_shape)} of {kv_dtype}; make them with torch_rpa.empty_kv_pages"
        )
    width = 2 * num_kv_heads * head_dim
    if width % 128:
        reasons.append(
            f"pages on TPU need 2 * num_kv_heads * head_dim to be a multiple of 128, got {width}; "
            "pad the KV heads and make the pages with torch_rpa.empty_kv_pages"
        )
    table_bytes = page_table_bytes(*page_indices_shape)
    if table_bytes > TPU_MAX_TABLE_BYTES:
        reasons.append(
            f"page_indices {list(page_indices_shape)} takes {table_bytes // 2**10} KiB of a TPU's scalar memory, "
            f"of which {TPU_MAX_TABLE_BYTES // 2**10} KiB are free; use larger pages, fewer pages_per_seq or sequences"
        )
    return reasons


def page_table_bytes(max_num_seqs: int, pages_per_seq: int) -> int:
    """What page_indices takes of a TPU's scalar memory, which may be ``TPU_MAX_TABLE_BYTES``."""
    return 4 * max_num_seqs * pages_per_seq


def stored_kv_heads(num_kv_heads: int, num_chips: int) -> int | None:
    """KV heads that pages shared out over chips have in all: one for each chip at least, so that a head may stand
    several times. None if neither number is a multiple of the other, for which there is no way."""
    if num_kv_heads % num_chips and num_chips % num_kv_heads:
        return None
    return max(num_kv_heads, num_chips)


def _is_addressable_in_heads_form(num_kv_heads, head_dim, kv_dtype) -> bool:
    """Whether HBM holds a page's rows without padding, a token's rows in whole 32-bit words, and a row in one register.

    Memory is tiled by 8 rows (or 2 or 4, where there are no more) and 128 lanes.
    """
    rows = 2 * num_kv_heads
    is_whole_words = rows % 4 == 0 or kv_dtype not in QUANTIZED_DTYPES
    return head_dim == 128 and (rows in (2, 4) or rows % 8 == 0) and is_whole_words
