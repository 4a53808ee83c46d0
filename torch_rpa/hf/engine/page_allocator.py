"""Who owns which page of the KV cache, and which full pages can be shared by requests with a common prefix.

A page is always in exactly one of three places:

    free       nobody owns it, and what it holds means nothing
    owned      by one sequence, or by several that share it (counted references)
    reusable   nobody owns it, but it still holds a known prefix; the least recently used one is taken first

Only full pages are ever published, and a full page is never written again, so that a page that is written to
belongs to one sequence only. The scheme is vLLM's automatic prefix caching; the size that of nano-vllm.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that num_tokens tokens fill."""
    return -(-num_tokens // page_size)


def page_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """What a full page holds: its tokens and, through its parent's key, every token before them (b"" for none).

    SHA-256, so that two prefixes never share a key by accident: that would be a wrong answer.
    """
    return hashlib.sha256(parent + np.asarray(token_ids, np.int32).tobytes()).digest()


class PageAllocator:
    """Hands out page numbers 0 .. num_pages - 1 and counts their owners.

    Without prefix_caching nothing is ever published, and `share` finds nothing.
    """

    def __init__(self, num_pages: int, *, prefix_caching: bool = True) -> None:
        self.num_pages = num_pages
        self.prefix_caching = prefix_caching
        # Taken from the end, so that page 0 goes first and just freed pages are used again while in caches.
        self._free = list(range(num_pages - 1, -1, -1))
        self._references: dict[int, int] = {}
        self._reusable: dict[int, None] = {}  # a dict for its order: the least recently used page stands first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can give: free or reusable."""
        return len(self._free) + len(self._reusable)

    def allocate(self, count: int) -> list[int]:
        """`count` pages that nobody owns. Raises ValueError if fewer are free; then nothing is taken."""
        if not 0 <= count <= self.num_free:
            raise ValueError(f"allocate: {count=} of {self.num_free} free pages ({self.num_pages} in all)")
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        self._references.update(dict.fromkeys(pages, 1))
        return pages

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest known run of keys from the first on, each with one owner more."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._reusable.pop(page, None)
            self._references[page] = self._references.get(page, 0) + 1
            pages.append(page)
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """An owned page is full and computed: others may share it. A prefix that is known already stays where it is."""
        if page not in self._references:
            raise ValueError(f"publish: page {page} is owned by nobody")
        if self.prefix_caching and key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def free(self, pages: Iterable[int]) -> None:
        """One owner less for each page. Raises ValueError, and frees nothing, if one is not owned or stands there
        twice."""
        pages = list(pages)
        if len(set(pages)) < len(pages) or not self._references.keys() >= set(pages):
            raise ValueError(f"free: {pages} holds a page twice, or one that nobody owns (freed twice?)")
        for page in reversed(pages):  # a prefix is worth more than what follows it, which is of no use without it
            self._references[page] -= 1
            if not self._references[page]:
                del self._references[page]
                if page in self._key_of:
                    self._reusable[page] = None
                else:
                    self._free.append(page)

    def forget_prefixes(self) -> None:
        """Nothing published so far may be shared any more: the pages' contents are gone, or wrong."""
        self._free.extend(self._reusable)
        self._reusable.clear()
        self._page_of.clear()
        self._key_of.clear()

    def _evict(self) -> int:
        page = next(iter(self._reusable))
        del self._reusable[page]
        del self._page_of[self._key_of.pop(page)]
        return page
