"""The value checks: on request, and in every call while TORCH_RPA_CHECK=1."""

from dataclasses import replace

import pytest
import torch
from batches import MIXED, assert_matches_oracle, forget_new_tokens, make_batch

import torch_rpa

pytestmark = pytest.mark.usefixtures("no_grad")


def check(batch, **options):
    torch_rpa.check_batch(batch.q, batch.kv_pages, *batch.metadata, **options)


def changed(name, index, value):
    def change(batch):
        tensor = getattr(batch, name).clone()
        tensor[index] = value
        return replace(batch, **{name: tensor})

    return change


# What is changed in a good batch -> the message.
BAD_VALUES = {
    "too_many_sequences": (changed("num_seqs", 0, 10), r"num_seqs must be from 0 to max_num_seqs = 9, got 10"),
    "negative_num_seqs": (changed("num_seqs", 0, -1), r"num_seqs must be from 0 to max_num_seqs = 9, got -1"),
    "cu_q_lens_does_not_start_at_0": (changed("cu_q_lens", 0, 1), r"cu_q_lens must start with 0, got 1"),
    "cu_q_lens_falls": (changed("cu_q_lens", 3, 5), r"cu_q_lens must not fall, got 21 then 5 at sequence 2 of 7"),
    "more_rows_than_tokens": (changed("cu_q_lens", 7, 99), r"cu_q_lens\[7\] must be at most num_tokens = 48 .*got 99"),
    "kv_len_below_q_len": (
        changed("kv_lens", 1, 19),
        r"kv_lens\[1\] must be at least the sequence's q_len = 20 .*got 19",
    ),
    "too_many_pages": (
        changed("kv_lens", 0, 1000),
        r"kv_lens\[0\] = 1000 needs 63 pages of 16 tokens, but page_indices has room for pages_per_seq = 5",
    ),
    "needed_page_missing": (
        changed("page_indices", (3, 2), -1),
        r"page_indices\[3, 2\] must be from 0 to num_pages - 1 = \d+, got -1 \(sequence 3 has kv_len 50",
    ),
    "page_to_write_out_of_range": (changed("page_indices", (1, 1), 500), r"page_indices\[1, 1\] must be .*got 500"),
    "page_to_write_missing": (changed("page_indices", (1, 1), -3), r"page_indices\[1, 1\] must be from 0.*got -3"),
    "page_out_of_range": (changed("page_indices", (0, 1), 500), r"page_indices\[0, 1\] must be from 0 to .*got 500"),
}


@pytest.mark.parametrize("seqs", [MIXED, (), ((0, 0),), ((1, 1),), ((1, 200), (64, 64))], ids=str)
def test_a_good_batch_passes_whatever_its_unused_entries_hold(seqs, device):
    check(make_batch(seqs).to(device))


