"""Keys and values of a set of KV heads from a slot to registers, in the dtype to compute in: [keys, K0 V0 K1 V1 ...].

The matrix unit wants a head's keys as rows. In the flat form of pages they are: tokens stand on sublanes, and a head is
a range of lanes. In the heads form the rows of one token are its heads, so that the rows of one head are ``token_rows``
apart: every load takes them by that stride, as 32-bit words, for narrower rows cannot be loaded so. A word of bfloat16
has the K and the V of one token, and is taken apart and put together again with that of the next token:

    words of head 0    [ K of token 0 | V of token 0 ]        k    [ K of token 0 | K of token 1 ]
                       [ K of token 1 | V of token 1 ]        v    [ V of token 0 | V of token 1 ]

That is done between the load and the matrix unit, which is the slower: there is no second buffer and no pass over it.
"""

import functools
import operator

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from torch_rpa.kernels.config import LANES, KernelConfig
from torch_rpa.kernels.refs import Refs
from torch_rpa.kernels.widen import comes_as_words, widen, widen_words


def load_kv(config: KernelConfig, refs: Refs, slot, head_set, num_heads, num_pages):
    """k and v of KV heads ``head_set * num_heads`` and following in the first pages of a slot.

    Returns:
        [num_pages * page_size, num_heads * 2 * head_dim], heads interleaved K0 V0 K1 V1 ..., not scaled.
    """
    load = _load_rows if config.heads_form else _load_lanes
    return load(config, refs.kv_buffer, slot, head_set, num_heads, num_pages)


def _load_lanes(config: KernelConfig, ref, slot, head_set, num_heads, num_pages):
    """From flat pages."""
    lanes = num_heads * 2 * config.head_dim
    first_lane = head_set * lanes if isinstance(head_set, int) else pl.multiple_of(head_set * lanes, LANES)
    index = slot, pl.ds(0, num_pages), slice(None), pl.ds(first_lane, lanes)
    if comes_as_words(ref.dtype):
        words = ref.bitcast(jnp.int32)[index]
        return widen_words(words.reshape(-1, lanes), ref.dtype, config.compute_dtype)
    return widen(ref[index], config.compute_dtype).reshape(-1, lanes)


def _load_rows(config: KernelConfig, ref, slot, head_set, num_heads, num_pages):
    """From pages in heads form."""
    words, per_word = ref.bitcast(jnp.int32).at[slot], 4 // ref.dtype.itemsize
    first_word = head_set * (2 * num_heads // per_word)
    num_words = num_pages * config.page_size // per_word
    rows = [
        widen_words(_gather_row(config, words, first_word, row, num_words), ref.dtype, config.compute_dtype)
        for row in range(2 * num_heads)
    ]
    return jnp.concatenate(rows, axis=1)


def _gather_row(config: KernelConfig, words, first_word, row, num_words):
    """int32 [num_words, head_dim]: of every token row ``row`` after word ``first_word``, several tokens in a word."""
    per_word = 4 // jnp.dtype(config.kv_dtype).itemsize
    token_words = config.token_rows // per_word
    word, source = divmod(row, per_word)
    parts = []
    for target in range(per_word):
        rows = pl.ds(first_word + word + target * token_words, num_words, stride=config.token_rows)
        parts.append(_move(words[rows, :], source, target, per_word))
    return functools.reduce(operator.or_, parts)


def _move(words, source, target, per_word):
    """Of the ``per_word`` parts of each word that at place ``source``, at place ``target``, and zeros elsewhere."""
    bits = 32 // per_word
    distance = (target - source) * bits
    if abs(distance) < 32 - bits:  # from one end of the word to the other, all other parts fall out
        words = words & np.uint32((1 << bits) - 1 << source * bits).astype(np.int32)
    if distance < 0:
        return lax.shift_right_logical(words, jnp.int32(-distance))
    return words << distance if distance else words
