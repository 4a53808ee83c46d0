"""The visibility rule on plain integers."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_rpa import mask

RULES = [{"causal": causal, "sliding_window": window} for causal in (True, False) for window in (None, 1, 2, 3, 100)]
KV_LEN = 9


def sees(p, j, causal, sliding_window):
    """The contract's words, one pair at a time."""
    if causal and j > p:
        return False
    return sliding_window is None or abs(p - j) < sliding_window


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_visible_is_the_contract_for_every_pair(rule):
    for p, j in itertools.product(range(KV_LEN), range(KV_LEN)):
        assert mask.visible(p, j, **rule) == sees(p, j, **rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_visible_takes_arrays(rule):
    p, j = torch.arange(KV_LEN)[:, None], torch.arange(KV_LEN)[None, :]
    expected = [[sees(a, b, **rule) for b in range(KV_LEN)] for a in range(KV_LEN)]
    assert mask.visible(p, j, **rule).expand(KV_LEN, KV_LEN).tolist() == expected


@given(st.integers(0, KV_LEN - 1), st.integers(0, KV_LEN - 1), st.sampled_from(RULES))
def test_key_range_is_exactly_what_some_query_sees(first_p, more, rule):
    last_p = min(first_p + more, KV_LEN - 1)
    start, end = mask.key_range(first_p, last_p, KV_LEN, **rule)
    seen = [j for j in range(KV_LEN) if any(sees(p, j, **rule) for p in range(first_p, last_p + 1))]
    assert list(range(max(start, 0), min(end, KV_LEN))) == seen


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8), st.integers(0, 8), st.sampled_from(RULES))
def test_all_visible_is_true_exactly_where_no_mask_is_needed(p, more_p, j, more_j, rule):
    pairs = itertools.product(range(p, p + more_p + 1), range(j, j + more_j + 1))
    assert mask.all_visible(p, p + more_p, j, j + more_j, **rule) == all(sees(a, b, **rule) for a, b in pairs)
