"""The page allocator on its own: owners are counted, prefixes are found again, and no page is ever lost."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torch_rpa.hf.engine.page_allocator import PageAllocator, page_key


def chain(*blocks: int) -> list[bytes]:
    """Keys of pages that hold one token each."""
    keys = [b""]
    for block in blocks:
        keys.append(page_key(keys[-1], [block]))
    return keys[1:]


def publish_all(allocator: PageAllocator, pages: list[int], keys: list[bytes]) -> None:
    for page, key in zip(pages, keys, strict=True):
        allocator.publish(page, key)


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
    with pytest.raises(ValueError, match="owned by nobody"):
        allocator.publish(pages[0], b"key")
    again = allocator.allocate(1)
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free(again * 2)
    assert allocator.num_free == 2  # a refused call changes nothing


def test_a_key_tells_the_whole_prefix_apart_not_only_its_own_page():
    assert chain(1, 2)[1] == chain(1, 2)[1]
    assert chain(1, 2)[1] != chain(3, 2)[1]
    assert page_key(b"", [1, 2]) != page_key(b"", [2, 1])


def test_published_pages_are_shared_as_far_as_the_prefix_goes_while_owned_and_afterwards():
    allocator = PageAllocator(4)
    first = allocator.allocate(3)
    publish_all(allocator, first[:2], chain(1, 2))
    assert allocator.share(chain(1, 2, 3)) == first[:2]  # the third was never published
    assert allocator.share(chain(1, 9)) == first[:1]
    allocator.free(first)
    allocator.free(first[:2])
    allocator.free(first[:1])
    assert allocator.num_free == 4
    assert allocator.share(chain(1, 2)) == first[:2]
    assert allocator.num_free == 2


def test_a_page_is_free_only_when_its_last_owner_has_freed_it():
    allocator = PageAllocator(1)
    pages = allocator.allocate(1)
    publish_all(allocator, pages, chain(1))
    allocator.share(chain(1))
    allocator.free(pages)
    assert allocator.num_free == 0
    allocator.free(pages)
    assert allocator.num_free == 1


def test_the_least_recently_used_prefix_goes_first_and_its_tail_before_its_head():
    allocator = PageAllocator(4)
    old, recent = allocator.allocate(2), allocator.allocate(2)
    publish_all(allocator, old, chain(1, 2))
    publish_all(allocator, recent, chain(7, 8))
    allocator.free(old)
    allocator.free(recent)
    allocator.free(allocator.share(chain(1, 2)))  # used again: now the more recent one
    assert allocator.allocate(1) == recent[1:]
    assert allocator.share(chain(7, 8)) == recent[:1]
    assert allocator.share(chain(1, 2)) == old


def test_pages_that_hold_nothing_known_are_taken_before_any_prefix():
    allocator = PageAllocator(3)
    pages = allocator.allocate(2)
    publish_all(allocator, pages[:1], chain(1))
    allocator.free(pages)
    allocator.allocate(2)
    assert allocator.share(chain(1)) == pages[:1]


def test_the_same_prefix_computed_twice_is_known_once():
    allocator = PageAllocator(2)
    first, second = allocator.allocate(1), allocator.allocate(1)
    publish_all(allocator, first, chain(1))
    publish_all(allocator, second, chain(1))
    assert allocator.share(chain(1)) == first


def test_forgotten_prefixes_are_not_shared_and_their_pages_are_free():
    allocator = PageAllocator(2)
    pages = allocator.allocate(2)
    publish_all(allocator, pages, chain(1, 2))
    allocator.free(pages[1:])
    allocator.forget_prefixes()
    assert allocator.share(chain(1, 2)) == []
    assert allocator.num_free == 1
    allocator.free(pages[:1])
    assert allocator.num_free == 2


def test_without_prefix_caching_nothing_is_shared():
    allocator = PageAllocator(1, prefix_caching=False)
    pages = allocator.allocate(1)
    publish_all(allocator, pages, chain(1))
    assert allocator.share(chain(1)) == []


class AnySchedule(RuleBasedStateMachine):
    """Sequences over an alphabet of two come, grow, publish their full pages, and go, in any order.

    `written` is the model: what each page last held, so that a page found by its key must hold just that.
    """

    NUM_PAGES = 7

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(self.NUM_PAGES)
        self.owners: list[tuple[list[int], list[int]]] = []  # (pages, the block each holds)
        self.written: dict[int, tuple[int, ...]] = {}

    @rule(blocks=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def arrive(self, blocks):
        pages = self.allocator.share(chain(*blocks))
        for index, page in enumerate(pages):
            assert self.written[page] == tuple(blocks[: index + 1])
        missing = len(blocks) - len(pages)
        if missing > self.allocator.num_free:
            self.allocator.free(pages)
            return
        for page in self.allocator.allocate(missing):
            pages.append(page)
            self._write(page, blocks[: len(pages)])
        self.owners.append((pages, blocks))

    @precondition(lambda self: self.owners and self.allocator.num_free)
    @rule(data=st.data(), block=st.integers(0, 1))
    def grow(self, data, block):
        pages, blocks = data.draw(st.sampled_from(self.owners))
        pages += self.allocator.allocate(1)
        blocks.append(block)
        self._write(pages[-1], blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def publish(self, data):
        pages, blocks = data.draw(st.sampled_from(self.owners))
        publish_all(self.allocator, pages, chain(*blocks))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def leave(self, data):
        pages, _ = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        self.allocator.free(pages)

    @rule()
    def forget(self):
        self.allocator.forget_prefixes()

    def _write(self, page, blocks):
        """A page that is written to belongs to one sequence only."""
        assert sum(page in pages for pages, blocks_of in self.owners) <= 1
        self.written[page] = tuple(blocks)

    @invariant()
    def every_page_is_owned_or_free(self):
        owned = {page for pages, _ in self.owners for page in pages}
        assert owned <= set(range(self.NUM_PAGES))
        assert len(owned) + self.allocator.num_free == self.NUM_PAGES

    @invariant()
    def owned_pages_hold_what_their_owner_wrote(self):
        for pages, blocks in self.owners:
            assert len(set(pages)) == len(pages)
            assert [self.written[page] for page in pages] == [tuple(blocks[: i + 1]) for i in range(len(blocks))]

    def teardown(self):
        for pages, _ in self.owners:
            self.allocator.free(pages)
        assert self.allocator.num_free == self.NUM_PAGES
        assert sorted(self.allocator.allocate(self.NUM_PAGES)) == list(range(self.NUM_PAGES))


TestNoPageIsLostOrOwnedTwiceOverThousandsOfSchedules = AnySchedule.TestCase
TestNoPageIsLostOrOwnedTwiceOverThousandsOfSchedules.settings = settings(
    max_examples=2000, stateful_step_count=30, deadline=None
)
