"""The online softmax of one matrix of rows over one chunk of keys: arrays in, arrays out.

State of a row after some of its keys. Logits are in units of ln 2, for vector units raise 2 to a power, not e:

    top    the largest logit so far, or LOWEST
    total  the sum of 2 ** (logit - top)
    acc    the sum of 2 ** (logit - top) * value

Adding a chunk raises top and scales the other two by ``2 ** (old top - new top)`` (Milakov and Gimelshein,
arXiv 1805.02867). A chunk in which a row sees no key leaves its state as it is, bit for bit.
"""

from math import log2
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from torch_rpa.kernels.config import LANES, fill_lanes

# Below every logit, and finite: top - top must not be NaN.
LOWEST = -1e37
LOG2_E, LN_2 = log2(np.e), np.log(2.0).item()


class State(NamedTuple):
    """top and total, float32 [rows, 128]; acc, float32 [rows, head_dim].

    Vector units broadcast along sublanes for free, but not along lanes: top, which every lane needs, is kept in every
    lane. The total is left spread out over the lanes, and is their sum.
    """

    top: jax.Array
    total: jax.Array
    acc: jax.Array


class Chunk(NamedTuple):
    """scores [rows, keys]; the top [rows, 128] of these and all keys before; decay [rows, 128] of what came before.

    decay is None for rows that have no state yet.
    """

    scores: jax.Array
    top: jax.Array
    decay: jax.Array | None


EMPTY = State(LOWEST, 0.0, 0.0)  # before any key


def logits(q, k, *, scale: float, soft_cap: float | None):
    """``scale * q @ k.T``, capped, / ln 2: float32 [rows, keys] for q [rows, head_dim], k [keys, head_dim]."""
    scores = _matmul(q, k, contract=1)
    if soft_cap is None:
        return scores * (scale * LOG2_E)
    return jnp.tanh(scores * (scale / soft_cap)) * (soft_cap * LOG2_E)


def raise_top(top, scores):
    """The largest logit [rows, 128] with these scores; ``top`` is that of the keys before, or LOWEST."""
    return jnp.maximum(jnp.broadcast_to(scores.max(axis=1, keepdims=True), (len(scores), LANES)), top)


def weigh(scores, top):
    """The weights [rows, keys] of scores, -inf where a row does not see a key, relative to top [rows, 128]."""
    return exp2(scores - lanes(top, scores.shape[1]))


def exp2(x):
    """2 ** x. Mosaic of jax 0.7.1 makes ``exp(x * ln 2)`` of jnp.exp2, and of exp in turn ``2 ** (y / ln 2)``."""
    return 2.0**x


def add_up(weights):
    """The total of weights [rows, keys], float32 [rows, 128], spread out over the lanes."""
    weights = fill_lanes(weights)
    parts = [weights[:, i : i + LANES] for i in range(0, weights.shape[1], LANES)]
    while len(parts) > 1:  # pairs of neighbours: keys left out at the end change no bit
        parts = [sum(parts[i + 1 : i + 2], parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]


def sum_values(weights, values):
    """float32 [rows, head_dim]; values [keys, head_dim] must be finite: 0 * NaN is NaN. Weights get their dtype."""
    return _matmul(weights.astype(values.dtype), values, contract=0)


def enter(top, scores) -> Chunk:
    """The first half of adding a chunk: all that needs the scores only, so that other products may stand in between.

    ``top`` is None for rows that have no state yet.
    """
    new_top = raise_top(LOWEST if top is None else top, scores)
    return Chunk(scores, new_top, None if top is None else exp2(top - new_top))


def accumulate(total, acc, chunk: Chunk, values) -> State:
    """The second half: the state after the chunk, from the total and acc before it, if any, and the chunk's values."""
    weights = weigh(chunk.scores, chunk.top)
    new_total, new_acc = add_up(weights), sum_values(weights, values)
    if chunk.decay is None:
        return State(chunk.top, new_total, new_acc)
    return State(chunk.top, total * chunk.decay + new_total, acc * lanes(chunk.decay, values.shape[1]) + new_acc)


def merge(a: State, b: State) -> State:
    """The state of the keys of both."""
    top = jnp.maximum(a.top, b.top)
    decay_a, decay_b = exp2(a.top - top), exp2(b.top - top)
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
        sink = sink * LOG2_E
        new_top = jnp.maximum(top, sink)
        decay = exp2(top - new_top)
        total, top = total * decay + exp2(sink - new_top), new_top
    else:
        decay = 1.0
    at_least_one = jnp.maximum(total, 1.0)  # the top's own weight is 1; no logit at all leaves 0, and acc 0
    lse = jnp.where(total == 0, -jnp.inf, top * LN_2 + jnp.log(at_least_one))
    return decay / at_least_one, lse


def _matmul(a, b, contract):
    """a's last dimension against dimension ``contract`` of b, accumulated in float32, float32 inputs in full."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
