"""The read-only ops against the float64 oracle, on every device: shapes, kinds, options, and garbage around them."""

import pytest
import torch
from batches import MIXED, MODEL_HEADS, assert_matches_oracle, make_batch

pytestmark = pytest.mark.usefixtures("no_grad")

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

OPTIONS = {
    "plain": {},
    "sm_scale": {"sm_scale": 0.125},
    "not_causal": {"causal": False},
    "window_1": {"sliding_window": 1},
    "window_7": {"sliding_window": 7},
    "window_longer_than_context": {"sliding_window": 4096},
    "window_past_int32": {"sliding_window": 2**40},
    "window_of_int32_not_causal": {"sliding_window": 2**31 - 1, "causal": False},
    "window_not_causal": {"sliding_window": 7, "causal": False},
    "soft_cap": {"soft_cap": 5.0, "sm_scale": 0.3},
    "mask_value_changes_nothing": {"mask_value": -1.0},
    "small_blocks": {"num_kv_pages_per_block": 1, "num_queries_per_block": 3, "sliding_window": 20},
    "large_blocks": {"num_kv_pages_per_block": 64, "num_queries_per_block": 512, "vmem_limit_bytes": 2**26},
    "huge_blocks": {"num_kv_pages_per_block": 2**31, "num_queries_per_block": 2**31},
    "scales": {"k_scale": 0.5, "v_scale": 3.0},
}

BATCHES = {
    "mixed": MIXED,
    "decode_only": ((1, 1), (1, 15), (1, 16), (1, 17), (1, 130), (1, 300)),
    "prefill_only": ((16, 16), (33, 33), (140, 140)),
    "chunk_after_a_cached_prefix": ((40, 200), (130, 131), (7, 263)),
    "one_token": ((1, 1),),
    "zero_length_everywhere": ((0, 0), (0, 40), (3, 3), (0, 0), (1, 20), (0, 5)),
    "page_boundaries": ((15, 15), (16, 16), (17, 17), (1, 31), (1, 32), (1, 33), (2, 33)),
    "block_boundaries": ((1, 127), (1, 128), (1, 129), (128, 128), (2, 257)),
    "no_sequence": (),
}


def check(batch, device, **options):
    on_device = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    if batch.is_refused_on(device):
        with pytest.raises(NotImplementedError, match="on TPU"):
            batch.to(device).read(**on_device)
        return
    out, lse = batch.to(device).read(**on_device)
    assert_matches_oracle(batch, out, lse, **options)


@pytest.mark.parametrize("seqs", BATCHES.values(), ids=BATCHES)
def test_equals_the_oracle_for_every_mix_of_lengths(seqs, device):
    check(make_batch(seqs), device)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_oracle_for_every_option(options, device):
    check(make_batch(), device, **options)


@pytest.mark.parametrize("heads", MODEL_HEADS.values(), ids=MODEL_HEADS)
def test_equals_the_oracle_for_the_heads_of_real_models(heads, device):
    check(make_batch(((1, 21), (5, 19)), heads=heads, dtype=torch.bfloat16), device, sm_scale=heads[2] ** -0.5)


@pytest.mark.parametrize("head_dim", [8, 16, 40, 80, 112, 192])
def test_equals_the_oracle_for_every_kind_of_head_dim(head_dim, device):
    check(make_batch(((1, 21), (5, 19)), heads=(4, 2, head_dim)), device, sm_scale=head_dim**-0.5)


@pytest.mark.parametrize("form", ["heads", "flat"])
@pytest.mark.parametrize("page_size", [8, 32, 64, 128, 256])
def test_equals_the_oracle_for_every_page_size(page_size, form, device):
    check(make_batch(((1, page_size + 1), (9, 2 * page_size), (0, 0)), page_size=page_size, form=form), device)


@pytest.mark.parametrize("form", ["heads", "flat"])
@pytest.mark.parametrize("kv_dtype", [None, *FP8, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_oracle_for_every_dtype_and_form_of_pages(dtype, kv_dtype, form, device):
    if dtype == torch.float16 and device.type != "cpu":
        with pytest.raises(NotImplementedError, match="float16 runs on CPU tensors only"):
            make_batch(dtype=dtype, kv_dtype=kv_dtype, form=form).to(device).read()
        return
    check(make_batch(dtype=dtype, kv_dtype=kv_dtype, form=form), device, sm_scale=0.125)


@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
def test_scales_of_fp8_pages_are_applied(kv_dtype, device):
    check(make_batch(kv_dtype=kv_dtype), device, k_scale=0.3, v_scale=1.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"soft_cap": 5.0}], ids=str)
def test_sinks_are_one_more_logit_without_a_value(options, dtype, device):
    sinks = torch.tensor([0.3, -2.0, 4.0, 30.0], dtype=dtype)
    check(make_batch(dtype=dtype), device, sinks=sinks, **options)


def test_sinks_may_be_float32_beside_bfloat16_q(device):
    check(make_batch(dtype=torch.bfloat16), device, sinks=torch.tensor([0.3, -2.0, 4.0, 30.0]))


