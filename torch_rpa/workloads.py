"""Named shapes of real models and batches of serving, for tests, benchmarks and ahead-of-time compiles."""

from dataclasses import dataclass, field

import numpy as np

_SEED = 0


@dataclass(frozen=True)
class Model:
    """What the attention of a model is like.

    Attributes:
        heads: (num_q_heads, num_kv_heads, head_dim).
        options: of the ops, beside ``sm_scale``.
        sinks: whether it has one more logit for each query head.
    """

    heads: tuple[int, int, int]
    options: dict = field(default_factory=dict)
    sinks: bool = False


MODELS = {
    "llama-3-8b": Model((32, 8, 128)),
    "llama-3-70b-on-8-chips": Model((8, 1, 128)),
    "qwen2.5-7b": Model((28, 4, 128)),
    "gemma-2-9b": Model((16, 8, 256), {"sliding_window": 4096, "soft_cap": 50.0}),
    "gpt-oss-20b": Model((64, 8, 64), {"sliding_window": 128}, sinks=True),
    "phi-3-mini": Model((32, 32, 96)),
    "smollm2-135m": Model((9, 3, 64)),
}


def batches() -> dict[str, list[tuple[int, int]]]:
    """Name -> the sequences of one step, as (q_len, kv_len); at most 512 rows, 64 sequences and 8192 keys in one."""
    random_lens = np.random.default_rng(_SEED).integers(20, 601, 64)
    return {
        **{f"decode 64 x {n}": [(1, n)] * 64 for n in (128, 512, 2048, 8192)},
        "decode 64 x 20-600": [(1, int(n)) for n in random_lens],
        **{f"prefill 512 at {n}": [(512, n)] for n in (512, 2048, 8192)},
        "32 x 1000 + 448 at 2048": [(1, 1000)] * 32 + [(448, 2048)],
    }


def metadata(batch, page_size: int, max_num_seqs: int, context: int) -> list[np.ndarray]:
    """kv_lens, page_indices, cu_q_lens and num_seqs of a batch, int32, the pages in order.

    Args:
        batch: (q_len, kv_len) of each sequence.
        max_num_seqs, context: sequences, and tokens of each, that the page table has room for.
    """
    if len(batch) > max_num_seqs:
        raise ValueError(f"batch has {len(batch)} sequences, more than max_num_seqs {max_num_seqs}")
    kv_lens, cu_q_lens = np.zeros(max_num_seqs, np.int32), np.zeros(max_num_seqs + 1, np.int32)
    kv_lens[: len(batch)] = [kv_len for _, kv_len in batch]
    cu_q_lens[1 : len(batch) + 1] = np.cumsum([q_len for q_len, _ in batch])
    cu_q_lens[len(batch) + 1 :] = cu_q_lens[len(batch)]
    table = np.arange(max_num_seqs * (context // page_size), dtype=np.int32).reshape(max_num_seqs, -1)
    return [kv_lens, table, cu_q_lens, np.array([len(batch)], np.int32)]


def decodes_only(batch) -> bool:
    """Whether every sequence has one new token: then HBM bounds the time, otherwise the matrix units may."""
    return all(q_len == 1 for q_len, _ in batch)


def useful_bytes(batch, heads, kv_itemsize: int = 2, q_itemsize: int = 2) -> int:
    """Bytes of HBM traffic that no kernel can avoid: each sequence's keys and values once, q and out once."""
    num_q_heads, num_kv_heads, head_dim = heads
    token_bytes, row_bytes = 2 * num_kv_heads * head_dim * kv_itemsize, 2 * num_q_heads * head_dim * q_itemsize
    return sum(kv_len * token_bytes + q_len * row_bytes for q_len, kv_len in batch)


def useful_flops(batch, heads) -> int:
    """Floating-point operations of the two products over the causal part, a multiplication and an addition apart."""
    num_q_heads, _, head_dim = heads
    pairs = sum(q_len * kv_len - q_len * (q_len - 1) // 2 for q_len, kv_len in batch)
    return 4 * num_q_heads * head_dim * pairs
