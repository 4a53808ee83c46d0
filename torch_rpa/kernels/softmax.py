"""The online softmax of one matrix of rows over one chunk of keys: arrays in, arrays out.

State of a row after some of its keys (with exp, for which Mosaic of jax 0.7.1 multiplies once less than for exp2):

    top    the largest logit so far, or LOWEST
    total  the sum of exp(logit - top)
    acc    the sum of exp(logit - top) * value

Adding a chunk raises top and scales the other two by ``exp(old top - new top)`` (Milakov and Gimelshein,
arXiv 1805.02867). A chunk in which a row sees no key leaves its state as it is, bit for bit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from torch_rpa.kernels.config import LANES

# Below every logit, and finite: top - top must not be NaN.
LOWEST = -1e37


class State(NamedTuple):
    """top and total, float32 [rows, 128], the same in every lane; acc, float32 [rows, head_dim].

    Vector units broadcast along sublanes for free, but not along lanes: what every lane needs is kept in every lane.
    """

    top: jax.Array
    total: jax.Array
    acc: jax.Array


EMPTY = State(LOWEST, 0.0, 0.0)  # before any key


def logits(q, k, *, scale: float, soft_cap: float | None):
    """``scale * q @ k.T``, capped: float32 [rows, keys] for q [rows, head_dim], k [keys, head_dim]."""
    scores = _matmul(q, k, contract=1)
    if soft_cap is None:
        return scores * scale
    return jnp.tanh(scores * (scale / soft_cap)) * soft_cap


def weigh(scores, top=LOWEST):
    """The new top [rows, 128], the weights [rows, keys] relative to it, and their sum [rows, 128].

    Args:
        scores: float32 [rows, keys] from ``logits``, -inf where a row does not see a key.
        top: of the keys before, [rows, 128].
    """
    top = jnp.maximum(jnp.broadcast_to(scores.max(axis=1, keepdims=True), (len(scores), LANES)), top)
    weights = jnp.exp(scores - lanes(top, scores.shape[1]))
    return top, weights, jnp.broadcast_to(weights.sum(axis=1, keepdims=True), top.shape)


def sum_values(weights, values):
    """float32 [rows, head_dim]; values [keys, head_dim] must be finite: 0 * NaN is NaN. Weights get their dtype."""
    return _matmul(weights.astype(values.dtype), values, contract=0)


def update(state: State, scores, values) -> State:
    """The state after one more chunk, with scores and values as in ``weigh`` and ``sum_values``."""
    top, weights, total = weigh(scores, state.top)
    decay = jnp.exp(state.top - top)
    acc = state.acc * lanes(decay, state.acc.shape[1]) + sum_values(weights, values)
    return State(top, state.total * decay + total, acc)


def merge(a: State, b: State) -> State:
    """The state of the keys of both."""
    top = jnp.maximum(a.top, b.top)
    decay_a, decay_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    width = b.acc.shape[1]
    acc = a.acc * lanes(decay_a, width) + b.acc * lanes(decay_b, width)
    return State(top, a.total * decay_a + b.total * decay_b, acc)


def lanes(x, count):
    """[rows, count] from [rows, 128] that is the same in every lane."""
    if count <= LANES:
        return x[:, :count]
    return jnp.concatenate([x] * -(-count // LANES), axis=1)[:, :count]


def finish(top, total, sink=None):
    """What a row's acc is multiplied by to become its output, and its lse, -inf for no logit at all.

    Args:
        top, total: float32, of any one shape.
        sink: one more logit without a value, or None.
    """
    if sink is not None:
        new_top = jnp.maximum(top, sink)
        decay = jnp.exp(top - new_top)
        total, top = total * decay + jnp.exp(sink - new_top), new_top
    else:
        decay = 1.0
    is_empty = total == 0
    lse = jnp.where(is_empty, -jnp.inf, top + jnp.log(jnp.where(is_empty, 1.0, total)))
    return jnp.where(is_empty, 0.0, decay / jnp.where(is_empty, 1.0, total)), lse


def _matmul(a, b, contract):
    """a's last dimension against dimension ``contract`` of b, accumulated in float32, float32 inputs in full."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
