"""The Pallas kernel in the HLO interpreter against the float64 oracle, and its parts on plain arrays.

Batches of one shape share one compiled program, whatever their lengths: ``run`` pads every batch to the same sizes.
"""

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from batches import assert_matches_oracle, bytes_of, forget_new_tokens, make_batch
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from test_attention import BATCHES
from test_kernels import arrays, to_jax, to_torch

from torch_rpa import kernels
from torch_rpa.kernels import schedule, softmax, worklist
from torch_rpa.kernels.config import make_config
from torch_rpa.kernels.refs import Refs
from torch_rpa.kernels.widen import comes_as_words, widen, widen_scale, widen_words
from torch_rpa.options import AttentionOptions

pytestmark = pytest.mark.usefixtures("no_grad")

NUM_TOKENS, MAX_NUM_SEQS, PAGES_PER_SEQ, NUM_PAGES = 208, 12, 24, 64


def padded(batch):
    """The batch with poison up to the sizes above."""

    def pad(x, shape, value):
        padding = [side for have, want in zip(x.shape[::-1], shape[::-1], strict=True) for side in (0, want - have)]
        return torch.nn.functional.pad(x, padding, value=value)

    rows = {name: pad(getattr(batch, name), (NUM_TOKENS, *getattr(batch, name).shape[1:]), torch.nan) for name in "qkv"}
    poison = batch.kv_pages.new_full((NUM_PAGES - len(batch.kv_pages), *batch.kv_pages.shape[1:]), 127)
    poison = poison if batch.kv_pages.dtype == torch.int8 else torch.full(poison.shape, torch.nan).to(poison.dtype)
    return replace(
        batch,
        **rows,
        kv_pages=torch.cat([batch.kv_pages.view(torch.uint8), poison.view(torch.uint8)]).view(batch.kv_pages.dtype),
        kv_lens=pad(batch.kv_lens, (MAX_NUM_SEQS,), -3),
        page_indices=pad(batch.page_indices, (MAX_NUM_SEQS, PAGES_PER_SEQ), -1),
        cu_q_lens=pad(batch.cu_q_lens, (MAX_NUM_SEQS + 1,), 10**9),
    )


@lru_cache(maxsize=8)  # a program takes some 1300 memory maps, of which a process has 65530
def compiled(op, options, interpret=True):
    return jax.jit(lambda args: getattr(kernels, op)(**args, **dict(options), interpret=interpret))


def run(op, batch, sinks=None, **options):
    args = arrays(batch, update=op.endswith("update"))
    if sinks is not None:
        args["sinks"] = to_jax(sinks)
    results = compiled(op, tuple((options | batch.scales).items()))(args)
    return [to_torch(x) for x in (results if isinstance(results, tuple) else (results,))]


def check_read(batch, **options):
    out, lse = run("ragged_paged_attention_with_lse", batch, **options)
    assert_matches_oracle(batch, out, lse, **options)


def check_update(batch, **options):
    batch = forget_new_tokens(batch)
    out, pages = run("ragged_paged_attention_update", batch, **options)
    assert_matches_oracle(batch, out, update=True, **options)
    expected = batch.expected(update=True, **options)[2]
    assert torch.equal(pages.isnan(), expected.isnan())
    pages, expected = (bytes_of(x.float().nan_to_num(-7.0)) for x in (pages, expected))
    assert torch.equal(pages, expected), "other slots changed, or new tokens are not in theirs"


@pytest.mark.parametrize("seqs", BATCHES.values(), ids=BATCHES)
def test_equals_the_oracle_for_every_mix_of_lengths(seqs):
    check_read(padded(make_batch(seqs, form="flat")), num_queries_per_block=64)


@pytest.mark.parametrize("seqs", BATCHES.values(), ids=BATCHES)
def test_the_update_equals_the_oracle_for_every_mix_of_lengths(seqs):
    check_update(padded(make_batch(seqs, form="flat")), num_queries_per_block=64, num_kv_pages_per_block=2)


