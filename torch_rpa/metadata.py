"""Checks of the values of a batch's metadata, copied to the host. Each error is a ValueError that names the place."""


def check_metadata(
    kv_lens: list[int],
    page_indices: list[list[int]],
    cu_q_lens: list[int],
    num_seqs: int,
    *,
    num_tokens: int,
    num_pages: int,
    page_size: int,
    sliding_window: int | None = None,
    writes: bool = False,
) -> None:
    """Check a batch's metadata; see ``torch_rpa.check_batch``. Raises ValueError for the first mistake.

    With ``writes`` it is for an update op, whose sequences write their q_len last tokens to pages of their own.
    """
    max_num_seqs = len(kv_lens)
    if not 0 <= num_seqs <= max_num_seqs:
        raise ValueError(f"num_seqs must be from 0 to max_num_seqs = {max_num_seqs}, got {num_seqs}")
    if num_seqs and cu_q_lens[0] != 0:
        raise ValueError(f"cu_q_lens must start with 0, got {cu_q_lens[0]}")
    for s in range(num_seqs):
        q_len = cu_q_lens[s + 1] - cu_q_lens[s]
        if q_len < 0:
            raise ValueError(
                f"cu_q_lens must not fall, got {cu_q_lens[s]} then {cu_q_lens[s + 1]} at sequence {s} of {num_seqs}"
            )
        if cu_q_lens[s + 1] > num_tokens:
            raise ValueError(
                f"cu_q_lens[{s + 1}] must be at most num_tokens = {num_tokens} (q's rows), got {cu_q_lens[s + 1]}"
            )
        if kv_lens[s] < q_len:
            raise ValueError(
                f"kv_lens[{s}] must be at least the sequence's q_len = {q_len} (it counts this step's tokens too), "
                f"got {kv_lens[s]}"
            )
        needed = _needed_pages(q_len, kv_lens[s], page_size, sliding_window)
        _check_page_row(s, kv_lens[s], page_indices[s], needed, num_pages, page_size)
    if writes:
        sizes = [(cu_q_lens[s + 1] - cu_q_lens[s], kv_lens[s]) for s in range(num_seqs)]
        _check_owners(sizes, page_indices, page_size, sliding_window)


def _needed_pages(q_len, kv_len, page_size, sliding_window) -> range:
    """Which entries of a sequence's page table are used.

    Pages before the window of the sequence's first row hold nothing that is read: they may have been freed.
    """
    used = -(-kv_len // page_size)
    first_key = 0 if sliding_window is None else max(0, kv_len - q_len - sliding_window + 1)
    return range(first_key // page_size if q_len else used, used)


def _check_page_row(s, kv_len, row, needed, num_pages, page_size):
    if needed.stop > len(row):
        raise ValueError(
            f"kv_lens[{s}] = {kv_len} needs {needed.stop} pages of {page_size} tokens, "
            f"but page_indices has room for pages_per_seq = {len(row)}"
        )
    for i in needed:
        if not 0 <= row[i] < num_pages:
            raise ValueError(
                f"page_indices[{s}, {i}] must be from 0 to num_pages - 1 = {num_pages - 1}, got {row[i]} "
                f"(sequence {s} has kv_len {kv_len} and needs {needed.stop} pages)"
            )


def _check_owners(sizes, page_indices, page_size, sliding_window):
    """A page that is written to has one place: in one sequence, and once in it. ``sizes`` are (q_len, kv_len)."""
    places = {}  # page -> (sequence, entry, whether it is written to) of the first that uses it
    for s, (q_len, kv_len) in enumerate(sizes):
        for i in _needed_pages(q_len, kv_len, page_size, sliding_window):
            page, is_written = page_indices[s][i], (i + 1) * page_size > kv_len - q_len
            first_s, first_i, first_is_written = places.setdefault(page, (s, i, is_written))
            if (first_s, first_i) != (s, i) and (first_is_written or is_written):
                first_use, use = ("written to" if written else "read" for written in (first_is_written, is_written))
                raise ValueError(
                    f"page {page} is {first_use} by sequence {first_s} (page_indices[{first_s}, {first_i}]) and {use} "
                    f"by sequence {s} (page_indices[{s}, {i}]); a page that is written to belongs to one sequence only"
                )
