"""Random ragged batches (hypothesis) against the float64 oracle, read-only and update, on every device.

All batches have one shape, so that the XLA device compiles once for each set of options.
"""

import math
from dataclasses import replace

import pytest
import torch
from batches import assert_matches_oracle, bytes_of, forget_new_tokens, make_batch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NUM_TOKENS, MAX_NUM_SEQS, NUM_PAGES, PAGES_PER_SEQ, PAGE_SIZE = 40, 5, 45, 9, 8

OPTIONS = {
    "causal": {"sm_scale": 0.2},
    "window": {"sm_scale": 0.2, "sliding_window": 6},
    "not_causal_window_cap": {"sm_scale": 0.2, "causal": False, "sliding_window": 11, "soft_cap": 2.0},
    "small_blocks": {"sm_scale": 0.2, "num_kv_pages_per_block": 2, "num_queries_per_block": 4},
}


@st.composite
def sequences(draw):
    """Up to MAX_NUM_SEQS pairs (q_len, kv_len) that fit the shape."""
    seqs, rows = [], 0
    for _ in range(draw(st.integers(0, MAX_NUM_SEQS))):
        q_len = draw(st.integers(0, NUM_TOKENS - rows))
        seqs.append((q_len, draw(st.integers(q_len, PAGES_PER_SEQ * PAGE_SIZE))))
        rows += q_len
    return seqs


def fixed_shape_batch(seqs, seed):
    pages = sum(math.ceil(kv_len / PAGE_SIZE) for _, kv_len in seqs)
    batch = make_batch(
        seqs,
        heads=(6, 2, 16),
        page_size=PAGE_SIZE,
        spare_rows=NUM_TOKENS - sum(q_len for q_len, _ in seqs),
        spare_seqs=MAX_NUM_SEQS - len(seqs),
        spare_pages=NUM_PAGES - pages,
        seed=seed,
    )
    table = torch.full((MAX_NUM_SEQS, PAGES_PER_SEQ), -1, dtype=torch.int32)
    columns = min(PAGES_PER_SEQ, batch.page_indices.shape[1])
    table[:, :columns] = batch.page_indices[:, :columns]
    return replace(batch, page_indices=table)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seqs=sequences(), seed=st.integers(0, 2**31))
def test_any_batch_equals_the_oracle(seqs, seed, options, device):
    with torch.no_grad():
        batch = fixed_shape_batch(seqs, seed)
        out, lse = batch.to(device).read(**options)
        assert_matches_oracle(batch, out, lse, **options)
        batch = forget_new_tokens(batch)
        out, pages = batch.to(device).update(**options)
        assert_matches_oracle(batch, out, update=True, **options)
        assert torch.equal(bytes_of(pages), bytes_of(batch.expected(update=True, **options)[2]))
