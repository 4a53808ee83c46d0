"""The update ops: new k and v go to their own positions, nothing else changes, and the in-place form is in place."""

from dataclasses import replace

import pytest
import torch
from batches import MIXED, assert_close, assert_matches_oracle, bytes_of, finish_step, forget_new_tokens, make_batch

pytestmark = pytest.mark.usefixtures("no_grad")

KV_DTYPES = (None, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
UPDATE_ = torch.ops.rpa.ragged_paged_attention_update_


@pytest.mark.parametrize("form", ["heads", "flat"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_update_equals_write_then_read_and_leaves_all_other_bytes(dtype, kv_dtype, form, device):
    """Untouched slots hold NaN of every kind here: a float copy of the pages would already show."""
    batch = forget_new_tokens(make_batch(MIXED, dtype=dtype, kv_dtype=kv_dtype, form=form))
    _, _, expected_pages = batch.expected(update=True)
    on_device = batch.to(device)
    out, new_pages = on_device.update(sm_scale=0.125)
    assert_matches_oracle(batch, out, update=True, sm_scale=0.125)
    assert torch.equal(bytes_of(new_pages), bytes_of(expected_pages))
    assert torch.equal(bytes_of(on_device.kv_pages), bytes_of(batch.kv_pages)), "the functional form changed its input"
    assert torch.equal(on_device.update(UPDATE_, sm_scale=0.125).cpu(), out.cpu())
    assert torch.equal(bytes_of(on_device.kv_pages), bytes_of(expected_pages))


def test_untouched_pages_keep_the_bits_of_every_nan(device):
    batch = forget_new_tokens(make_batch(((2, 20),), dtype=torch.bfloat16))
    bits = torch.arange(0x7F81, 0x8000, dtype=torch.int32).to(torch.int16)  # every positive bfloat16 NaN
    unused = (set(range(len(batch.kv_pages))) - set(batch.page_indices[0, :2].tolist())).pop()
    batch.kv_pages[unused].view(torch.int16).flatten()[: len(bits)] = bits
    _, new_pages = batch.to(device).update()
    assert torch.equal(bytes_of(new_pages[unused]), bytes_of(batch.kv_pages[unused]))


@pytest.mark.parametrize("options", [{"sliding_window": 3}, {"causal": False}, {"soft_cap": 4.0}], ids=str)
def test_update_takes_the_options_of_the_read_only_op(options, device):
    batch = forget_new_tokens(make_batch(MIXED))
    out, _ = batch.to(device).update(**options)
    assert_matches_oracle(batch, out, update=True, **options)


def test_update_with_sinks(device):
    batch = forget_new_tokens(make_batch(MIXED))
    sinks = torch.tensor([0.3, -2.0, 4.0, 30.0])
    out, _ = batch.to(device).update(sinks=sinks.to(device))
    assert_matches_oracle(batch, out, update=True, sinks=sinks)


def test_a_window_does_not_skip_the_write(device):
    """With a window of 1 a row reads its own key only, but all new keys are stored."""
    batch = forget_new_tokens(make_batch(((40, 40),)))
    _, new_pages = batch.to(device).update(sliding_window=1)
    assert torch.equal(bytes_of(new_pages), bytes_of(batch.expected(update=True, sliding_window=1)[2]))


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES[1:], ids=str)
def test_quantising_rounds_to_nearest_even_and_clamps(kv_dtype, dtype, scale, device):
    """Every value between two neighbours, ties, values past the range, infinities and NaN."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(kv_dtype).float()
    codes = codes[torch.isfinite(codes)].sort().values
    ties = (codes[1:] + codes[:-1]) / 2
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e6, -1e6, 448.5, 464.0, 127.5, -128.6, 1e-9])
    values = torch.cat([codes, ties, ties * 1.004, special]) * scale
    values = torch.nn.functional.pad(values, (0, -len(values) % 64)).view(-1, 1, 64).to(dtype)
    batch = make_batch(((len(values), len(values)),), heads=(1, 1, 64), dtype=dtype, kv_dtype=kv_dtype, spare_rows=0)
    batch.k.copy_(values)
    batch.v.copy_(values)
    batch.scales.update(k_scale=scale, v_scale=scale)
    _, new_pages = batch.to(device).update()
    assert_equal_codes(new_pages.cpu(), batch.expected(update=True)[2])


def assert_equal_codes(actual, expected):
    """Equal bytes of 8-bit pages, with any NaN for a NaN."""
    both_nan = actual.float().isnan().flatten() & expected.float().isnan().flatten()
    assert not ((bytes_of(actual) != bytes_of(expected)) & ~both_nan).any()


def test_scales_divide_what_is_stored(device):
    batch = forget_new_tokens(make_batch(((20, 20),), kv_dtype=torch.float8_e4m3fn))
    options = {"k_scale": 0.05, "v_scale": 0.25}
    out, new_pages = batch.to(device).update(**options)
    assert_matches_oracle(batch, out, update=True, **options)
    assert torch.equal(bytes_of(new_pages), bytes_of(batch.expected(update=True, **options)[2]))


@pytest.mark.parametrize("chunks", [(50,), (16, 16, 16, 2), (1, 30, 19), (7,) * 7 + (1,)], ids=str)
def test_chunked_prefill_equals_full_prefill(chunks, device):
    total, width = 50, 50
    whole = forget_new_tokens(make_batch(((total, total),), spare_rows=0))
    expected, _, expected_pages = whole.expected(update=True)
    kv_pages = whole.kv_pages.to(device)
    done, outs = 0, []
    for chunk in chunks:
        step = forget_new_tokens(make_batch(((total, total),), spare_rows=0))

        def rows(x, chunk=chunk, done=done):  # fixed shapes: the rest of the rows is padding
            return torch.cat([x[done : done + chunk], x.new_full((width - chunk, *x.shape[1:]), torch.nan)]).to(device)

        step.kv_lens[0], step.cu_q_lens[1] = done + chunk, chunk
        metadata = [x.to(device) for x in step.metadata]
        out = UPDATE_(rows(whole.q), rows(whole.k), rows(whole.v), kv_pages, *metadata)
        finish_step(device)
        outs.append(out.cpu()[:chunk])
        done += chunk
    assert_close(torch.cat(outs), expected, torch.float32)
    assert torch.equal(bytes_of(kv_pages), bytes_of(expected_pages))


def test_decoding_token_by_token_equals_prefill(device):
    batch = forget_new_tokens(make_batch(((21, 21), (18, 18)), spare_rows=0))
    expected = batch.expected(update=True)[0]
    kv_pages = batch.kv_pages.to(device)
    for i in range(18):
        rows = torch.tensor([i, 21 + i])
        q, k, v = (x[rows].to(device) for x in (batch.q, batch.k, batch.v))
        kv_lens = torch.full_like(batch.kv_lens, i + 1).to(device)
        cu_q_lens = torch.tensor([0, 1, 2, -7, 99], dtype=torch.int32, device=device)
        num_seqs, page_indices = batch.num_seqs.to(device), batch.page_indices.to(device)
        out = UPDATE_(q, k, v, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs)
        finish_step(device)
        assert_close(out.cpu(), expected[rows], torch.float32)


def test_rows_before_the_first_sequence_are_padding(device):
    """cu_q_lens may start past 0: check_batch refuses it, the ops honour it."""
    batch = forget_new_tokens(make_batch(((3, 20), (1, 5)), spare_rows=5))
    shifted = {name: getattr(batch, name).roll(2, dims=0) for name in ("q", "k", "v")}
    batch = replace(batch, cu_q_lens=batch.cu_q_lens + 2, **shifted)
    out, new_pages = batch.to(device).update()
    assert_matches_oracle(batch, out, update=True)
    assert torch.equal(bytes_of(new_pages), bytes_of(batch.expected(update=True)[2]))


def test_pages_that_cannot_be_written_in_place_are_refused():
    batch = make_batch()
    pages = batch.kv_pages.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="kv_pages must be contiguous to be written in place"):
        UPDATE_(batch.q, batch.k, batch.v, pages, *batch.metadata)


def test_the_python_write_equals_the_native_write(monkeypatch):
    for kv_dtype in KV_DTYPES:
        batch = forget_new_tokens(make_batch(MIXED, kv_dtype=kv_dtype))
        native = batch.update()[1]
        monkeypatch.setenv("TORCH_RPA_NATIVE", "0")
        assert torch.equal(bytes_of(batch.update()[1]), bytes_of(native))
        monkeypatch.delenv("TORCH_RPA_NATIVE")
