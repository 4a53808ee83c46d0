"""New keys and values in the dtype of the pages."""

import jax.numpy as jnp
from jax import lax


def quantize(x, dtype, scale):
    """``x / scale`` as ``dtype``: rounded to nearest even, clamped to the finite range; casts wrap or give NaN."""
    dtype = jnp.dtype(dtype)
    if scale is not None:
        x = x.astype(jnp.float32) / scale
    if dtype == jnp.int8:
        x = jnp.clip(jnp.round(x.astype(jnp.float32)), -128, 127)
        return jnp.where(x != x, 0.0, x).astype(jnp.int32).astype(dtype)
    return round_to_fp8(x, dtype) if dtype.itemsize == 1 else x.astype(dtype)


def round_to_fp8(x, dtype):
    """x as fp8, rounded once: XLA's CPU compiler casts through float16, which rounds twice and so may round wrong."""
    limits = jnp.finfo(dtype)
    largest = float(limits.max)
    x = jnp.clip(x.astype(jnp.float32), -largest, largest)
    exponent = (lax.bitcast_convert_type(x, jnp.int32) >> 23 & 0xFF) - 127
    # The step between neighbours in fp8, a power of two; below the smallest normal number it stays the same.
    step = jnp.maximum(exponent, limits.minexp) - limits.nmant
    step = lax.bitcast_convert_type(step + 127 << 23, jnp.float32)
    return (jnp.round(x / step) * step).astype(dtype)
