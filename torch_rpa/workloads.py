"""Named shapes of real models and batches of serving, for tests, benchmarks and ahead-of-time compiles.

numpy is imported by what computes with it: the names alone, for a command line, come without.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch_rpa.extras import from_extra

if TYPE_CHECKING:
    import numpy as np

_SEED = 0


@dataclass(frozen=True)
class Model:
    """What the attention of a model is like.

    Attributes:
        heads: (num_q_heads, num_kv_heads, head_dim).
        options: of the ops, beside ``sm_scale``; with windows, those of its windowed layers.
        sinks: whether it has one more logit for each query head.
        config: its transformers config, as far as it differs from the defaults of its ``model_type``.
        num_chips: how many chips its heads are shared over; ``heads`` are those of one.
    """

    heads: tuple[int, int, int]
    options: dict = field(default_factory=dict)
    sinks: bool = False
    config: dict = field(default_factory=dict)
    num_chips: int = 1


def _config(model_type, hidden, intermediate, layers, heads, kv_heads, vocab, longest, **others) -> dict:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    heads = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {
        "model_type": model_type, **sizes, **heads, "vocab_size": vocab, "max_position_embeddings": longest, **others
    }  # fmt: skip


# Sizes as in the published configs of these models.
MODELS = {
    "llama-3-8b": Model((32, 8, 128), config=_config("llama", 4096, 14336, 32, 32, 8, 128256, 8192)),
    "llama-3-70b-on-8-chips": Model(
        (8, 1, 128), config=_config("llama", 8192, 28672, 80, 64, 8, 128256, 8192), num_chips=8
    ),
    "qwen2.5-7b": Model((28, 4, 128), config=_config("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768)),
    "gemma-2-9b": Model(
        (16, 8, 256),
        {"sliding_window": 4096, "soft_cap": 50.0},
        config=_config("gemma2", 3584, 14336, 42, 16, 8, 256000, 8192, head_dim=256),
    ),
    "gpt-oss-20b": Model(
        (64, 8, 64),
        {"sliding_window": 128},
        sinks=True,
        config=_config("gpt_oss", 2880, 2880, 24, 64, 8, 201088, 131072, head_dim=64, num_local_experts=32),
    ),
    "phi-3-mini": Model((32, 32, 96), config=_config("phi3", 3072, 8192, 32, 32, 32, 32064, 4096)),
    "smollm2-135m": Model(
        (9, 3, 64), config=_config("llama", 576, 1536, 30, 9, 3, 49152, 8192, tie_word_embeddings=True)
    ),
}


def batches() -> dict[str, list[tuple[int, int]]]:
    """Name -> the sequences of one step, as (q_len, kv_len); at most 512 rows, 64 sequences and 8192 keys in one."""
    random_lens = _numpy().random.default_rng(_SEED).integers(20, 601, 64)
    return {
        **{f"decode 64 x {n}": [(1, n)] * 64 for n in (128, 512, 2048, 8192)},
        "decode 64 x 20-600": [(1, int(n)) for n in random_lens],
        **{f"prefill 512 at {n}": [(512, n)] for n in (512, 2048, 8192)},
        "32 x 1000 + 448 at 2048": [(1, 1000)] * 32 + [(448, 2048)],
    }


def metadata(batch, page_size: int, max_num_seqs: int, context: int, num_pages: int | None = None) -> list[np.ndarray]:
    """kv_lens, page_indices, cu_q_lens and num_seqs of a batch, int32, the pages in order.

    Args:
        batch: (q_len, kv_len) of each sequence.
        max_num_seqs, context: sequences, and tokens of each, that the page table has room for.
        num_pages: where there are fewer than the table has room for, it names them again and again.
    """
    np = _numpy()
    if len(batch) > max_num_seqs:
        raise ValueError(f"batch has {len(batch)} sequences, more than max_num_seqs {max_num_seqs}")
    kv_lens, cu_q_lens = np.zeros(max_num_seqs, np.int32), np.zeros(max_num_seqs + 1, np.int32)
    kv_lens[: len(batch)] = [kv_len for _, kv_len in batch]
    cu_q_lens[1 : len(batch) + 1] = np.cumsum([q_len for q_len, _ in batch])
    cu_q_lens[len(batch) + 1 :] = cu_q_lens[len(batch)]
    table = np.arange(max_num_seqs * (context // page_size), dtype=np.int32).reshape(max_num_seqs, -1)
    table %= num_pages or table.size
    return [kv_lens, table, cu_q_lens, np.array([len(batch)], np.int32)]


def itemsize(dtype: str) -> int:
    """Bytes of one element of a dtype that pages may have."""
    return {"float32": 4, "bfloat16": 2}.get(dtype, 1)


def scales(kv_dtype: str) -> dict[str, float]:
    """The options that pages of this dtype cannot do without."""
    return {"k_scale": 0.1, "v_scale": 0.1} if kv_dtype == "int8" else {}


def decodes_only(batch) -> bool:
    """Whether every sequence has one new token: then HBM bounds the time, otherwise the matrix units may."""
    return all(q_len == 1 for q_len, _ in batch)


def share_of_peak(batch, heads, seconds: float, chip, kv_itemsize: int = 2, window: int | None = None) -> float:
    """What a step that takes so long makes of its chip: of HBM bandwidth if it only decodes, otherwise of peak FLOP/s.

    Args:
        heads: (num_q_heads, num_kv_heads, head_dim).
        chip: a ``torch_rpa.chips.Chip``.
    """
    if decodes_only(batch):
        return useful_bytes(batch, heads, kv_itemsize, window=window) / seconds / chip.hbm_bytes_per_s
    return useful_flops(batch, heads, window) / seconds / chip.flops_per_s


def useful_bytes(batch, heads, kv_itemsize: int = 2, q_itemsize: int = 2, window: int | None = None) -> int:
    """Bytes of HBM traffic that no kernel can avoid: each sequence's visible keys and values once, q and out once."""
    num_q_heads, num_kv_heads, head_dim = heads
    token_bytes, row_bytes = 2 * num_kv_heads * head_dim * kv_itemsize, 2 * num_q_heads * head_dim * q_itemsize
    visible = ((q_len, min(kv_len, (window or kv_len) + q_len - 1)) for q_len, kv_len in batch)
    return sum(keys * token_bytes + q_len * row_bytes for q_len, keys in visible)


def useful_flops(batch, heads, window: int | None = None) -> int:
    """Floating-point operations of the two products over what is visible, a multiplication and an addition apart."""
    num_q_heads, _, head_dim = heads
    return 4 * num_q_heads * head_dim * sum(_visible_pairs(*sequence, window) for sequence in batch)


def _visible_pairs(q_len: int, kv_len: int, window: int | None) -> int:
    """Of a row and a key, in a sequence with causal attention."""
    np = _numpy()
    keys = np.arange(kv_len - q_len + 1, kv_len + 1)  # that each row sees without a window
    return int(np.minimum(keys, window or kv_len).sum())


def _numpy():
    with from_extra("aot", "torch_rpa.workloads"):
        import numpy
    return numpy
