"""Who owns which page of the KV cache, and which full pages can be shared by requests with a common prefix.

A page is always in exactly one of three places:

    free       nobody owns it, and what it holds means nothing
    owned      by one sequence, or by several that share it
    reusable   nobody owns it, but it still holds a known prefix; the least recently used one is taken first

Only full pages are ever published, and a full page is never written again, so that a page that is written to
belongs to one sequence only. The scheme is vLLM's automatic prefix caching; the record of a page nano-vllm's.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that num_tokens tokens fill."""
    return -(-num_tokens // page_size)


def page_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """What a full page holds: its tokens and, through its parent's key, every token before them (b"" for none).

    SHA-256, so that two prefixes never share a key by accident: that would be a wrong answer.
    """
    return hashlib.sha256(parent + np.asarray(token_ids, np.int32).tobytes()).digest()


@dataclass
class Page:
    """num_owners sequences own it; `key` says what it holds, once that is published."""

    num_owners: int = 0
    key: bytes | None = None


class PageAllocator:
    """Hands out page numbers 0 .. num_pages - 1 and counts their owners.

    Without prefix_caching nothing is ever published, and `share` finds nothing.
    """

    def __init__(self, num_pages: int, *, prefix_caching: bool = True) -> None:
        self.num_pages = num_pages
        self.prefix_caching = prefix_caching
        self._pages = [Page() for _ in range(num_pages)]
        # Taken from the end, so that page 0 goes first and just freed pages are used again while in caches.
        self._free = list(range(num_pages - 1, -1, -1))
        self._reusable: dict[int, None] = {}  # a dict for its order: the least recently used page stands first
        self._number_of: dict[bytes, int] = {}  # of each published key

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can give: free or reusable."""
        return len(self._free) + len(self._reusable)

    def allocate(self, count: int) -> list[int]:
        """`count` pages that nobody owns. Raises ValueError if fewer are free; then nothing is taken."""
        if not 0 <= count <= self.num_free:
            raise ValueError(f"allocate: {count=} of {self.num_free} free pages ({self.num_pages} in all)")
        numbers = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for number in numbers:
            self._pages[number].num_owners = 1
        return numbers

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest known run of keys from the first on, each with one owner more."""
        numbers = []
        for key in keys:
            number = self._number_of.get(key)
            if number is None:
                break
            self._reusable.pop(number, None)
            self._pages[number].num_owners += 1
            numbers.append(number)
        return numbers

    def publish(self, number: int, key: bytes) -> None:
        """An owned page is full and computed: others may share it. A prefix that is known already stays where it is."""
        page = self._pages[number]
        if not page.num_owners:
            raise ValueError(f"publish: page {number} is owned by nobody")
        if self.prefix_caching and key not in self._number_of and page.key is None:
            self._number_of[key] = number
            page.key = key

    def free(self, numbers: Iterable[int]) -> None:
        """One owner less for each page. Raises ValueError, and frees nothing, if one is not owned or stands there
        twice."""
        numbers = list(numbers)
        if len(set(numbers)) < len(numbers) or not all(self._is_owned(number) for number in numbers):
            raise ValueError(f"free: {numbers} holds a page twice, or one that nobody owns (freed twice?)")
        for number in reversed(numbers):  # a prefix is worth more than what follows it, which is of no use without it
            page = self._pages[number]
            page.num_owners -= 1
            if not page.num_owners:
                if page.key is None:
                    self._free.append(number)
                else:
                    self._reusable[number] = None

    def forget_prefixes(self) -> None:
        """Nothing published so far may be shared any more: the pages' contents are gone, or wrong."""
        self._free.extend(self._reusable)
        self._reusable.clear()
        for number in self._number_of.values():
            self._pages[number].key = None
        self._number_of.clear()

    def _is_owned(self, number: int) -> bool:
        return 0 <= number < self.num_pages and self._pages[number].num_owners > 0

    def _evict(self) -> int:
        number = next(iter(self._reusable))
        del self._reusable[number]
        page = self._pages[number]
        del self._number_of[page.key]
        page.key = None
        return number
