"""Ragged batches and a float64 oracle in NumPy, for environments without torch.

The grid of the op's tests and its oracle are in torch (``batches.py``, ``torch_rpa/reference.py``); this is the least
that shows that the kernels compute the same with another jax, or in another interpreter.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
import ml_dtypes
import numpy as np

TOLERANCE = {"float32": 3e-5, "bfloat16": 2e-2}
MIXED = ((1, 37), (20, 20), (1, 16), (5, 50), (0, 9), (1, 1), (17, 33))


@dataclass(frozen=True)
class Batch:
    """The arguments of the ops by name, the options that the pages need, and how many rows belong to a sequence."""

    args: dict
    num_rows: int
    scales: dict = field(default_factory=dict)

    def reads(self) -> dict:
        return {name: x for name, x in self.args.items() if name not in ("k", "v")}


def make_batch(seqs=MIXED, *, heads=(4, 2, 64), page_size=16, dtype="float32", kv_dtype=None, seed=0) -> Batch:
    """Sequences of (q_len, kv_len) on shuffled flat pages, NaN (or 127) in every slot and row that is not theirs.

    The slots of the new tokens hold what k and v are, quantized, so that the same batch is one to read, too.
    """
    num_q_heads, num_kv_heads, head_dim = heads
    rng = np.random.default_rng(seed)
    kv_dtype = kv_dtype or dtype
    scales = {"k_scale": 0.031, "v_scale": 0.027} if kv_dtype == "int8" else {}
    q_lens, kv_lens = np.array(seqs).T
    num_rows, counts = int(q_lens.sum()), -(-kv_lens // page_size)
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)])
    order = rng.permutation(counts.sum() + 3)
    table = np.full((len(seqs) + 2, counts.max() + 1), -1)
    table[len(seqs) :] = 10**8
    pages = np.full((len(order), page_size, num_kv_heads, 2, head_dim), 127.0 if kv_dtype == "int8" else np.nan)

    def rows(num_heads):
        return np.concatenate(
            [rng.normal(size=(num_rows, num_heads, head_dim)), np.full((3, num_heads, head_dim), np.nan)]
        )

    q, k, v = (_cast(rows(n), dtype) for n in (num_q_heads, num_kv_heads, num_kv_heads))
    for s, (q_len, kv_len) in enumerate(seqs):
        mine, order = order[: counts[s]], order[counts[s] :]
        table[s, : counts[s]] = mine
        tokens = rng.normal(size=(kv_len, num_kv_heads, 2, head_dim)).astype(np.float32)  # as quantization does
        tokens[kv_len - q_len :] = np.stack(
            [x[cu_q_lens[s] : cu_q_lens[s + 1]].astype(np.float32) for x in (k, v)], axis=2
        )
        tokens[:, :, 0] /= np.float32(scales.get("k_scale", 1.0))
        tokens[:, :, 1] /= np.float32(scales.get("v_scale", 1.0))
        for i, page in enumerate(mine):
            held = tokens[i * page_size : (i + 1) * page_size]
            pages[page, : len(held)] = held
    metadata = {
        "kv_lens": [*kv_lens, 2**31 - 1, -5],
        "page_indices": table,
        "cu_q_lens": [*cu_q_lens, -9, 10**9],
        "num_seqs": [len(seqs)],
    }
    args = {"q": q, "k": k, "v": v, "kv_pages": _cast(pages.reshape(*pages.shape[:2], -1), kv_dtype)}
    args |= {name: np.array(x, np.int32) for name, x in metadata.items()}
    return Batch(args, num_rows, scales)


def without_new_tokens(batch: Batch) -> Batch:
    """The batch before its update: the slots of this step's tokens hold NaN (or 127)."""
    pages = batch.args["kv_pages"].copy()
    for page, slot in _new_slots(batch):
        pages[page, slot] = 127 if pages.dtype == np.int8 else np.nan
    return Batch(batch.args | {"kv_pages": pages}, batch.num_rows, batch.scales)


def oracle(batch: Batch, *, sm_scale=1.0, causal=True, sliding_window=None, soft_cap=None, sinks=None):
    """out [tokens, query heads, head_dim] and lse [tokens, query heads] in float64, one row and head at a time."""
    q, pages = batch.args["q"].astype(float), batch.args["kv_pages"].astype(float)
    kv_lens, table, cu_q_lens = (batch.args[name] for name in ("kv_lens", "page_indices", "cu_q_lens"))
    num_tokens, num_q_heads, head_dim = q.shape
    page_size, group = pages.shape[1], num_q_heads * 2 * head_dim // pages.shape[2]
    out, lse = np.zeros(q.shape), np.full((num_tokens, num_q_heads), -np.inf)
    for s in range(int(batch.args["num_seqs"][0])):
        j = np.arange(kv_lens[s])
        kv = pages[table[s, j // page_size], j % page_size].reshape(len(j), -1, 2, head_dim)
        kv = kv * np.array([batch.scales.get("k_scale", 1.0), batch.scales.get("v_scale", 1.0)])[:, None]
        for row in range(cu_q_lens[s], cu_q_lens[s + 1]):
            p = kv_lens[s] - cu_q_lens[s + 1] + row
            seen = (j <= p) if causal else (j >= 0)
            if sliding_window is not None:
                seen &= abs(p - j) < sliding_window
            for head in range(num_q_heads):
                logits = kv[seen, head // group, 0] @ q[row, head] * sm_scale
                logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
                logits = logits if sinks is None else np.append(logits, float(sinks[head]))
                lse[row, head] = np.logaddexp.reduce(logits) if len(logits) else -np.inf
                weights = np.exp(logits[: seen.sum()] - lse[row, head])
                out[row, head] = weights @ kv[seen, head // group, 1]
    return out, lse


def assert_matches(batch: Batch, out, lse=None, **options):
    """out and lse within the dtype's tolerance of the oracle, and zeros in the padding rows."""
    expected_out, expected_lse = oracle(batch, **options)
    tolerance = TOLERANCE[batch.args["q"].dtype.name]
    np.testing.assert_allclose(np.asarray(out, float), expected_out, rtol=tolerance, atol=tolerance)
    assert not np.asarray(out, float)[batch.num_rows :].any()
    if lse is not None:
        np.testing.assert_allclose(np.asarray(lse, float), expected_lse, rtol=3e-5, atol=3e-5)


def assert_same_pages(pages, expected):
    """Bit for bit, but any NaN for a NaN."""
    pages, expected = np.asarray(pages), np.asarray(expected)
    same = pages.view(np.uint8).reshape(*pages.shape, -1) == expected.view(np.uint8).reshape(*pages.shape, -1)
    both_nan = (pages != pages) & (expected != expected)
    assert (same.all(axis=-1) | both_nan).all()


def _new_slots(batch: Batch):
    """(page, slot) of every new token."""
    kv_lens, table, cu_q_lens = (batch.args[name] for name in ("kv_lens", "page_indices", "cu_q_lens"))
    page_size = batch.args["kv_pages"].shape[1]
    for s in range(int(batch.args["num_seqs"][0])):
        for position in range(kv_lens[s] - (cu_q_lens[s + 1] - cu_q_lens[s]), kv_lens[s]):
            yield table[s, position // page_size], position % page_size


def _cast(x, dtype):
    """x as ``dtype``, rounded to nearest and kept in the finite range; NaN stays where the dtype has it."""
    dtype = jnp.dtype(dtype)
    if dtype == np.int8:
        return np.clip(np.rint(x), -128, 127).astype(dtype)
    limit = float(ml_dtypes.finfo(dtype).max)
    return np.clip(x, -limit, limit).astype(np.float32).astype(dtype)