def test_a_sink_of_minus_infinity_is_no_sink(device):
    check(make_batch(), device, sinks=torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf]))


def test_padding_rows_are_zeros_with_an_lse_of_minus_infinity_even_with_sinks(device):
    batch = make_batch(((2, 5),), spare_rows=6)
    out, lse = batch.to(device).read(sinks=torch.ones(4, device=device))
    assert not out.cpu()[2:].any()
    assert (lse.cpu()[2:] == -torch.inf).all()


def test_a_batch_without_sequences_gives_zeros(device):
    batch = make_batch((), spare_rows=5, spare_seqs=3)
    out, lse = batch.to(device).read()
    assert out.shape == (5, 4, 64)
    assert not out.cpu().any()
    assert (lse.cpu() == -torch.inf).all()


@pytest.mark.parametrize(("num_tokens", "max_num_seqs", "pages_per_seq"), [(0, 2, 1), (3, 0, 1), (3, 2, 0)])
def test_empty_dimensions_are_allowed(num_tokens, max_num_seqs, pages_per_seq, device):
    def zeros(*shape, dtype=torch.int32):
        return torch.zeros(shape, dtype=dtype, device=device)

    q, pages = zeros(num_tokens, 4, 64, dtype=torch.float32), zeros(2, 16, 4, 64, dtype=torch.float32)
    metadata = zeros(max_num_seqs), zeros(max_num_seqs, pages_per_seq), zeros(max_num_seqs + 1), zeros(1)
    out, lse = torch.ops.rpa.ragged_paged_attention_with_lse(q, pages, *metadata)
    assert not out.cpu().any()
    assert (lse.cpu() == -torch.inf).all()
    k = zeros(num_tokens, 2, 64, dtype=torch.float32)
    out, new_pages = torch.ops.rpa.ragged_paged_attention_update(q, k, k, pages, *metadata)
    assert not out.cpu().any()
    assert not new_pages.cpu().any()


def test_without_lse_the_output_is_the_same(device):
    batch = make_batch().to(device)
    out = batch.read(torch.ops.rpa.ragged_paged_attention, sm_scale=0.2)
    assert torch.equal(out.cpu(), batch.read(sm_scale=0.2)[0].cpu())


def test_pages_may_be_shared_between_sequences(device):
    batch = make_batch(((1, 48), (5, 48), (1, 40)))
    batch.page_indices[1:3, :2] = batch.page_indices[0, :2]  # the first 32 tokens are a common prefix
    check(batch, device)


def test_pages_before_the_window_may_be_freed(device):
    batch = make_batch(((1, 100), (4, 90)))
    batch.page_indices[0, :5] = -1  # the row at 99 sees 90 .. 99
    batch.page_indices[1, :4] = 10**6  # the rows at 86 .. 89 see 77 and on
    check(batch, device, sliding_window=10)


def test_positions_past_int16_are_right(device):
    check(make_batch(((1, 33000),), heads=(2, 1, 8), page_size=256), device, sliding_window=40)


def test_noncontiguous_inputs_are_read_by_their_strides(device):
    batch = make_batch()
    q = batch.q.transpose(0, 1).contiguous().to(device).transpose(0, 1)
    on_device = batch.to(device)
    out = torch.ops.rpa.ragged_paged_attention(q, on_device.kv_pages, *on_device.metadata)
    assert_matches_oracle(batch, out)


def test_rows_do_not_depend_on_the_batch(device):
    """Bit for bit: the sequences of a batch, each also alone in a batch of the same shapes."""
    batch = make_batch(((1, 37), (20, 20), (1, 130), (6, 50)), dtype=torch.bfloat16)
    together = batch.to(device).read(sm_scale=0.125)
    for s in range(4):
        first, last = int(batch.cu_q_lens[s]), int(batch.cu_q_lens[s + 1])
        alone = make_batch(((1, 37), (20, 20), (1, 130), (6, 50)), dtype=torch.bfloat16)
        alone.q[: last - first] = batch.q[first:last]
        alone.kv_lens[0], alone.page_indices[0] = batch.kv_lens[s], batch.page_indices[s]
        alone.cu_q_lens[1], alone.num_seqs[0] = last - first, 1
        for whole, single in zip(together, alone.to(device).read(sm_scale=0.125), strict=True):
            assert torch.equal(whole.cpu()[first:last], single.cpu()[: last - first])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_torchs_default_dtype_changes_nothing(dtype, device):
    batch = make_batch()
    on_device = batch.to(device)
    torch.set_default_dtype(dtype)
    try:
        out, lse = on_device.read()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_matches_oracle(batch, out, lse)


def test_memory_on_cpu_does_not_grow_with_tokens_times_context():
    """One block of scores at a time: 512 rows over 16384 keys would take 64 MiB of scores for 2 heads at once."""
    batch = make_batch(((512, 16384),), heads=(2, 1, 8), page_size=256)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        batch.read()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4 * 2**20
