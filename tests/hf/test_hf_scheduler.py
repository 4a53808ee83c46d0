"""The scheduler on plain data, without a model."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_rpa.hf.engine.batch import BatchLayout
from torch_rpa.hf.engine.page_allocator import PageAllocator
from torch_rpa.hf.engine.scheduler import Chunk, Scheduler
from torch_rpa.hf.engine.sequence import Sequence


def make_sequence(num_prompt: int, max_new_tokens: int, name: str = "") -> Sequence:
    return Sequence(request_id=name, prompt_ids=list(range(1, num_prompt + 1)), max_new_tokens=max_new_tokens)


def make_scheduler(num_pages=100, page_size=8, max_num_seqs=4, max_step_tokens=16) -> Scheduler:
    allocator = PageAllocator(num_pages)
    return Scheduler(allocator, page_size=page_size, max_num_seqs=max_num_seqs, max_step_tokens=max_step_tokens)


def run_step(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """One step as the engine takes it, with a model that always says 0; (request, start, tokens) of each chunk."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        finish_chunk(scheduler, chunk, 0)
    return [(chunk.sequence.request_id, chunk.start, chunk.num_tokens) for chunk in chunks]


def finish_chunk(scheduler: Scheduler, chunk: Chunk, token: int) -> None:
    samples = chunk.samples
    scheduler.advance(chunk)
    if samples:
        chunk.sequence.append(token, 0.0)
        if chunk.sequence.is_finished:
            scheduler.remove(chunk.sequence)


def test_decoding_sequences_go_first_and_prompts_fill_the_rest():
    scheduler = make_scheduler()
    scheduler.add(make_sequence(3, 10, "a"))
    assert run_step(scheduler) == [("a", 0, 3)]
    scheduler.add(make_sequence(40, 10, "b"))
    assert run_step(scheduler) == [("a", 3, 1), ("b", 0, 15)]
    scheduler.add(make_sequence(2, 10, "c"))
    assert run_step(scheduler) == [("a", 4, 1), ("b", 15, 15)]
    assert run_step(scheduler) == [("a", 5, 1), ("b", 30, 10), ("c", 0, 2)]
    assert run_step(scheduler) == [("a", 6, 1), ("b", 40, 1), ("c", 2, 1)]


def test_request_is_admitted_with_pages_for_its_prompt_and_one_more_for_each_running_one_in_order():
    scheduler = make_scheduler(num_pages=5)
    scheduler.add(make_sequence(17, 4, "a"))
    assert run_step(scheduler) == [("a", 0, 16)]
    b = make_sequence(10, 4, "b")  # 2 pages of the 2 free ones, and a may soon need one
    b.prompt_ids[0] = 99  # nothing in common
    scheduler.add(b)
    scheduler.add(make_sequence(2, 4, "c"))  # would fit, but does not overtake b
    while any(sequence.request_id == "a" for sequence in scheduler.running):
        assert [name for name, *_ in run_step(scheduler)] == ["a"]
    assert run_step(scheduler) == [("b", 0, 10), ("c", 0, 2)]


def test_the_newest_sequence_is_preempted_and_computed_again():
    scheduler = make_scheduler(num_pages=4)
    old, new = make_sequence(7, 12, "old"), make_sequence(8, 12, "new")
    new.prompt_ids[0] = 99  # nothing in common
    scheduler.add(old)
    scheduler.add(new)
    for _ in range(9):
        run_step(scheduler)
    assert (len(old.pages), len(new.pages)) == (2, 2)
    while scheduler.stats.num_preemptions == 0:
        run_step(scheduler)
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [new]
    assert (new.pages, new.num_cached, len(new.generated_tokens)) == ([], 0, 9)  # what it wrote is not lost
    while scheduler.has_work:
        run_step(scheduler)
    assert len(old.generated_tokens) == len(new.generated_tokens) == 12
    assert scheduler.allocator.num_free == 4


def test_a_request_that_needs_every_page_runs_though_others_wait():
    scheduler = make_scheduler(num_pages=3)
    scheduler.add(make_sequence(20, 5, "all"))
    scheduler.add(make_sequence(3, 3, "small"))
    while scheduler.has_work:
        run_step(scheduler)
    assert scheduler.allocator.num_free == 3


def test_full_pages_of_a_common_prefix_are_shared_and_only_the_rest_is_run():
    scheduler = make_scheduler(max_step_tokens=64)
    first, second = make_sequence(20, 5, "first"), make_sequence(27, 5, "second")  # 20 tokens in common
    scheduler.add(first)
    run_step(scheduler)
    scheduler.add(second)
    assert run_step(scheduler) == [("first", 20, 1), ("second", 16, 11)]
    assert second.pages[:2] == first.pages[:2]
    assert not set(second.pages[2:]) & set(first.pages)
    assert scheduler.stats.prefix_hit_rate == 16 / 47


def test_the_last_token_is_always_run_even_if_its_page_is_known():
    scheduler = make_scheduler(max_step_tokens=64)
    for name in ("first", "second"):
        scheduler.add(make_sequence(16, 1, name))
        assert run_step(scheduler) == [(name, 0, 16) if name == "first" else (name, 8, 8)]


def test_cancelling_frees_the_pages_of_a_running_and_of_a_waiting_sequence():
    scheduler = make_scheduler(num_pages=8, max_num_seqs=1)
    running, waiting = make_sequence(20, 5), make_sequence(3, 3)
    scheduler.add(running)
    scheduler.add(waiting)
    run_step(scheduler)
    scheduler.remove(running)
    assert scheduler.allocator.num_free == 8
    scheduler.remove(waiting)
    assert not scheduler.has_work


