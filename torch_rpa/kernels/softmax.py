"""The online softmax of one matrix of rows over one chunk of keys: arrays in, arrays out.

State of a row after some of its keys, with logits in units of 1 / log2(e), so that the exponential is a power of two:

    top    the largest logit so far, or LOWEST
    total  the sum of 2 ** (logit - top)
    acc    the sum of 2 ** (logit - top) * value

Adding a chunk raises top and scales the other two by ``2 ** (old top - new top)`` (Milakov and Gimelshein,
arXiv 1805.02867). A chunk in which a row sees no key leaves its state as it is, bit for bit.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

LOG2_E = math.log2(math.e)
# Below every logit, and finite: top - top must not be NaN.
LOWEST = -1e37


class State(NamedTuple):
    """top and total, float32 [rows, 1]; acc, float32 [rows, head_dim]."""

    top: jax.Array
    total: jax.Array
    acc: jax.Array


def logits(q, k, *, scale: float, soft_cap: float | None):
    """``scale * q @ k.T``, capped, times log2(e): float32 [rows, keys] for q [rows, head_dim], k [keys, head_dim]."""
    scores = _matmul(q, k, contract=1)
    if soft_cap is None:
        return scores * (scale * LOG2_E)
    return jnp.tanh(scores * (scale / soft_cap)) * (soft_cap * LOG2_E)


def update(state: State, scores, values) -> State:
    """The state after one more chunk.

    Args:
        scores: float32 [rows, keys] from ``logits``, -inf where a row does not see a key.
        values: [keys, head_dim], finite: 0 * NaN is NaN. Weights are rounded to their dtype.
    """
    top = jnp.maximum(state.top, scores.max(axis=1, keepdims=True))
    weights = jnp.exp2(scores - top)
    decay = jnp.exp2(state.top - top)
    total = state.total * decay + weights.sum(axis=1, keepdims=True)
    return State(top, total, state.acc * decay + _matmul(weights.astype(values.dtype), values, contract=0))


def finish(top, total, sink=None):
    """What a row's acc is multiplied by to become its output, and its lse: natural logarithm, -inf for no logit at all.

    Args:
        top, total: float32, of any one shape.
        sink: one more logit without a value, in natural units, or None.
    """
    if sink is not None:
        sink = jnp.maximum(sink * LOG2_E, -jnp.inf)
        new_top = jnp.maximum(top, sink)
        decay = jnp.exp2(top - new_top)
        total, top = total * decay + jnp.exp2(sink - new_top), new_top
    else:
        decay = 1.0
    is_empty = total == 0
    lse = jnp.where(is_empty, -jnp.inf, (top + jnp.log2(jnp.where(is_empty, 1.0, total))) / LOG2_E)
    return jnp.where(is_empty, 0.0, decay / jnp.where(is_empty, 1.0, total)), lse


def _matmul(a, b, contract):
    """a's last dimension against dimension ``contract`` of b, accumulated in float32, float32 inputs in full."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
