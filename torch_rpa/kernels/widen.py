"""Stored keys and values in the dtype to compute in: what the hardware converts by itself, and e4m3 by way of that.

TPUs unpack int8, float8_e5m2 and float8_e4m3b11fnuz in one instruction for each register, but not float8_e4m3fn, whose
cast takes about twenty times as long. The two e4m3 types have the same bits, and all numbers of one are those of the
other times a power of two, but for three codes, which change places first, four in a word:

    code           float8_e4m3fn    float8_e4m3b11fnuz
    0x7f, 0xff     NaN              30, -30               becomes 0x80
    0x80           -0               NaN                   becomes 0x00
"""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

_SIGNS = -0x7F7F7F80  # 0x80 in each byte, as int32
_ONES = 0x01010101
_MAGNITUDES = 0x7F7F7F7F


def comes_as_words(dtype) -> bool:
    """Whether values of this page dtype are to be loaded as int32 words; on v5e a cast to words costs more later."""
    return dtype == jnp.float8_e4m3fn


def widen_words(words, kv_dtype, dtype):
    """int32 [rows, lanes] of stored ``kv_dtype`` as ``widen`` gives it; a word has values of consecutive tokens."""
    if kv_dtype == jnp.float8_e4m3fn:
        words, kv_dtype = _swap_codes(words), jnp.float8_e4m3b11fnuz
    return widen(pltpu.bitcast(words, kv_dtype), dtype)


def widen(kv, dtype):
    """Stored keys or values as ``dtype``; times ``widen_scale`` they are what was stored."""
    if kv.dtype.itemsize == 1 and kv.dtype != jnp.int8:
        kv = kv.astype(jnp.float32)  # Mosaic casts fp8 to float32 only
    return kv.astype(dtype)


def widen_scale(dtype) -> float:
    """What widened keys and values of this page dtype are still to be multiplied by: folded into the op's scales."""
    return 16.0 if dtype == "float8_e4m3fn" else 1.0


def _swap_codes(words):
    """Four float8_e4m3fn codes in each word as float8_e4m3b11fnuz codes; no byte of a sum carries into the next."""
    magnitudes = words & _MAGNITUDES
    is_nan = ((magnitudes + _ONES) >> 7) & _ONES
    signs_of_nonzero = words & (magnitudes + _MAGNITUDES) & _SIGNS
    return (magnitudes + is_nan) | signs_of_nonzero
