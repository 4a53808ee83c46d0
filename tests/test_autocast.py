"""Under torch.autocast the ops work on what a model computes there, on every device."""

from dataclasses import replace

import pytest
import torch
from batches import assert_matches_oracle, make_batch

pytestmark = pytest.mark.usefixtures("no_grad")


def test_autocast_changes_nothing_where_the_dtypes_agree(device):
    batch = make_batch()
    on_device = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        out, lse = on_device.read()
        updated, _ = on_device.update()
    assert_matches_oracle(batch, out, lse)
    assert_matches_oracle(batch, updated, update=True)


def under_autocast(batch):
    """q, k and v as a float32 model computes them under autocast: only v keeps the dtype of the matrix products."""
    return replace(batch, v=batch.v.bfloat16())


def test_under_autocast_what_a_model_computes_takes_the_dtype_of_the_pages(device):
    batch = make_batch()
    rounded = replace(batch, v=batch.v.bfloat16().float())
    on_device = under_autocast(batch).to(device)
    sinks = torch.zeros(4, dtype=torch.bfloat16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out, pages = on_device.update(sinks=sinks)
        in_place = on_device.update(torch.ops.rpa.ragged_paged_attention_update_, sinks=sinks)
    assert_matches_oracle(rounded, out, update=True, sinks=torch.zeros(4))
    assert torch.equal(in_place.cpu(), out.cpu())
    assert pages.dtype == torch.float32


def test_under_autocast_quantised_pages_are_read_in_autocasts_dtype(device):
    batch = make_batch(kv_dtype=torch.float8_e4m3fn)
    on_device = under_autocast(batch).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        out, _ = on_device.update()
    rounded = replace(batch, q=batch.q.bfloat16(), k=batch.k.bfloat16(), v=batch.v.bfloat16())
    assert_matches_oracle(rounded, out, update=True)


def test_autocast_casts_nothing_that_it_could_not_have_made(device):
    batch = make_batch().to(device)
    with torch.autocast(device.type, torch.bfloat16), pytest.raises(TypeError, match="q must be one of"):
        replace(batch, q=batch.q.double()).read()