# Sequences that go on over several row blocks of 16 rows, from positions that are and are not whole tiles of 8 tokens.
OVER_ROW_BLOCKS = {
    "one_sequence_from_0": ((60, 60),),
    "from_whole_tiles": ((5, 5), (50, 98), (1, 40)),
    "from_anywhere": ((3, 11), (50, 93), (1, 40), (35, 39), (1, 1), (21, 150)),
}
UPDATE_OPTIONS = {
    "causal": {},
    "not_causal": {"causal": False},
    "window_1": {"sliding_window": 1},
    "window_20": {"sliding_window": 20},
    "window_not_causal": {"sliding_window": 9, "causal": False},
}


@pytest.mark.parametrize("options", UPDATE_OPTIONS.values(), ids=UPDATE_OPTIONS)
@pytest.mark.parametrize("num_pages_per_block", [1, 3])
def test_row_blocks_see_the_new_tokens_of_other_row_blocks(options, num_pages_per_block):
    options = options | {"num_queries_per_block": 16, "num_kv_pages_per_block": num_pages_per_block}
    for seqs in OVER_ROW_BLOCKS.values():
        check_update(padded(make_batch(seqs, form="flat")), **options)


def test_a_mix_of_lengths_compiles_once():
    options = (("num_queries_per_block", 64),)
    for seqs in BATCHES.values():
        check_read(padded(make_batch(seqs, form="flat")), **dict(options))
    assert compiled("ragged_paged_attention_with_lse", options)._cache_size() == 1


OPTIONS = {
    "not_causal": {"causal": False},
    "window_1": {"sliding_window": 1},
    "window_in_small_blocks": {"sliding_window": 20, "num_kv_pages_per_block": 1, "num_queries_per_block": 16},
    "window_not_causal": {"sliding_window": 7, "causal": False, "num_kv_pages_per_block": 3},
    "soft_cap_and_negative_scale": {"soft_cap": 5.0, "sm_scale": -0.3},
    "scales": {"k_scale": 0.5, "v_scale": 3.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_oracle_for_every_option(options):
    check_read(make_batch(), **options)


# Ratios and sizes of real models with fewer heads: the interpreter's compile time grows with them.
HEADS = {
    "qwen2.5": (7, 1, 128),
    "gemma-2": (2, 1, 256),
    "gpt-oss": (16, 2, 64),
    "phi-3": (4, 4, 96),
    "falcon": (13, 1, 64),
}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_equals_the_oracle_for_the_heads_of_real_models(heads):
    batch = make_batch(((1, 21), (5, 19)), heads=heads, dtype=torch.bfloat16, page_size=8)
    check_read(batch, sm_scale=heads[2] ** -0.5)


@pytest.mark.parametrize("head_dim", [80, 192])
def test_equals_the_oracle_for_odd_head_dims(head_dim):
    check_read(make_batch(((1, 21), (5, 19)), heads=(4, 4, head_dim), page_size=32), sm_scale=head_dim**-0.5)


@pytest.mark.parametrize("page_size", [8, 64])
def test_reads_and_updates_pages_of_every_size(page_size):
    check_update(make_batch(((1, page_size + 1), (9, 2 * page_size), (0, 0)), page_size=page_size, form="flat"))


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_oracle_for_every_dtype(dtype, kv_dtype):
    check_read(make_batch(dtype=dtype, kv_dtype=kv_dtype), sm_scale=0.125)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bfloat16], ids=str)
def test_the_update_quantises_as_the_oracle_does(kv_dtype):
    check_update(make_batch(dtype=torch.bfloat16, kv_dtype=kv_dtype), sm_scale=0.125)


HEADS_FORM = {
    "float32": (torch.float32, None, (4, 2, 128), 8),
    "bfloat16_one_kv_head": (torch.bfloat16, None, (2, 1, 128), 8),
    "bfloat16": (torch.bfloat16, None, (8, 4, 128), 32),
    "float8_e4m3fn": (torch.bfloat16, torch.float8_e4m3fn, (4, 2, 128), 16),
    "float8_e5m2": (torch.bfloat16, torch.float8_e5m2, (4, 4, 128), 8),
    "int8": (torch.float32, torch.int8, (4, 2, 128), 64),
}


