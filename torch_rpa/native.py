"""The native extension `torch_rpa._C`: the only file that knows of it.

The extension is optional. Callers ask `is_available()` and take the Python path when it says no; it warns
once in a process if the extension was not built or cannot be loaded. TORCH_RPA_NATIVE=0 turns the extension
off, read at each call, so that the Python path can give a second opinion.
"""

import importlib
import os
import threading
import warnings
from pathlib import Path

import torch

from torch_rpa.options import AttentionOptions

__all__ = ["HOW_TO_BUILD", "attend", "attend_update_", "is_available", "linear", "why_missing", "write_kv_pages_"]

HOW_TO_BUILD = (
    "install setuptools, a C++ compiler and Python's headers, and run `pip install --no-build-isolation .` in "
    "torch_rpa's source tree"
)

_INTERFACE = 2  # of the extension that these functions call; csrc_stub/module.cpp has the same number
_lock = threading.Lock()
_loaded: bool | None = None  # None until the first use in this process


def is_available() -> bool:
    """True if the native operators can be called now. The first call loads them, or warns that it cannot."""
    if os.environ.get("TORCH_RPA_NATIVE") == "0":
        return False
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


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
    """`torch_rpa.cpu.attend` by the native kernel. Call only if `is_available()`.

    Args:
        the op's, checked by `torch_rpa.validation`, any strides. Metadata may hold any values: those out of
            range are brought into it. Block sizes among the options are for other devices.

    Returns:
        out, as q, and lse, float32 [num_tokens, num_q_heads].
    """
    return torch.ops.rpa_native.ragged_paged_attention(
        q,
        kv_pages,
        kv_lens,
        page_indices,
        cu_q_lens,
        num_seqs,
        sinks,
        options.score_scale,
        options.value_scale,
        options.causal,
        _window(options),
        options.soft_cap,
    )


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
    """`torch_rpa.cpu.attend_update_` by the native kernel: `write_kv_pages_`, then `attend`; returns out."""
    return torch.ops.rpa_native.ragged_paged_attention_update_(
        q,
        k,
        v,
        kv_pages,
        kv_lens,
        page_indices,
        cu_q_lens,
        num_seqs,
        sinks,
        options.sm_scale,
        options.key_scale,
        options.value_scale,
        options.causal,
        _window(options),
        options.soft_cap,
    )


def write_kv_pages_(
    kv_pages: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    k_scale: float,
    v_scale: float,
) -> None:
    """Write row i of `k` and `v` to slot `slots[i]` of `kv_pages`, in place. Call only if `is_available()`.

    All tensors are on the CPU. Values are divided by their scale in float32 and rounded to nearest even; int8
    and fp8 pages take values clamped to their finite range (NaN stays NaN in fp8, and is 0 in int8).

    Args:
        kv_pages: contiguous [num_pages, page_size, 2 * num_kv_heads, head_dim], heads interleaved K0 V0 ...,
            or flat [num_pages, page_size, 2 * num_kv_heads * head_dim]; k's dtype, float8_e4m3fn, float8_e5m2
            or int8.
        k, v: [num_tokens, num_kv_heads, head_dim]; float32, bfloat16 or float16; any strides.
        slots: int64 [num_tokens], each `page * page_size + position`, without duplicates. Rows with a
            negative slot are skipped and may hold anything.
        k_scale, v_scale: divisors. With 1.0 and pages of k's dtype, bytes are copied as they are.

    Raises:
        TypeError, ValueError: a dtype or a shape is not as above.
        IndexError: a slot is past the last one.
        In each case nothing has been written.
    """
    torch.ops.rpa_native.write_kv_pages_(kv_pages, k, v, slots, k_scale, v_scale)


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``input @ weight^T + bias`` in float32, on the CPU. Call only if `is_available()`.

    A row's result has the same bits whatever other rows there are, which torch's does not promise. For few rows, where
    the time is that of reading the weight, it is about twice as fast as torch's (benchmarks/NOTES.md).

    Args:
        input: float32 [..., depth].
        weight: float32 [num_columns, depth]; not copied if its rows are contiguous.
        bias: float32 [num_columns].

    Returns:
        float32 [..., num_columns].

    Raises:
        TypeError, ValueError: a dtype or a shape is not as above.
    """
    return torch.ops.rpa_native.linear(input, weight, bias)


def _window(options: AttentionOptions) -> int | None:
    """The window, None where it is so long that it hides nothing (a Python integer may not fit in 64 bits)."""
    return options.within(2**31).sliding_window


def _load() -> bool:
    """Import the extension, which registers its operators; warn and return False if that is not possible."""
    reason = why_missing()
    if reason is None:
        return True
    warnings.warn(
        f"torch_rpa runs in pure Python, which is slower on CPU: its native extension cannot be used ({reason}). To "
        f"build it anew, {HOW_TO_BUILD}. TORCH_RPA_NATIVE=0 silences this.",
        stacklevel=3,
    )
    return False


def why_missing() -> str | None:
    """Why the extension cannot be used; None if it can. Imports it."""
    try:
        extension = importlib.import_module("torch_rpa._C")
    except ImportError as error:  # not built, or built for another torch (undefined symbols)
        return ": ".join([str(error), *_reason_of_build()])
    interface = getattr(extension, "interface", 0)
    if interface != _INTERFACE:
        return f"it was built from other sources: its interface is {interface}, not {_INTERFACE}"
    return None


def _reason_of_build() -> list[str]:
    """What setup.py left if it could not build the extension."""
    file = Path(__file__).with_name("no_native.txt")
    return [file.read_text().strip()] if file.exists() else []
