"""Shapes, block sizes and memory of one compiled kernel: frozen facts that every other module reads.

q, out [num_tokens, num_q_heads * head_dim]           kv_pages [num_pages, page_size, 2 * num_kv_heads * head_dim]

  row block 0  +-----------------+  sequence 0          sequence 1, pages in the order of its page table:
               | s0 s0 s0 s0 s0  |  rows 0-4
               | s1              |  row 5 (decode)      | page 7 | page 2 | page 9 | page 4 | page 0 |~ tail ~|
               | s2 s2 s2 s2 s2  |  rows 6-             |<- key block 0 ->|<- key block 1 ->|<- key block 2 ->|
  row block 1  +-----------------+                      (whole pages; blocks count from the sequence's start)
               | s2 s2 s2        |  rows -16
               | padding, zeros  |                      one token of a page, heads interleaved on lanes:
               +-----------------+                      | K0 | V0 | K1 | V1 | ...   head_dim lanes each

row block    ``block_rows`` rows of q and out: one grid step, staged by BlockSpec
tile         the rows of one sequence inside one row block
key block    ``block_pages`` pages of one sequence, all heads: one slot of the ring of ``num_slots`` buffers
item         a tile and one of its key blocks: the unit of fetching and of computing
decode group ``group_items`` items of decode rows, computed together, each with the query heads of a set of KV heads
row step     ``step_rows`` rows of a prefill tile's matrix of one KV head, in which row ``r * group + g`` is row r
             for the g-th query head that shares it
"""

from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import jax.numpy as jnp

from torch_rpa import chips
from torch_rpa.chips import Chip
from torch_rpa.kernels import tuning
from torch_rpa.kernels.widen import widen_scale
from torch_rpa.options import AttentionOptions
from torch_rpa.validation import page_shape, page_table_bytes, tpu_reasons

LANES = 128
# Rows that one iteration of a copy loop moves, where a row block can be cut like that: enough to hide latencies.
_COPY_ROWS = 64
# Rows that a DMA may take of a page, whatever its dtype.
_UNIT_TOKENS = 32
_PLAIN_HEADS, _FIRST_HEADS, _EDGE_HEADS = 8, 4, 2
_SPAN_KEYS = 512
# Lanes of one token that a decode step takes at once.
_SET_LANES = 2048


class HeadLanes(NamedTuple):
    """Where a KV head's lanes stand in a decode matrix: the first head's, and how far it is to the next head's."""

    first: int
    step: int


