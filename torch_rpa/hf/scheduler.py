"""Which sequences run in the next step, and how many tokens of each.

The shape of it (a waiting queue, a running list, a block manager beside it) follows nano-vllm's scheduler.
"""

import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from torch_rpa.hf.cache import PageAllocator, pages_for
from torch_rpa.hf.sampling import GREEDY, SamplingParams


@dataclass(eq=False)
class Sequence:
    """One request: its tokens, how many of them are in the cache, and the pages that hold them."""

    request_id: str
    prompt_ids: list[int]
    max_new_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    sampling: SamplingParams = GREEDY
    rng: np.random.Generator | None = None
    generated_tokens: list[int] = field(default_factory=list)
    num_cached: int = 0
    pages: list[int] = field(default_factory=list)
    created_time: float = field(default_factory=time.perf_counter)
    started_time: float = -1.0  # when it left the queue

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.generated_tokens)

    @property
    def num_uncached(self) -> int:
        """Tokens still to be run: 1 while decoding, more while the prompt is being read."""
        return self.num_tokens - self.num_cached

    @property
    def max_cached(self) -> int:
        """Cache slots it can ever fill: the last token it generates is never run."""
        return len(self.prompt_ids) + self.max_new_tokens - 1

    @property
    def is_finished(self) -> bool:
        generated = self.generated_tokens
        return len(generated) >= self.max_new_tokens or (bool(generated) and generated[-1] in self.stop_token_ids)

    def tokens(self, start: int, count: int) -> list[int]:
        """`count` tokens of prompt and answer from position `start`."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.generated_tokens[start - num_prompt : start - num_prompt + count]
        return (self.prompt_ids[start:] + self.generated_tokens)[:count]


@dataclass(frozen=True)
class Chunk:
    """`num_tokens` tokens of `sequence` from position `start` on, to be run in one step."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the sequence's last token is in it, so that its logits give the next one."""
        return self.start + self.num_tokens == self.sequence.num_tokens


class Scheduler:
    """First come, first served, in steps of at most `max_step_tokens` tokens and `max_num_seqs` sequences.

    A sequence is admitted only when pages for its whole prompt and answer can be reserved, so a running
    sequence never lacks a page and nothing is ever preempted. (Preemption would admit earlier, reserve page
    by page in `schedule`, and move the newest sequence back to `waiting` when none is left.)
    """

    def __init__(self, allocator: PageAllocator, *, page_size: int, max_num_seqs: int, max_step_tokens: int) -> None:
        if max_step_tokens < max_num_seqs:
            raise ValueError(f"{max_step_tokens=} must be at least {max_num_seqs=}")
        self.allocator = allocator
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step: one token of each decoding sequence first, then prompts as far as the budget goes."""
        self._admit()
        chunks, budget = [], self.max_step_tokens
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_uncached > 1):
            num_tokens = min(sequence.num_uncached, budget)
            if num_tokens == 0:
                break
            chunks.append(Chunk(sequence, sequence.num_cached, num_tokens))
            budget -= num_tokens
        return chunks

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out and free its pages; its place is filled in the next step."""
        self.running.remove(sequence)
        self._release(sequence)

    def clear(self) -> None:
        """Forget every sequence, waiting or running, and free all their pages."""
        for sequence in self.running:
            self._release(sequence)
        self.running.clear()
        self.waiting.clear()

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            needed_pages = pages_for(self.waiting[0].max_cached, self.page_size)
            if needed_pages > self.allocator.num_free:
                return  # strictly in order: a large request is not overtaken for ever by small ones
            sequence = self.waiting.popleft()
            sequence.pages = self.allocator.allocate(needed_pages)
            sequence.started_time = time.perf_counter()
            self.running.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        pages, sequence.pages = sequence.pages, []
        self.allocator.free(pages)
