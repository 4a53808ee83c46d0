"""Parts of the keys, put together by their lse, give what all keys at once give."""

import pytest
import torch
from batches import assert_close, make_batch

import torch_rpa

pytestmark = pytest.mark.usefixtures("no_grad")


def split(batch, at):
    """For each sequence of one row: the batch of its first ``at`` tokens, and that of the others."""
    page_size = batch.kv_pages.shape[1]
    first = batch.kv_lens.clamp(max=at)
    tables = batch.page_indices, batch.page_indices.roll(-(at // page_size), dims=1)
    return [(lens, table) for lens, table in zip((first, (batch.kv_lens - at).clamp(min=0)), tables, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_parts_of_a_context_equal_the_whole(device, dtype):
    batch = make_batch(((1, 40), (1, 70), (1, 16), (1, 33)), dtype=dtype, spare_seqs=0)
    expected, expected_lse, _ = batch.expected()
    on_device = batch.to(device)
    parts = [
        torch.ops.rpa.ragged_paged_attention_with_lse(
            on_device.q, on_device.kv_pages, lens.to(device), table.contiguous().to(device), *on_device.metadata[2:]
        )
        for lens, table in split(batch, 32)
    ]
    out, lse = torch_rpa.merge_attention_states(*zip(*parts, strict=True))
    assert_close(out.cpu(), expected, dtype)
    assert_close(lse.cpu(), expected_lse, torch.float32)


def test_a_shared_prefix_and_the_rest_equal_the_whole():
    """Cascade attention: the prefix is read once, by all rows as rows of one sequence."""
    batch = make_batch(((1, 64), (1, 64), (1, 64)), spare_seqs=0, spare_rows=0)
    batch.page_indices[1:, :2] = batch.page_indices[0, :2]  # 32 tokens in common
    expected, expected_lse, _ = batch.expected()
    one = torch.tensor([1], dtype=torch.int32)
    prefix = torch.ops.rpa.ragged_paged_attention_with_lse(
        batch.q, batch.kv_pages, one * 32, batch.page_indices[:1], torch.tensor([0, 3], dtype=torch.int32), one,
        causal=False,
    )  # fmt: skip
    lens, table = split(batch, 32)[1]
    rest = torch.ops.rpa.ragged_paged_attention_with_lse(
        batch.q, batch.kv_pages, lens, table.contiguous(), *batch.metadata[2:]
    )
    out, lse = torch_rpa.merge_attention_states(*zip(prefix, rest, strict=True))
    assert_close(out, expected, torch.float32)
    assert_close(lse, expected_lse, torch.float32)


def test_a_part_without_keys_changes_nothing():
    out, lse = torch.randn(5, 3, 8), torch.randn(5, 3)
    nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    merged, merged_lse = torch_rpa.merge_attention_states([nothing[0], out], [nothing[1], lse])
    assert_close(merged, out, torch.float32)
    assert_close(merged_lse, lse, torch.float32)
    merged, merged_lse = torch_rpa.merge_attention_states([nothing[0]] * 2, [nothing[1]] * 2)
    assert not merged.any()
    assert (merged_lse == -torch.inf).all()


def test_far_apart_parts_neither_overflow_nor_vanish():
    outs = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    out, lse = torch_rpa.merge_attention_states(outs, torch.tensor([900.0, 900.0]).view(2, 1, 1))
    assert_close(out, torch.tensor([[[2.0]]]), torch.float32)
    assert_close(lse, torch.tensor([[900.0]]) + torch.log(torch.tensor(2.0)), torch.float32)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "outs must have at least one part, got none"),
        ([torch.ones(2, 3, 8)], [torch.ones(2, 3)] * 2, r"lses must be \[1, 2, 3\] .* got \[2, 2, 3\]"),
        ([torch.ones(2, 3, 8), torch.ones(1, 3, 8)], [torch.ones(2, 3)] * 2, r"outs\[1\] must be \[2, 3, 8\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(outs, lses, message):
    with pytest.raises(ValueError, match=message):
        torch_rpa.merge_attention_states(outs, lses)