@dataclass(frozen=True)
class KernelConfig:
    """One compiled program: everything but the values of the arrays.

    Attributes:
        block_rows, block_pages, num_slots, group_items, step_rows: see the figure.
        row_batches: how many decode groups' new tokens may be on their way to the pages, a power of two.
        kv_dtype, q_dtype: names of dtypes.
        heads_form: whether a token's heads are rows of their own in a page, as in the heads form, and not lanes of one.
        with_lse, with_sinks, with_update: whether lse is written, sinks are read, new tokens are written to the pages.
        chip: what it is compiled for.
    """

    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int
    max_num_seqs: int
    pages_per_seq: int
    q_dtype: str
    kv_dtype: str
    options: AttentionOptions
    with_lse: bool
    with_sinks: bool
    with_update: bool
    heads_form: bool
    chip: Chip
    block_rows: int
    block_pages: int
    num_slots: int
    group_items: int
    row_batches: int
    step_rows: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def block_keys(self) -> int:
        return self.block_pages * self.page_size

    @property
    def copy_rows(self) -> int:
        """Rows that one iteration of a copy between the forms of rows moves."""
        return gcd(self.block_rows, _COPY_ROWS)

    @property
    def num_row_blocks(self) -> int:
        return -(-self.num_tokens // self.block_rows)

    @property
    def decode_pages(self) -> tuple[int, ...]:
        """How many of a block's first pages a decode group computes, as few as its members need; the last is all."""
        return _halves(self.block_pages, least=-(-LANES // self.page_size))

    @property
    def edge_pages(self) -> tuple[int, ...]:
        """How many of a span's first pages a prefill step computes where they are all that it sees; the last is all.

        These are whole blocks, or pages of the first one.
        """
        blocks = (n for n in _halves(self.span_blocks, least=2) if n > 1)
        return *self.decode_pages, *(n * self.block_pages for n in blocks)

    @property
    def unit_tokens(self) -> int:
        """Tokens that a DMA moves at least."""
        return min(self.page_size, _UNIT_TOKENS)

    @property
    def unit_rows(self) -> int:
        """Rows of a page that these tokens take."""
        return self.unit_tokens * self.token_rows

    @property
    def units_per_page(self) -> int:
        return self.page_size // self.unit_tokens

    @property
    def kv_width(self) -> int:
        """Elements of one token in a page."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def token_rows(self) -> int:
        """Rows of a page that one token takes: one, or in heads form K and V of every head."""
        return 2 * self.num_kv_heads if self.heads_form else 1

    @property
    def pages_shape(self) -> tuple[int, ...]:
        """Of the pages as the kernel takes them, with all rows of a page in one dimension."""
        return self.num_pages, self.page_size * self.token_rows, self.kv_width // self.token_rows

    @property
    def compute_dtype(self):
        """What the matrix unit multiplies; it accumulates in float32."""
        return jnp.bfloat16 if self.q_dtype == "bfloat16" else jnp.float32

    @property
    def widens(self) -> bool:
        """Whether keys and values get another dtype to be multiplied."""
        return jnp.dtype(self.kv_dtype) != self.compute_dtype

    @property
    def score_scale(self) -> float:
        """What the dot product of a query and a widened key is multiplied by."""
        return self.options.score_scale * widen_scale(self.kv_dtype)

    @property
    def value_scale(self) -> float:
        """What a weighted sum of widened values is multiplied by."""
        return self.options.value_scale * widen_scale(self.kv_dtype)

    @property
    def lane_parts(self) -> int:
        """Pieces that a head's rows are kept in: one at most a vector register wide has its rows at any offset."""
        return 1 if self.head_dim <= LANES else 2

    @property
    def part_lanes(self) -> int:
        """Lanes of a piece; it is kept in whole vector registers, filled up with zeros."""
        return self.head_dim // self.lane_parts

    @property
    def heads_per_step(self) -> int:
        """KV heads computed in one iteration of a loop: the fewest whose lanes, or rows, begin where a load may."""
        if self.heads_form:
            return max(1, 2 // jnp.dtype(self.kv_dtype).itemsize)  # whole 32-bit words
        fewest = LANES // gcd(LANES, 2 * self.head_dim)
        return fewest if self.num_kv_heads % fewest == 0 else self.num_kv_heads

    @property
    def set_heads(self) -> int:
        """KV heads that a decode step computes together."""
        return self._whole_sets(_SET_LANES // (2 * self.head_dim))

    def prefill_heads(self, is_edge: bool, is_first: bool) -> int:
        """KV heads that a prefill step computes in one stretch of code.

        Every stretch leaves the units idle at its start and end, and long ones take long to compile: the longest for
        spans of which every row sees every key, for a long prefill has little else; then for first spans, which are all
        that a short one has.
        """
        if is_first:
            return self._whole_sets(_FIRST_HEADS)
        return self._whole_sets(_EDGE_HEADS if is_edge else _PLAIN_HEADS)

    @property
    def span_blocks(self) -> int:
        """Key blocks that a prefill step takes at once; a tile's rows keep their state for that long in registers."""
        return max(1, min(_SPAN_KEYS // self.block_keys, self.num_slots // 2))

    def _whole_sets(self, most) -> int:
        """The largest number of heads, ``most`` or fewer if possible, that the heads and the lanes can be cut into."""
        steps = self.num_kv_heads // self.heads_per_step
        fitting = [n for n in range(1, steps + 1) if steps % n == 0 and n * self.heads_per_step <= most]
        return max(fitting, default=1) * self.heads_per_step

    @property
    def num_head_sets(self) -> int:
        return self.num_kv_heads // self.set_heads

    @property
    def splits_kv(self) -> bool:
        """Whether K and V are whole vector registers, and so come apart for free."""
        return self.head_dim % LANES == 0

    @property
    def k_lanes(self) -> HeadLanes:
        """Of a head in a decode step's q and k."""
        return HeadLanes(0, self.head_dim if self.splits_kv else 2 * self.head_dim)

    @property
    def v_lanes(self) -> HeadLanes:
        """Of a head in a decode step's acc and v."""
        return HeadLanes(0 if self.splits_kv else self.head_dim, self.k_lanes.step)

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """float32 scratch that holds q, or the accumulator, of a row block; a row step may reach past its end."""
        matrix_rows = self.block_rows * self.group + self.step_rows
        return self.num_kv_heads, self.lane_parts, matrix_rows, LANES

    @property
    def statistics_shape(self) -> tuple[int, ...]:
        """float32 scratch for the maximum of every matrix row, in every lane, or for the sum, spread over the lanes."""
        return self.num_kv_heads, self.rows_shape[2], LANES

    @property
    def float32_scratch(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of q_rows, acc_rows, top_rows, total_rows, decode_q, decode_acc, decode_top, decode_total."""
        heads = self.num_head_sets, self.set_heads * self.group
        decode_q = self.group_items, *heads, self.set_heads * self.k_lanes.step
        decode_state = (*heads, self.head_dim), (*heads, LANES), (*heads, LANES)
        return *[self.rows_shape] * 2, *[self.statistics_shape] * 2, decode_q, *decode_state

    @property
    def writes_first(self) -> bool:
        """Whether all new tokens are written before any row attends: rows see those of later row blocks."""
        return self.with_update and not self.options.causal

    @property
    def puts_tokens(self) -> bool:
        """Whether the new tokens of a key block are put into it, and written, when a row block attends to it."""
        return self.with_update and not self.writes_first

    @property
    def write_tokens(self) -> int:
        """Tokens that a write to the pages moves: one tile of rows."""
        return min(self.page_size, self.chip.dma_rows) if jnp.dtype(self.kv_dtype).itemsize > 1 else self.unit_tokens

    @property
    def new_rows_shape(self) -> tuple[int, ...]:
        """float32 scratch for k, or v, of a row block, with room for a unit that begins before it or ends after it."""
        heads, parts, _, lanes = self.rows_shape
        return heads, parts, self.block_rows + 2 * self.unit_tokens, lanes

    @property
    def row_buffer_shape(self) -> tuple[int, ...]:
        return self.row_batches, self.group_items, self.write_tokens * self.token_rows, self.pages_shape[2]

    @property
    def token_rows_shape(self) -> tuple[int, ...]:
        return self.unit_rows, self.pages_shape[2]

    @property
    def kv_buffer_shape(self) -> tuple[int, ...]:
        _, page_rows, lanes = self.pages_shape
        if self.heads_form:  # loads take the rows of one head by a stride, whatever page they are of
            return self.num_slots, self.block_pages * page_rows, lanes
        return self.num_slots, self.block_pages, page_rows, lanes

    @property
    def vmem_bytes(self) -> int:
        """Bytes of VMEM that the arrays take, and about what the compiler needs beside them."""
        scores = 2 * self.step_rows * self.span_blocks * self.block_keys  # of one head, and of the next
        values = scores * (4 + jnp.dtype(self.compute_dtype).itemsize)
        if self.widens:  # keys and values that are widened together
            decode = self.group_items * self.block_keys * self.set_heads
            prefill = self.span_blocks * self.block_keys * self.prefill_heads(is_edge=False, is_first=False)
            values += _padded_bytes((max(decode, prefill), 2 * self.head_dim), self.compute_dtype)
        return self.array_bytes + values

    @property
    def array_bytes(self) -> int:
        """Bytes of VMEM that the scratch and the staged row blocks take."""
        staged = 2 * 2 * _padded_bytes((self.block_rows, self.num_q_heads * self.head_dim), self.q_dtype)
        staged += 2 * _padded_bytes((self.block_rows, self.num_q_heads), "float32") * self.with_lse
        scratch = sum(_padded_bytes(shape, "float32") for shape in self.float32_scratch)
        if self.with_update:
            staged += 4 * _padded_bytes((self.block_rows, self.num_kv_heads * self.head_dim), self.q_dtype)
            scratch += 2 * _padded_bytes(self.new_rows_shape, "float32")
            scratch += _padded_bytes(self.row_buffer_shape, self.kv_dtype) * self.puts_tokens
            scratch += _padded_bytes(self.token_rows_shape, "float32") * self.heads_form
        return staged + scratch + _padded_bytes(self.kv_buffer_shape, self.kv_dtype)

    @property
    def cannot_fit(self) -> bool:
        """Whether VMEM is sure to be too small: for the blocks that the caller chose, or for the least ones."""
        asked = self.options.num_queries_per_block or self.options.num_kv_pages_per_block
        return (self.array_bytes if asked else self.vmem_bytes) > self.vmem_limit_bytes

    @property
    def vmem_problem(self) -> str:
        """Why the blocks do not fit, where they do not, and what would."""
        need, limit = (f"{size / 2**20:.1f} MiB" for size in (self.vmem_bytes, self.vmem_limit_bytes))
        return (
            f"{self.block_rows} rows and {self.block_pages} pages of {self.page_size} tokens take {need} of a TPU's "
            f"vector memory, of which the kernel may have {limit}; use smaller pages, lower num_queries_per_block or "
            "num_kv_pages_per_block, or raise vmem_limit_bytes"
        )

    @property
    def smem_bytes(self) -> int:
        """Bytes of SMEM that the metadata takes."""
        return page_table_bytes(self.max_num_seqs, self.pages_per_seq) + 4 * (2 * self.max_num_seqs + 2)

    @property
    def vmem_limit_bytes(self) -> int:
        return self.options.vmem_limit_bytes or self.chip.vmem_limit_bytes


def _halves(count, least) -> tuple[int, ...]:
    """``count``, and half of it again and again down to ``least``; the fewest first."""
    halves = (count >> n for n in range(count.bit_length()))
    return tuple(n for n in halves if n == count or n >= least)[::-1]


def fill_lanes(x):
    """x [rows, lanes] with zeros up to whole vector registers."""
    missing = -x.shape[1] % LANES
    return jnp.concatenate([x, jnp.zeros((x.shape[0], missing), x.dtype)], axis=1) if missing else x


def _padded_bytes(shape, dtype) -> int:
    """Bytes of an array whose last dimension is padded to whole vector registers."""
    *outer, lanes = shape
    count = -(-lanes // LANES) * LANES
    for size in outer:
        count *= size
    return count * jnp.dtype(dtype).itemsize


def make_config(
    q, kv_pages, page_indices, options: AttentionOptions, *, with_lse, with_sinks, with_update, chip=None
) -> KernelConfig:
    """The configuration for arrays of these shapes and dtypes.

    Args:
        q: [num_tokens, num_q_heads, head_dim]; kv_pages of either form; page_indices [max_num_seqs, pages_per_seq]:
            arrays, or anything with a shape and a dtype.
        options: its block sizes override the choice of ``tuning.py``.
        chip: name of the chip in ``chips.py``, or None for a choice that fits on every chip but v4.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    pages = page_shape(kv_pages.shape, head_dim)
    group = num_q_heads // pages.num_kv_heads
    token_bytes = 2 * pages.num_kv_heads * head_dim * kv_pages.dtype.itemsize
    blocks = tuning.choose(chips.named(chip), num_tokens, group, pages.page_size, token_bytes, options)
    config = KernelConfig(
        num_tokens=num_tokens,
        num_q_heads=num_q_heads,
        num_kv_heads=pages.num_kv_heads,
        head_dim=head_dim,
        num_pages=pages.num_pages,
        page_size=pages.page_size,
        max_num_seqs=page_indices.shape[0],
        pages_per_seq=page_indices.shape[1],
        q_dtype=q.dtype.name,
        kv_dtype=kv_pages.dtype.name,
        options=options,
        with_lse=with_lse,
        with_sinks=with_sinks,
        with_update=with_update,
        # What a TPU refuses in heads form reaches this point in interpreters only, and is reshaped there.
        heads_form=len(kv_pages.shape) == 4 and not tpu_reasons(q.shape, kv_pages.shape, kv_pages.dtype.name),
        chip=chips.named(chip),
        **blocks._asdict(),
    )
    return tuning.fit(config)