@pytest.mark.parametrize(("dtype", "kv_dtype", "heads", "page_size"), HEADS_FORM.values(), ids=HEADS_FORM)
def test_reads_and_updates_pages_in_heads_form(dtype, kv_dtype, heads, page_size):
    batch = make_batch(dtype=dtype, kv_dtype=kv_dtype, heads=heads, page_size=page_size)
    assert takes_heads_form(batch)
    options = {"sm_scale": 0.1, "num_kv_pages_per_block": 2, "num_queries_per_block": 16}
    check_read(batch, sliding_window=21, **options)
    check_update(batch, **options)


def takes_heads_form(batch):
    q, pages, table = to_jax(batch.q), to_jax(batch.kv_pages), batch.page_indices
    config = make_config(q, pages, table, AttentionOptions(), with_lse=False, with_sinks=False, with_update=False)
    return config.heads_form


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}], ids=str)
def test_sinks_are_one_more_logit_without_a_value(options):
    check_read(make_batch(), sinks=torch.tensor([0.3, -torch.inf, 4.0, 30.0]), **options)


def test_pages_before_the_window_may_be_freed_and_are_not_fetched():
    batch = make_batch(((1, 100), (4, 90)))
    batch.page_indices[0, :5] = -1
    batch.page_indices[1, :4] = 10**6
    check_read(batch, sliding_window=10)


BATCH_INDEPENDENCE = {
    "one_page_a_block": {"num_kv_pages_per_block": 1},
    "blocks_by_default": {},
    "blocks_of_512_keys": {"num_kv_pages_per_block": 32},  # of which decode computes 128, 256 or all
    "a_window_over_several_spans": {
        "num_kv_pages_per_block": 1, "num_queries_per_block": 16, "sliding_window": 100
    },
}  # fmt: skip


@pytest.mark.parametrize("options", BATCH_INDEPENDENCE.values(), ids=BATCH_INDEPENDENCE)
def test_rows_do_not_depend_on_the_batch(options):
    """Bit for bit: the sequences of a batch, each also alone in a batch of the same shapes."""
    batch = make_batch(((1, 37), (20, 20), (1, 130), (1, 200), (40, 190)), dtype=torch.bfloat16)
    options = {"sm_scale": 0.125, **options}
    together = run("ragged_paged_attention_with_lse", batch, **options)
    for s in range(5):
        first, last = int(batch.cu_q_lens[s]), int(batch.cu_q_lens[s + 1])
        alone = replace(batch, **{n: getattr(batch, n).clone() for n in ("q", "kv_lens", "page_indices", "cu_q_lens")})
        alone.q[: last - first] = batch.q[first:last]
        alone.kv_lens[0], alone.page_indices[0] = batch.kv_lens[s], batch.page_indices[s]
        alone.cu_q_lens[1] = last - first
        alone = replace(alone, num_seqs=torch.ones_like(batch.num_seqs))
        single = run("ragged_paged_attention_with_lse", alone, **options)
        for whole, part in zip(together, single, strict=True):
            assert torch.equal(whole[first:last], part[: last - first])


# ---- Parts on plain arrays --------------------------------------------------------------------------------------


def small_config(max_num_seqs=3, with_update=False, **options):
    q, pages = jax.ShapeDtypeStruct((64, 4, 64), jnp.float32), jax.ShapeDtypeStruct((9, 8, 256), jnp.float32)
    options = AttentionOptions(num_kv_pages_per_block=2, num_queries_per_block=16, **options)
    table = jax.ShapeDtypeStruct((max_num_seqs, 10), jnp.int32)
    return make_config(q, pages, table, options, with_lse=True, with_sinks=False, with_update=with_update)


