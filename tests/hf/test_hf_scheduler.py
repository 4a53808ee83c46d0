"""The scheduler and the page allocator on plain data, without a model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_rpa.hf.batch import BatchLayout
from torch_rpa.hf.cache import PageAllocator
from torch_rpa.hf.scheduler import Scheduler, Sequence


def make_sequence(num_prompt: int, max_new_tokens: int, name: str = "") -> Sequence:
    return Sequence(request_id=name, prompt_ids=list(range(1, num_prompt + 1)), max_new_tokens=max_new_tokens)


def make_scheduler(num_pages=100, page_size=8, max_num_seqs=4, max_step_tokens=16) -> Scheduler:
    allocator = PageAllocator(num_pages)
    return Scheduler(allocator, page_size=page_size, max_num_seqs=max_num_seqs, max_step_tokens=max_step_tokens)


def run_step(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """One step as the engine takes it; (request, start, tokens) of each chunk."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        samples = chunk.samples
        chunk.sequence.num_cached += chunk.num_tokens
        if samples:
            chunk.sequence.generated_tokens.append(0)
            if chunk.sequence.is_finished:
                scheduler.finish(chunk.sequence)
    return [(chunk.sequence.request_id, chunk.start, chunk.num_tokens) for chunk in chunks]


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


def test_request_is_admitted_only_with_pages_for_its_whole_answer_and_in_order():
    scheduler = make_scheduler(num_pages=4)
    for name, num_prompt in (("a", 17), ("b", 9), ("c", 2)):
        scheduler.add(make_sequence(num_prompt, 4, name))  # 3, 2 and 1 pages
    assert run_step(scheduler) == [("a", 0, 16)]  # c would fit, but does not overtake b
    while any(sequence.request_id == "a" for sequence in scheduler.running):
        run_step(scheduler)
    assert run_step(scheduler) == [("b", 0, 9), ("c", 0, 2)]


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
    assert pages == [*first.pages, *second.pages, -1, -1]
    assert (len(first.pages), len(second.pages)) == (2, 2)


def _split(packed, sizes):
    parts = []
    for size in sizes:
        parts.append(packed[:size].tolist())
        packed = packed[size:]
    return parts


def test_allocator_refuses_what_it_cannot_give_or_does_not_own():
    allocator = PageAllocator(3)
    pages = allocator.allocate(2)
    with pytest.raises(ValueError, match="count=2 of 1 free pages"):
        allocator.allocate(2)
    with pytest.raises(ValueError, match="count=-1"):
        allocator.allocate(-1)
    allocator.free(pages)
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free(pages[:1])
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free([3])
    again = allocator.allocate(1)
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free(again * 2)
    assert allocator.num_free == 2  # a refused call changes nothing


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 30))
def test_no_page_is_lost_and_none_is_owned_twice(data, num_pages):
    allocator, owned = PageAllocator(num_pages), []
    for _ in range(data.draw(st.integers(0, 30))):
        if owned and data.draw(st.booleans()):
            allocator.free(owned.pop(data.draw(st.integers(0, len(owned) - 1))))
        else:
            owned.append(allocator.allocate(data.draw(st.integers(0, allocator.num_free))))
        everything = [page for pages in owned for page in pages]
        assert len(set(everything)) == len(everything) == num_pages - allocator.num_free
        assert set(everything) <= set(range(num_pages))


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), max_size=15),
    num_pages=st.integers(9, 30),
    max_num_seqs=st.integers(1, 6),
    spare_tokens=st.integers(0, 20),
)
def test_every_request_is_answered_whatever_the_sizes(requests, num_pages, max_num_seqs, spare_tokens):
    scheduler = make_scheduler(num_pages, 8, max_num_seqs, max_num_seqs + spare_tokens)
    sequences = [make_sequence(*request) for request in requests]
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.has_work:
        decoding = [sequence for sequence in scheduler.running if sequence.num_uncached == 1]
        chunks = run_step(scheduler)
        assert 0 < len(chunks) <= max_num_seqs
        assert len(decoding) <= sum(num_tokens for _, _, num_tokens in chunks) <= max_num_seqs + spare_tokens
        owned = [page for sequence in scheduler.running for page in sequence.pages]
        assert len(set(owned)) == len(owned) == num_pages - scheduler.allocator.num_free
        assert all(sequence.num_cached <= 8 * len(sequence.pages) for sequence in scheduler.running)
    assert [len(sequence.generated_tokens) for sequence in sequences] == [count for _, count in requests]
    assert scheduler.allocator.num_free == num_pages