@pytest.mark.parametrize(("change", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_bad_value_is_refused_with_its_place(change, message, device, monkeypatch):
    batch = change(make_batch(MIXED)).to(device)
    with pytest.raises(ValueError, match=message):
        check(batch)
    monkeypatch.setenv("TORCH_RPA_CHECK", "1")
    with pytest.raises(ValueError, match=message):
        batch.read()
    with pytest.raises(ValueError, match=message):
        batch.update(torch.ops.rpa.ragged_paged_attention_update_)


@pytest.mark.parametrize(("change", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_without_the_check_bad_values_neither_crash_nor_hang(change, message, device):
    out, _ = change(make_batch(MIXED)).to(device).read()
    assert out.cpu().shape == (48, 4, 64)
    out, _ = change(make_batch(MIXED)).to(device).update()
    assert out.cpu().shape == (48, 4, 64)


def test_the_check_is_read_at_each_call(device, monkeypatch):
    batch = changed("num_seqs", 0, 10)(make_batch()).to(device)
    for value in ("0", ""):
        monkeypatch.setenv("TORCH_RPA_CHECK", value)
        batch.read()
    monkeypatch.setenv("TORCH_RPA_CHECK", "1")
    with pytest.raises(ValueError, match="num_seqs"):
        batch.read()


UPDATES = [torch.ops.rpa.ragged_paged_attention_update, torch.ops.rpa.ragged_paged_attention_update_]

# (sequence, entry) of a page table -> the (sequence, entry) whose page it takes, and what the update says. In MIXED,
# sequence 1 writes all 20 of its tokens, 3 writes 45 .. 49 and reads 0 .. 44, and 6 writes 16 .. 32 and reads 0 .. 15.
PAGES_OF_ANOTHER = {
    "two_write": ((3, 3), (1, 1), r"written to by sequence 1 \(page_indices\[1, 1\]\) and written to by sequence 3"),
    "one_reads": ((3, 1), (1, 0), r"written to by sequence 1 .* and read by sequence 3 \(page_indices\[3, 1\]\)"),
    "the_first_reads": (
        (6, 1),
        (3, 0),
        r"read by sequence 3 .* and written to by sequence 6 .*belongs to one sequence",
    ),
    "one_sequence_twice": ((1, 1), (1, 0), r"written to by sequence 1 .* and written to by sequence 1 .*\[1, 1\]"),
}


@pytest.mark.parametrize(("place", "owner", "message"), PAGES_OF_ANOTHER.values(), ids=PAGES_OF_ANOTHER)
@pytest.mark.parametrize("op", UPDATES, ids=["functional", "in_place"])
def test_an_update_notices_a_page_that_is_written_to_and_has_another_user(
    place, owner, message, op, device, monkeypatch
):
    batch = make_batch(MIXED)
    page = int(batch.page_indices[owner])
    batch = changed("page_indices", place, page)(batch).to(device)
    monkeypatch.setenv("TORCH_RPA_CHECK", "1")
    with pytest.raises(ValueError, match=f"page {page} is {message}"):
        batch.update(op)
    batch.read()  # pages that are only read may be anybody's


def test_an_update_may_share_pages_that_are_only_read(device, monkeypatch):
    batch = make_batch(((1, 40), (3, 40), (0, 40)))
    batch.page_indices[1:3, :2] = batch.page_indices[0, :2]  # 0 .. 31: the common prefix; tokens from 37 on are new
    monkeypatch.setenv("TORCH_RPA_CHECK", "1")
    batch.to(device).update()


def test_pages_before_the_window_may_be_freed(device):
    batch = make_batch(((1, 100), (4, 90)))
    batch.page_indices[0, :5] = -1  # the row at 99 sees 90 .. 99, on page 5 and on
    batch.page_indices[1, :4] = -1  # the rows at 86 .. 89 see 77 and on, on page 4 and on
    batch = batch.to(device)
    check(batch, sliding_window=10)
    with pytest.raises(ValueError, match=r"page_indices\[0, 4\] must be"):
        check(batch, sliding_window=21)
    with pytest.raises(ValueError, match=r"page_indices\[0, 0\] must be"):
        check(batch)


def test_the_check_works_while_openxla_compiles(xla, monkeypatch):
    """Reading the metadata then must not split the graph, whose pages are donated."""
    torch._dynamo.reset()
    monkeypatch.setenv("TORCH_RPA_CHECK", "1")
    step = torch.compile(torch.ops.rpa.ragged_paged_attention_update_, backend="openxla")
    batch = forget_new_tokens(make_batch())
    on_xla = batch.to(xla)
    out = step(on_xla.q, on_xla.k, on_xla.v, on_xla.kv_pages, *on_xla.metadata)
    assert_matches_oracle(batch, out, update=True)


def test_what_is_no_tensor_is_refused_by_name():
    batch = make_batch()
    with pytest.raises(TypeError, match=r"kv_lens must be a torch.Tensor, got list"):
        check(replace(batch, kv_lens=[5, 9]))
    with pytest.raises(TypeError, match=r"sliding_window must be an integer or None, got 2\.5"):
        check(batch, sliding_window=2.5)


def test_the_static_checks_come_first(device):
    batch = make_batch().to(device)
    with pytest.raises(TypeError, match="kv_lens must be int32, got int64"):
        check(replace(batch, kv_lens=batch.kv_lens.long()))
    with pytest.raises(ValueError, match="sliding_window must be at least 1, got 0"):
        check(batch, sliding_window=0)