def items(config, first_row, end_row, kv_len):
    """Every item of a sequence: (row block, first key, keys fetched)."""
    for row_block in range(first_row // config.block_rows, -(-end_row // config.block_rows)):
        tile = schedule.make_tile(config, row_block, first_row, end_row, kv_len)
        for block in range(int(tile.first_block), int(tile.end_block)):
            item = schedule.make_item(config, row_block, 0, tile, block)
            yield row_block, int(item.first_key), int(item.num_units) * config.unit_tokens


class NoFetch:
    """In place of ``PageFetch``: the list of work does not depend on what is fetched."""

    def start(self, *_):
        pass


def walk_through(config):
    """A function of kv_lens, cu_q_lens and num_seqs: (row block, sequence, first key) of each item, then -1."""

    def walk(kv_lens, cu_q_lens, num_seqs, taken, count, *scratch):
        names = "cursor", "items", "tile_writes", "row_writes"
        refs = Refs(**dict.fromkeys(Refs._fields))._replace(**dict(zip(names, scratch, strict=True)))
        refs = refs._replace(kv_lens=kv_lens, cu_q_lens=cu_q_lens, num_seqs=num_seqs)
        taken[...], count[0] = jnp.full(taken.shape, -1), 0
        worklist.start_batch(config, refs)

        def take(slot):
            item = worklist.item_at(refs, slot)
            for i, value in enumerate((item.row_block, item.seq, item.first_key)):
                taken[count[0], i] = value
            count[0] += 1
            goes_on = item.is_last & (item.row + item.num_rows == config.block_rows)
            pl.when(goes_on)(lambda: worklist.go_on(config, refs, NoFetch(), item.row_block))
            worklist.fetch_next(config, refs, NoFetch(), freed=1)
            return 1

        def walk_block(row_block, _):
            worklist.fetch_next(config, refs, NoFetch())
            worklist.for_each_item(config, refs, row_block, take)

        lax.fori_loop(0, config.num_row_blocks, walk_block, None)

    sizes = 1, worklist.CURSOR_SIZE, config.num_slots * len(schedule.Item._fields), 1, config.row_batches
    scratch = [pltpu.SMEM((size,), jnp.int32) for size in sizes]
    shape = jax.ShapeDtypeStruct((200, 3), jnp.int32)
    return jax.jit(pl.pallas_call(walk, out_shape=shape, scratch_shapes=scratch, interpret=True))


def expected_walk(config, q_lens, kv_lens):
    ends = np.cumsum(q_lens)
    for row_block in range(config.num_row_blocks):
        for is_decode in (False, True):
            for seq, (q_len, end_row) in enumerate(zip(q_lens, ends, strict=True)):
                if q_len and (q_len == 1) == is_decode:
                    found = items(config, end_row - q_len, end_row, kv_lens[seq])
                    yield from ((row_block, seq, first_key) for block, first_key, _ in found if block == row_block)


@pytest.mark.parametrize("with_update", [False, True])
def test_the_list_of_work_has_every_tile_once_and_those_of_prefill_first(with_update):
    config, rng = small_config(max_num_seqs=9, with_update=with_update), np.random.default_rng(0)
    walk = walk_through(config)
    for lengths in ([1] * 9, [0, 0, 1, 40, 0, 1], [16, 16, 1, 31], [1, 2, 0, 0], [], [0] * 9, [64], [1] * 8 + [56]):
        check_walk(walk, config, lengths, rng)
    for _ in range(50):
        lengths = rng.choice([0, 1, 1, 2, 5, 16, 17], size=rng.integers(1, 10))
        check_walk(walk, config, lengths[np.cumsum(lengths) <= config.num_tokens], rng)


def check_walk(walk, config, q_lens, rng):
    kv_lens = np.asarray([q_len + rng.integers(0, 30) for q_len in q_lens], np.int32)
    missing = config.max_num_seqs - len(q_lens)
    cu_q_lens = np.pad(np.cumsum([0, *q_lens]), (0, missing), constant_values=10**9).astype(np.int32)
    taken = walk(np.pad(kv_lens, (0, missing)), cu_q_lens, np.array([len(q_lens)], np.int32))
    assert [tuple(item) for item in taken.tolist() if item[0] >= 0] == list(expected_walk(config, q_lens, kv_lens))


@pytest.mark.parametrize(
    ("page_size", "block_pages", "expected"),
    [(16, 32, (8, 16, 32)), (128, 4, (1, 2, 4)), (128, 1, (1,)), (32, 6, (6,)), (16, 24, (12, 24)), (256, 2, (1, 2))],
)
def test_decode_computes_halves_of_a_block_down_to_a_register_of_scores(page_size, block_pages, expected):
    assert replace(small_config(), page_size=page_size, block_pages=block_pages).decode_pages == expected


@pytest.mark.parametrize(
    ("page_size", "block_pages", "expected"),
    [(128, 2, (1, 2, 4)), (128, 8, (1, 2, 4, 8)), (32, 3, (3, 6, 15)), (256, 3, (1, 3)), (16, 24, (12, 24))],
)
def test_prefill_computes_whole_blocks_or_a_part_of_one(page_size, block_pages, expected):
    assert replace(small_config(), page_size=page_size, block_pages=block_pages).edge_pages == expected


def test_the_schedule_fetches_what_the_rows_of_a_block_can_see_and_no_more():
    assert list(items(small_config(), 10, 20, 30)) == [(0, 0, 16), (0, 16, 16), (1, 0, 16), (1, 16, 16)]
    assert list(items(small_config(), 0, 1, 33)) == [(0, 0, 16), (0, 16, 16), (0, 32, 8)]
    assert list(items(small_config(), 0, 20, 20)) == [(0, 0, 16), (1, 0, 16), (1, 16, 8)]  # rows 0-15 see 16 keys
    assert list(items(small_config(sliding_window=4), 0, 1, 70)) == [(0, 64, 8)]
    assert list(items(small_config(causal=False), 0, 1, 17)) == [(0, 0, 16), (0, 16, 8)]


def test_a_sequence_without_visible_keys_is_one_item_without_pages():
    assert list(items(small_config(), 0, 1, 0)) == [(0, 0, 0)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("kv_dtype", "as_words"),
    [("float8_e4m3fn", True), ("float8_e5m2", True), ("int8", True), ("float8_e5m2", False), ("int8", False)],
)
def test_every_code_of_8_bits_is_widened_to_its_value(kv_dtype, as_words, dtype):
    kv_dtype = jnp.dtype(kv_dtype)
    assert as_words or not comes_as_words(kv_dtype)
    codes = np.random.default_rng(0).permutation(np.arange(512, dtype=np.int32).astype(np.uint8))  # any four in a word
    pages = np.repeat(codes, 128).view(kv_dtype).reshape(512, 128)

    def load(pages_ref, out_ref):
        if as_words:
            out_ref[...] = widen_words(pages_ref.bitcast(jnp.int32)[...], kv_dtype, dtype)
        else:
            out_ref[...] = widen(pages_ref[...], dtype)

    shape = jax.ShapeDtypeStruct((512, 128), dtype)
    widened = pl.pallas_call(load, out_shape=shape, interpret=True)(jnp.asarray(pages))
    values = np.asarray(widened, np.float32) * widen_scale(kv_dtype.name)
    np.testing.assert_array_equal(values, pages.astype(np.float32))


def add_chunk(state, scores, values):
    return softmax.accumulate(state.total, state.acc, softmax.enter(state.top, scores), values)


def test_softmax_over_chunks_equals_softmax_over_all():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(n, 64)), jnp.float32) for n in (5, 96, 96))
    scores = softmax.logits(q, k, scale=0.3, soft_cap=None)
    scores = scores.at[1, :40].set(-jnp.inf).at[2].set(-jnp.inf)
    rows = (jnp.full((5, 128), softmax.LOWEST), jnp.zeros((5, 128)), jnp.zeros((5, 64)))
    state = softmax.State(*rows)
    for first in range(0, 96, 32):
        state = add_chunk(state, scores[:, first : first + 32], v[first : first + 32])
    factor, lse = softmax.finish(state.top, state.total.sum(axis=1, keepdims=True))
    natural = np.asarray(scores, np.float64) * softmax.LN_2
    with np.errstate(divide="ignore"):
        expected_lse = np.log(np.exp(natural).sum(axis=1))
    np.testing.assert_allclose(lse[:, 0], expected_lse, rtol=1e-5)
    weights = np.exp(natural - np.where(np.isinf(expected_lse), 0, expected_lse)[:, None])
    np.testing.assert_allclose(state.acc * factor[:, :1], weights @ np.asarray(v), atol=1e-5)
    assert not (state.acc * factor[:, :1])[2].any()


def test_a_chunk_that_a_row_does_not_see_leaves_its_state_bit_for_bit():
    rng = np.random.default_rng(1)
    state = softmax.State(jnp.full((3, 128), 1.7), jnp.full((3, 128), 2.3), jnp.asarray(rng.normal(size=(3, 64))))
    after = add_chunk(state, jnp.full((3, 32), -jnp.inf), jnp.ones((32, 64)))
    assert all(jnp.array_equal(a, b) for a, b in zip(state, after, strict=True))
