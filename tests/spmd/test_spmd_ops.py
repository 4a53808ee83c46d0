"""The ops on four virtual chips give what one chip gives."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
from batches import MIXED, assert_close, assert_matches_oracle, bytes_of, finish_step, make_batch

import torch_rpa
from torch_rpa import bridges

XLA = torch.device("xla")


def sharded(batch):
    """The batch on the device, its pages sharded by KV head, each head as often as the chips need it."""
    head_dim, num_kv_heads = batch.q.shape[2], batch.k.shape[1]
    stored = torch_rpa.sharding.current().stored_kv_heads(num_kv_heads)
    pages = batch.kv_pages.view(*batch.kv_pages.shape[:2], num_kv_heads, 2, head_dim)
    pages = pages.repeat_interleave(stored // num_kv_heads, dim=2).flatten(2, 3)
    pages = pages.flatten(2) if batch.kv_pages.dim() == 3 else pages
    return replace(batch.to(XLA), kv_pages=torch_rpa.sharding.current().mark("kv_pages", pages.to(XLA)))


def stored_once(pages, batch):
    """Pages on the CPU without the copies of a KV head; all copies must be alike."""
    num_kv_heads, head_dim = batch.k.shape[1:]
    heads = pages.cpu().view(*pages.shape[:2], num_kv_heads, -1, 2, head_dim)
    for copy in range(heads.shape[3]):
        assert torch.equal(bytes_of(heads[..., copy, :, :]), bytes_of(heads[..., 0, :, :]))
    return heads[..., 0, :, :].reshape(batch.kv_pages.shape)


def bytes_on_each_chip(tensor):
    xm.wait_device_ops()
    return [shard.data.nbytes for shard in xs.wrap_if_sharded(tensor).local_shards]


HEADS = {
    "a_kv_head_per_chip": (8, 4, 64),
    "kv_heads_per_chip": (24, 8, 16),
    "chips_per_kv_head": (8, 2, 64),
    "one_kv_head": (12, 1, 64),
}


@pytest.mark.parametrize("form", ["heads", "flat"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_an_update_on_four_chips_equals_the_oracle(mesh, heads, form):
    batch = make_batch(MIXED, heads=heads, form=form)
    on_chips = sharded(batch)
    out = on_chips.update(torch.ops.rpa.ragged_paged_attention_update_)
    finish_step(XLA)
    assert_matches_oracle(batch, out, update=True)
    expected = batch.expected(update=True)[2]
    assert torch.equal(stored_once(on_chips.kv_pages, batch).nan_to_num(7.0), expected.float().nan_to_num(7.0))


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_reading_with_every_option_equals_the_oracle(mesh, heads):
    batch = make_batch(MIXED, heads=heads, kv_dtype=torch.int8)
    sinks = torch.linspace(-1.0, 2.0, heads[0])
    options = {"sm_scale": 0.2, "sliding_window": 9, "soft_cap": 20.0}
    out, lse = sharded(batch).read(**options, sinks=sinks.to(XLA))
    assert_matches_oracle(batch, out, lse, **options, sinks=sinks)


def test_every_chip_holds_its_share_of_the_cache(mesh):
    pages = torch_rpa.empty_kv_pages(32, 16, 8, 64, dtype=torch.bfloat16, device="xla")
    assert bytes_on_each_chip(pages) == [pages.nbytes // 4] * 4


def test_more_chips_than_kv_heads_give_one_head_to_each_chip(mesh):
    pages = torch_rpa.empty_kv_pages(32, 16, 2, 64, dtype=torch.bfloat16, device="xla")
    assert pages[0, 0].numel() == 4 * 2 * 64
    assert bytes_on_each_chip(pages) == [pages.nbytes // 4] * 4


def test_steps_with_other_lengths_do_not_compile_again(mesh):
    seqs = [MIXED, ((4, 9), (1, 37), (20, 31), (1, 1), (0, 3), (2, 50), (17, 33)), MIXED]
    counts = []
    for lengths in seqs:
        batch = make_batch(lengths, heads=(8, 4, 64), spare_rows=60 - sum(q for q, _ in lengths), spare_pages=20)
        batch = replace(
            batch,
            kv_pages=torch.cat([batch.kv_pages, batch.kv_pages])[:40],
            page_indices=torch.nn.functional.pad(batch.page_indices, (0, 8 - batch.page_indices.shape[1]), value=-1),
        )
        on_chips = sharded(batch)
        out = on_chips.update(torch.ops.rpa.ragged_paged_attention_update_)
        bridges.of("xla").run_pending([on_chips.kv_pages, out])
        assert_matches_oracle(batch, out, update=True)
        counts.append(bridges.of("xla").compilations()[0])
    assert counts[0] == counts[1] == counts[2]


def test_the_callers_tensors_are_not_resharded(mesh):
    on_chips = sharded(make_batch(MIXED, heads=(8, 4, 64)))
    on_chips.read()
    assert not isinstance(xs.wrap_if_sharded(on_chips.q), xs.XLAShardedTensor)


def test_heads_that_cannot_be_shared_out_are_refused(mesh):
    with pytest.raises(ValueError, match=r"num_kv_heads=3 cannot be shared out over the 4 chips of mesh axis 'model'"):
        torch_rpa.empty_kv_pages(4, 16, 3, 64, dtype=torch.float32, device="xla")
    on_chips = sharded(make_batch(MIXED, heads=(6, 2, 64)))
    with pytest.raises(ValueError, match="q has 6 heads, which cannot be shared out evenly over the 4 chips"):
        on_chips.read()


@pytest.mark.parametrize("partition", [None, ("model", None, None, None)])
def test_pages_that_are_not_sharded_by_head_are_refused(mesh, partition):
    batch = make_batch(MIXED, heads=(8, 4, 64), spare_pages=5).to(XLA)
    if partition:
        xs.mark_sharding(batch.kv_pages, mesh, partition)
    with pytest.raises(ValueError, match="kv_pages must be sharded by head over the 4 chips of mesh axis 'model'"):
        batch.read()


def test_a_mesh_of_two_axes_replicates_along_the_other():
    mesh = xs.Mesh(np.arange(4), (2, 2), ("data", "model"))
    torch_rpa.sharding.use_mesh(mesh, "model")
    try:
        batch = make_batch(MIXED, heads=(8, 2, 64))
        out, lse = sharded(batch).read()
        assert_matches_oracle(batch, out, lse)
    finally:
        torch_rpa.sharding.use_mesh(None)


def test_an_unknown_axis_is_refused():
    mesh = xs.Mesh(np.arange(4), (4,), ("model",))
    with pytest.raises(ValueError, match=r"axis must be one of the mesh's axes \('model',\), got 'tp'"):
        torch_rpa.sharding.use_mesh(mesh, "tp")


def test_without_a_mesh_the_op_says_that_it_is_not_sharded():
    batch = make_batch(((1, 3),), heads=(4, 2, 32)).to(XLA)
    with pytest.warns(UserWarning, match="torch_rpa.sharding.use_mesh"):
        batch.read()


def test_a_context_shared_out_over_chips_equals_one_chip():
    """The pages of every sequence in turn on the chips; a prefill chunk's own tokens are one more part."""
    mesh, chips = xs.Mesh(np.arange(4), (4,), ("context",)), 4
    batch = make_batch(((1, 200), (1, 17), (1, 64), (1, 130)), heads=(4, 2, 64), spare_seqs=0)
    expected, expected_lse, _ = batch.expected()
    pages_of = [[[] for _ in range(chips)] for _ in batch.kv_lens]
    for s, kv_len in enumerate(batch.kv_lens.tolist()):
        for i in range(-(-kv_len // 16)):
            tokens = min(16, kv_len - 16 * i)
            pages_of[s][i % chips].append((int(batch.page_indices[s, i]), tokens))
    lens, table, pages = share_out(batch.kv_pages, pages_of, chips)
    pages = pages.to(XLA)
    xs.mark_sharding(pages, mesh, ("context", None, None, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out, lse = torch_rpa.sharding.attend_over_chips(
            batch.q.to(XLA), pages, lens.to(XLA), table.to(XLA), batch.cu_q_lens.to(XLA), batch.num_seqs.to(XLA),
            mesh=mesh, axis="context",
        )  # fmt: skip
    assert_close(out.cpu(), expected, torch.float32)
    assert_close(lse.cpu(), expected_lse, torch.float32)


def share_out(kv_pages, pages_of, chips):
    """kv_lens, page_indices and pages of ``attend_over_chips``, where pages_of[s][chip] lists (page, its tokens)."""
    per_chip = [[page for pages in pages_of for page, _ in pages[chip]] for chip in range(chips)]
    most, per_seq = max(map(len, per_chip)), max(len(p) for pages in pages_of for p in pages)
    lens = torch.tensor([[sum(n for _, n in pages[chip]) for pages in pages_of] for chip in range(chips)])
    table = torch.full((chips, len(pages_of), per_seq), -1)
    shared = torch.full((chips * most, *kv_pages.shape[1:]), torch.nan)
    for chip, pages in enumerate(per_chip):
        shared[chip * most : chip * most + len(pages)] = kv_pages[pages]
        for s, seq_pages in enumerate(pages_of):
            local = [pages.index(page) for page, _ in seq_pages[chip]]
            table[chip, s, : len(local)] = torch.tensor(local)
    return lens.int(), table.int(), shared


def test_options_that_have_no_meaning_over_chips_are_refused():
    mesh = xs.Mesh(np.arange(4), (4,), ("context",))
    batch = make_batch(((1, 20),)).to(XLA)
    with pytest.raises(ValueError, match="attend_over_chips takes no sliding_window: every row sees every key"):
        torch_rpa.sharding.attend_over_chips(
            batch.q, batch.kv_pages, *batch.metadata, mesh=mesh, axis="context", sliding_window=3
        )
    with pytest.raises(ValueError, match="kv_lens must have one entry for each of 4 chips"):
        torch_rpa.sharding.attend_over_chips(batch.q, batch.kv_pages, *batch.metadata, mesh=mesh, axis="context")
