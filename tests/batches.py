"""Ragged batches for the tests, with poison wherever the contract says that nothing may be read.

``make_batch([(q_len, kv_len), ...])`` gives the arguments of the ops on the CPU. Every slot of the pages that belongs
to no sequence, every padding row and every unused entry of the metadata holds NaN, -1 or a wild number.
"""

from dataclasses import dataclass, field, replace

import torch

from torch_rpa import bridges, reference
from torch_rpa.validation import dtype_name, tpu_reasons
from torch_rpa.workloads import MODELS

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

# Head counts and sizes of real models: (num_q_heads, num_kv_heads, head_dim).
MODEL_HEADS = {name: model.heads for name, model in MODELS.items()} | {
    "qwen2-0.5b": (14, 2, 64),
    "llama-3.2-3b": (24, 8, 128),
    "qwen2.5-14b": (40, 8, 128),
    "falcon-7b": (71, 1, 64),
}

NO_RESULT_OPTIONS = ("mask_value", "num_kv_pages_per_block", "num_queries_per_block", "vmem_limit_bytes")

MIXED = ((1, 37), (20, 20), (1, 16), (5, 50), (0, 9), (1, 1), (17, 33))


@dataclass(frozen=True)
class Batch:
    """The tensors of a call on the CPU, and the options that its pages need."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_pages: torch.Tensor
    kv_lens: torch.Tensor
    page_indices: torch.Tensor
    cu_q_lens: torch.Tensor
    num_seqs: torch.Tensor
    scales: dict = field(default_factory=dict)

    @property
    def metadata(self):
        return self.kv_lens, self.page_indices, self.cu_q_lens, self.num_seqs

    @property
    def num_rows(self) -> int:
        """Rows that belong to a sequence; the others are padding."""
        return int(self.cu_q_lens[int(self.num_seqs[0])])

    def to(self, device) -> "Batch":
        """The batch on another device; on a TPU with flat pages, the form that works there."""
        moved = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, torch.Tensor)}
        if is_tpu(device):
            moved["kv_pages"] = moved["kv_pages"].flatten(2)
        return replace(self, **moved)

    def is_refused_on(self, device) -> bool:
        """Whether the TPU kernel cannot take these heads or pages of this width."""
        return is_tpu(device) and bool(
            tpu_reasons(self.q.shape, self.kv_pages.flatten(2).shape, dtype_name(self.kv_pages.dtype))
        )

    def read(self, op=None, **options):
        """Call a read-only op (``ragged_paged_attention_with_lse`` by default)."""
        op = op or torch.ops.rpa.ragged_paged_attention_with_lse
        return op(self.q, self.kv_pages, *self.metadata, **self.scales, **options)

    def update(self, op=None, **options):
        """Call an update op (the functional one by default)."""
        op = op or torch.ops.rpa.ragged_paged_attention_update
        return op(self.q, self.k, self.v, self.kv_pages, *self.metadata, **self.scales, **options)

    def expected(self, *, update=False, **options):
        """out, lse and pages of the float64 oracle; options that change no result are left out."""
        options = {name: value for name, value in options.items() if name not in NO_RESULT_OPTIONS}
        new_tokens = {"k": self.k, "v": self.v} if update else {}
        return reference.ragged_paged_attention(
            self.q, self.kv_pages, *self.metadata, **new_tokens, **self.scales, **options
        )


def make_batch(
    seqs=MIXED,
    *,
    heads=(4, 2, 64),
    page_size=16,
    dtype=torch.float32,
    kv_dtype=None,
    form="heads",
    spare_seqs=2,
    spare_rows=3,
    spare_pages=3,
    seed=0,
) -> Batch:
    """A batch of sequences given as (q_len, kv_len), with shuffled pages and poison around them.

    Args:
        heads: (num_q_heads, num_kv_heads, head_dim).
        form: of the pages, "heads" or "flat".
        spare_seqs, spare_rows, spare_pages: sequences, rows and pages beyond what the batch needs, all poisoned.
    """
    num_q_heads, num_kv_heads, head_dim = heads
    rng = torch.Generator().manual_seed(seed)
    q_lens, kv_lens = [q for q, _ in seqs], [kv for _, kv in seqs]
    num_rows, max_num_seqs = sum(q_lens), len(seqs) + spare_seqs
    pages_of = [-(-n // page_size) for n in kv_lens]
    num_pages, pages_per_seq = sum(pages_of) + spare_pages, max([*pages_of, 1]) + 1

    def rows(num_heads):
        x = torch.full((num_rows + spare_rows, num_heads, head_dim), torch.nan)
        x[:num_rows] = torch.randn(num_rows, num_heads, head_dim, generator=rng)
        return x.to(dtype)

    batch = Batch(
        q=rows(num_q_heads),
        k=rows(num_kv_heads),
        v=rows(num_kv_heads),
        kv_pages=_poisoned_pages((num_pages, page_size, 2 * num_kv_heads, head_dim), kv_dtype or dtype),
        kv_lens=_int32([*kv_lens, *[2**31 - 1, -5][:spare_seqs], *[7] * (spare_seqs - 2)]),
        page_indices=torch.full((max_num_seqs, pages_per_seq), -1, dtype=torch.int32),
        cu_q_lens=_int32([sum(q_lens[:s]) for s in range(len(seqs) + 1)] + [-9, 10**9, *[3] * spare_seqs][:spare_seqs]),
        num_seqs=_int32([len(seqs)]),
        scales=_scales(kv_dtype),
    )
    _fill_pages(batch, pages_of, rng)
    batch.page_indices[len(seqs) :] = 10**8
    if form == "flat":
        batch = replace(batch, kv_pages=batch.kv_pages.flatten(2))
    return batch


def _int32(values):
    return torch.tensor(values, dtype=torch.int32)


def _scales(kv_dtype):
    return {"k_scale": 0.031, "v_scale": 0.027} if kv_dtype == torch.int8 else {}


def _poisoned_pages(shape, dtype):
    return torch.full(shape, 127 if dtype == torch.int8 else torch.nan).to(dtype)


def _fill_pages(batch, pages_of, rng):
    """Hand out shuffled pages and fill the slots of every sequence's kv_len tokens."""
    page_size, kv_dtype = batch.kv_pages.shape[1], batch.kv_pages.dtype
    free = torch.randperm(len(batch.kv_pages), generator=rng).tolist()
    for s, count in enumerate(pages_of):
        mine, free = free[:count], free[count:]
        batch.page_indices[s, :count] = _int32(mine)
        tokens = torch.randn(int(batch.kv_lens[s]), *batch.kv_pages.shape[2:], generator=rng)
        tokens[:, 0::2] = reference.quantize(tokens[:, 0::2], kv_dtype, batch.scales.get("k_scale")).float()
        tokens[:, 1::2] = reference.quantize(tokens[:, 1::2], kv_dtype, batch.scales.get("v_scale")).float()
        for i, page in enumerate(mine):
            held = tokens[i * page_size : (i + 1) * page_size]
            batch.kv_pages[page, : len(held)] = held.to(kv_dtype)