def test_restart_computes_everything_again_and_trusts_no_page():
    scheduler = make_scheduler()
    first, second = make_sequence(9, 5, "first"), make_sequence(20, 5, "second")
    scheduler.add(first)
    scheduler.add(second)
    run_step(scheduler)
    scheduler.restart()
    assert run_step(scheduler) == [("first", 0, 10), ("second", 0, 6)]


def test_clear_gives_every_page_back():
    scheduler = make_scheduler(num_pages=8)
    for _ in range(6):
        scheduler.add(make_sequence(10, 10))
    run_step(scheduler)
    assert scheduler.allocator.num_free < 8
    scheduler.clear()
    assert scheduler.allocator.num_free == 8
    assert not scheduler.has_work
    assert scheduler.schedule() == []


def test_a_step_must_hold_one_token_of_each_sequence():
    with pytest.raises(ValueError, match="max_step_tokens=3 must be at least max_num_seqs=4"):
        make_scheduler(max_step_tokens=3)


def test_packed_batch_has_the_ops_metadata():
    layout = BatchLayout(num_rows=8, max_num_seqs=3, pages_per_seq=2)
    scheduler = make_scheduler(page_size=8, max_num_seqs=3, max_step_tokens=8)
    first, second = make_sequence(2, 8), make_sequence(9, 2)
    scheduler.add(first)
    run_step(scheduler)
    scheduler.add(second)
    chunks = scheduler.schedule()
    ids, positions, last_rows, kv_lens, cu_q_lens, num_seqs, pages = _split(layout.pack(chunks), layout.sizes)
    assert ids == [0, 1, 2, 3, 4, 5, 6, 7]  # the token that `first` generated was 0
    assert positions == [2, 0, 1, 2, 3, 4, 5, 6]
    assert last_rows == [0, 7, 0]
    assert kv_lens == [3, 7, 0]
    assert cu_q_lens == [0, 1, 8, 8]
    assert num_seqs == [2]
    assert pages == [*first.pages, -1, *second.pages, -1, -1]
    assert (len(first.pages), len(second.pages)) == (1, 2)


def _split(packed, sizes):
    parts = []
    for size in sizes:
        parts.append(packed[:size].tolist())
        packed = packed[size:]
    return parts


class FakeCache:
    """What each slot of each page holds: the whole prefix that its key was computed from."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}

    def run(self, chunk: Chunk) -> int:
        """Write the chunk's slots, check every slot it sees, and give a token that depends on all of them."""
        prefix = chunk.sequence.tokens(0, chunk.end)
        for position in range(chunk.start, chunk.end):
            self.slots[self._slot(chunk, position)] = tuple(prefix[: position + 1])
        for position in range(chunk.end):
            assert self.slots[self._slot(chunk, position)] == tuple(prefix[: position + 1])
        return sum(prefix) % 3

    def _slot(self, chunk: Chunk, position: int) -> tuple[int, int]:
        return chunk.sequence.pages[position // self.page_size], position % self.page_size


def answer_alone(prompt: list[int], max_new_tokens: int) -> list[int]:
    """What the fake model says without any batch or cache."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(sum(tokens) % 3)
    return tokens[len(prompt) :]


@settings(max_examples=400, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=60), st.integers(1, 12), st.integers(0, 8)),
        max_size=15,
    ),
    num_pages=st.integers(9, 30),
    max_num_seqs=st.integers(1, 6),
    spare_tokens=st.integers(0, 20),
    prefix_caching=st.booleans(),
)
def test_every_request_is_answered_rightly_whatever_the_sizes_and_cancels(
    requests, num_pages, max_num_seqs, spare_tokens, prefix_caching
):
    """Prompts over an alphabet of two share many prefixes; a request with a delay of 1 to 8 steps is cancelled then."""
    allocator, cache = PageAllocator(num_pages, prefix_caching=prefix_caching), FakeCache(8)
    scheduler = Scheduler(
        allocator, page_size=8, max_num_seqs=max_num_seqs, max_step_tokens=max_num_seqs + spare_tokens
    )
    sequences = [Sequence(str(i), prompt, count) for i, (prompt, count, _) in enumerate(requests)]
    for sequence in sequences:
        scheduler.add(sequence)
    cancelled = set()
    for step in itertools.count(1):
        for sequence, (_, _, delay) in zip(sequences, requests, strict=True):
            if delay == step and not sequence.is_finished:
                scheduler.remove(sequence)
                cancelled.add(sequence)
        if not scheduler.has_work:
            break
        chunks = scheduler.schedule()
        written = [page for chunk in chunks for page in set(chunk.sequence.pages[chunk.start // 8 :])]
        owned = [page for sequence in scheduler.running for page in sequence.pages]
        assert all(owned.count(page) == 1 for page in written)
        assert num_pages - allocator.num_free == len(set(owned))
        assert 0 < len(chunks) <= max_num_seqs
        assert sum(chunk.num_tokens for chunk in chunks) <= max_num_seqs + spare_tokens
        for chunk in chunks:
            finish_chunk(scheduler, chunk, cache.run(chunk))
    for sequence, (prompt, count, _) in zip(sequences, requests, strict=True):
        if sequence not in cancelled:
            assert sequence.generated_tokens == answer_alone(prompt, count)
    assert allocator.num_free == num_pages
