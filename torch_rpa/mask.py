"""Which keys a query sees: the one definition of the visibility rule.

Everything here is plain arithmetic, so the same functions serve Python integers, torch tensors and JAX arrays.
Positions count tokens of one sequence from 0; a query at position ``p`` and a key at position ``j``.

    causal                 causal, window 3         not causal, window 2
      j 0 1 2 3              j 0 1 2 3                j 0 1 2 3
    p 0 x . . .            p 0 x . . .              p 0 x x . .
      1 x x . .              1 x x . .                1 x x x .
      2 x x x .              2 x x x .                2 . x x x
      3 x x x x              3 . x x x                3 . . x x
"""


def visible(p, j, *, causal: bool, sliding_window: int | None):
    """True where the query at position ``p`` sees the key at ``j``; ``p`` and ``j`` broadcast against each other.

    Whether ``0 <= j < kv_len`` is for the caller to check.
    """
    seen = j <= p if causal else j == j
    if sliding_window is not None:
        seen = seen & (p - j < sliding_window)
        if not causal:
            seen = seen & (j - p < sliding_window)
    return seen


def key_range(first_p, last_p, kv_len, *, causal: bool, sliding_window: int | None):
    """The keys ``start <= j < end`` that at least one query of ``first_p .. last_p`` can see.

    The bounds are not clamped: clip both to ``0 .. kv_len``. Keys outside it are neither fetched nor computed.
    """
    start = 0 if sliding_window is None else first_p - sliding_window + 1
    if causal:
        end = last_p + 1
    else:
        end = kv_len if sliding_window is None else last_p + sliding_window
    return start, end


def all_visible(first_p, last_p, first_j, last_j, *, causal: bool, sliding_window: int | None):
    """True if every query of ``first_p .. last_p`` sees every key of ``first_j .. last_j``: no mask is needed."""
    earliest_sees_last = visible(first_p, last_j, causal=causal, sliding_window=sliding_window)
    latest_sees_first = visible(last_p, first_j, causal=causal, sliding_window=sliding_window)
    return earliest_sees_last & latest_sees_first