def random_batch(seed, dtype=torch.float32):
    """A batch of 1 to 6 sequences with random lengths, all of one shape: 64 rows, 6 sequences, 40 pages."""
    rng = torch.Generator().manual_seed(seed)
    seqs, rows = [], 0
    for _ in range(int(torch.randint(1, 7, (), generator=rng))):
        q_len = int(torch.randint(0, 12, (), generator=rng))
        seqs.append((q_len, q_len + int(torch.randint(0, 70, (), generator=rng))))
        rows += q_len
    pages = sum(-(-kv // 16) for _, kv in seqs)
    batch = make_batch(
        seqs, dtype=dtype, spare_rows=64 - rows, spare_seqs=6 - len(seqs), spare_pages=40 - pages, seed=seed
    )
    table = torch.full((6, 8), -1, dtype=torch.int32)
    table[:, : batch.page_indices.shape[1]] = batch.page_indices
    return replace(batch, page_indices=table)


def forget_new_tokens(batch: Batch) -> Batch:
    """The batch before its update: the slots of this step's own tokens hold poison too."""
    pages = batch.kv_pages.clone()
    heads = pages.view(*pages.shape[:2], -1, batch.q.shape[2])
    poison = _poisoned_pages((1,), pages.dtype)[0]
    for s in range(int(batch.num_seqs[0])):
        kv_len = int(batch.kv_lens[s])
        q_len = int(batch.cu_q_lens[s + 1] - batch.cu_q_lens[s])
        for position in range(kv_len - q_len, kv_len):
            page_size = heads.shape[1]
            heads[int(batch.page_indices[s, position // page_size]), position % page_size] = poison
    return replace(batch, kv_pages=pages)


def assert_close(actual, expected, dtype):
    """Equal within the dtype's tolerance, absolute plus relative; NaN and unequal infinities never pass."""
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


def assert_matches_oracle(batch: Batch, out, lse=None, *, update=False, **options):
    """out (and lse) of any device against the float64 oracle, and zeros in the padding rows."""
    expected_out, expected_lse, _ = batch.expected(update=update, **options)
    assert out.dtype == batch.q.dtype
    assert_close(out.cpu(), expected_out, out.dtype)
    assert not out.cpu()[batch.num_rows :].any(), "padding rows must be zeros"
    if lse is not None:
        assert lse.dtype == torch.float32
        assert_close(lse.cpu(), expected_lse, torch.float32)


def finish_step(device: torch.device) -> None:
    """End a step as a serving loop does: on XLA, run all that is pending, the update of the pages included."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()


def is_tpu(device) -> bool:
    bridge = bridges.of(device)
    return bridge is not None and bridge.device_kind() == "tpu"


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    """All bytes in order, whichever form pages have."""
    return x.cpu().contiguous().view(torch.uint8).flatten()
