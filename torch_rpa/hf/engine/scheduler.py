"""Which sequences run in the next step, and how many tokens of each.

The shape of it (a waiting queue, a running list, a page allocator beside it) follows nano-vllm's scheduler.
"""

import time
from collections import deque
from dataclasses import dataclass, field

from torch_rpa.hf.engine.page_allocator import PageAllocator, pages_for
from torch_rpa.hf.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """`num_tokens` tokens of `sequence` from position `start` on, to be run in one step."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def samples(self) -> bool:
        """Whether the sequence's last token is in it, so that its logits give the next one."""
        return self.end == self.sequence.num_tokens


@dataclass
class SchedulerStats:
    """Counters since the engine was made.

    admitted_tokens  tokens that waited to be run when their request was admitted (or admitted again)
    shared_tokens    of these, tokens whose pages another request had filled already
    """

    num_preemptions: int = 0
    admitted_tokens: int = 0
    shared_tokens: int = 0

    @property
    def prefix_hit_rate(self) -> float:
        """The share of admitted tokens that were not computed again, 0 to 1."""
        return self.shared_tokens / max(self.admitted_tokens, 1)


@dataclass(eq=False)
class Scheduler:
    """First come, first served, in steps of at most `max_step_tokens` tokens and `max_num_seqs` sequences.

    A sequence is admitted when there are pages for all its tokens so far and one more page for each running
    sequence. While it decodes it takes page after page; when none is left, the newest sequence gives all of its
    pages back, waits at the head of the queue and is computed again later. The oldest one can so always go on,
    and a request that fits the cache alone is always answered.

    `running` is in order of arrival: sequences are admitted in that order, and only the last one is preempted.
    """

    allocator: PageAllocator
    page_size: int
    max_num_seqs: int
    max_step_tokens: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    stats: SchedulerStats = field(default_factory=SchedulerStats)

    def __post_init__(self) -> None:
        if self.max_step_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_step_tokens={self.max_step_tokens} must be at least max_num_seqs={self.max_num_seqs}"
            )

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def only_decodes(self) -> bool:
        """Whether the next step has a token of each running sequence, and no prompt."""
        return not self.waiting and all(sequence.num_uncached == 1 for sequence in self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step: one token of each decoding sequence first, then prompts as far as the budget goes."""
        num_preemptions = self.stats.num_preemptions
        plan = self._reserve_pages(self._share_budget())
        if self.stats.num_preemptions == num_preemptions:
            self._admit(plan)
        return [Chunk(sequence, sequence.num_cached, num_tokens) for sequence, num_tokens in plan.items()]

    def advance(self, chunk: Chunk) -> None:
        """The chunk has run: its tokens are in the cache, and others may share the pages that it filled."""
        sequence = chunk.sequence
        sequence.num_cached = chunk.end
        if self.allocator.prefix_caching:
            for index in range(chunk.start // self.page_size, chunk.end // self.page_size):
                self.allocator.publish(sequence.pages[index], sequence.page_keys(index + 1, self.page_size)[index])

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or cancelled sequence out and free its pages; its place is filled in the next step."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)

    def restart(self) -> None:
        """The cache's contents are gone: compute everything again that is not finished."""
        while self.running:
            self._preempt_newest()
        self.allocator.forget_prefixes()

    def clear(self) -> None:
        """Forget every sequence, waiting or running, and every prefix, and free all pages."""
        for sequence in self.running:
            self._release(sequence)
        self.running.clear()
        self.waiting.clear()
        self.allocator.forget_prefixes()

    def _share_budget(self) -> dict[Sequence, int]:
        """Tokens of each running sequence in the next step."""
        plan, budget = {}, self.max_step_tokens
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_uncached > 1):
            num_tokens = min(sequence.num_uncached, budget)
            if num_tokens:
                plan[sequence] = num_tokens
                budget -= num_tokens
        return plan

    def _reserve_pages(self, plan: dict[Sequence, int]) -> dict[Sequence, int]:
        """Give each sequence of the plan the pages it writes to, the oldest first; without those preempted."""
        for sequence in list(self.running):
            if sequence not in plan:
                continue
            end = sequence.num_cached + plan[sequence]
            while sequence in plan and (missing := self._missing_pages(sequence, end)):
                if missing <= self.allocator.num_free:
                    sequence.pages += self.allocator.allocate(missing)
                else:
                    plan.pop(self._preempt_newest(), None)
        return plan

    def _missing_pages(self, sequence: Sequence, num_tokens: int) -> int:
        return max(0, pages_for(num_tokens, self.page_size) - len(sequence.pages))

    def _preempt_newest(self) -> Sequence:
        sequence = self.running.pop()
        self._release(sequence)
        sequence.num_cached = 0
        self.waiting.appendleft(sequence)
        self.stats.num_preemptions += 1
        return sequence

    def _admit(self, plan: dict[Sequence, int]) -> None:
        budget = self.max_step_tokens - sum(plan.values())
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self._start(sequence):
                return  # strictly in order: a large request is not overtaken for ever by small ones
            self.running.append(self.waiting.popleft())
            plan[sequence] = min(sequence.num_uncached, budget)
            budget -= plan[sequence]

    def _start(self, sequence: Sequence) -> bool:
        """Give it pages for all its tokens so far, shared ones as far as they are known. False: not enough are free."""
        # The last token is always run, for its logits.
        keys = sequence.page_keys((sequence.num_tokens - 1) // self.page_size, self.page_size)
        sequence.pages = self.allocator.share(keys)
        missing = self._missing_pages(sequence, sequence.num_tokens)
        if missing + len(self.running) > self.allocator.num_free:
            self._release(sequence)
            return False
        sequence.num_cached = len(sequence.pages) * self.page_size
        sequence.pages += self.allocator.allocate(missing)
        sequence.started_time = time.perf_counter()
        self.stats.admitted_tokens += sequence.num_tokens
        self.stats.shared_tokens += sequence.num_cached
        return True

    def _release(self, sequence: Sequence) -> None:
        pages, sequence.pages = sequence.pages, []
        self.allocator.free(pages)
