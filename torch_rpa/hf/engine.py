"""Continuous batching: requests in, tokens out, one launch and one sync a step."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from torch_rpa.hf.config import EngineConfig
from torch_rpa.hf.page_allocator import PageAllocator, pages_for
from torch_rpa.hf.runner import ModelRunner
from torch_rpa.hf.sampling import GREEDY, SamplingParams
from torch_rpa.hf.scheduler import Scheduler
from torch_rpa.hf.sequence import Sequence


@dataclass(frozen=True)
class TokenEvent:
    """`token` was generated for `sequence`; with is_finished it was the last one."""

    sequence: Sequence
    token: int
    is_finished: bool


class Engine:
    """Runs any number of requests on one patched model. Not thread-safe: one thread calls add, step and
    reset.

    for event in engine.run(): ...      # after engine.add(...), possibly adding more on the way
    """

    def __init__(self, model, config: EngineConfig) -> None:
        self.config = config
        self.runner = ModelRunner(model, config)
        self.allocator = PageAllocator(self.runner.num_pages, prefix_caching=config.prefix_caching)
        self.scheduler = Scheduler(
            self.allocator,
            page_size=config.page_size,
            max_num_seqs=config.max_num_seqs,
            max_step_tokens=config.max_step_tokens,
        )
        self.num_steps = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def refusal(self, num_prompt_tokens: int, max_new_tokens: int) -> str | None:
        """Why a request of this size can never run, with the numbers; None if it can."""
        if num_prompt_tokens < 1:
            return "the prompt is empty"
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            return f"{max_new_tokens=} must be an integer of at least 1"
        total = num_prompt_tokens + max_new_tokens
        sizes = f"{num_prompt_tokens} prompt tokens + {max_new_tokens=} are {total} tokens"
        # The last generated token never enters the cache, hence total - 1 slots.
        needed_pages = pages_for(total - 1, self.config.page_size)
        if needed_pages > self.allocator.num_pages:
            return (
                f"{sizes}, which need {needed_pages} pages of {self.config.page_size}, but the cache has "
                f"num_pages={self.allocator.num_pages}"
            )
        if total - 1 > self.runner.max_tokens_per_seq:
            return f"{sizes}, but the model's max_position_embeddings is {self.runner.max_tokens_per_seq}"
        return None

    def add(
        self,
        prompt_ids: list[int],
        *,
        request_id: str,
        max_new_tokens: int,
        stop_token_ids: frozenset[int] = frozenset(),
        sampling: SamplingParams = GREEDY,
        seed: int | list[int] | None = None,
    ) -> Sequence:
        """Queue a request. `seed` fixes its sampled tokens, whatever else runs; None takes fresh entropy.

        Raises ValueError, with the numbers, for a request that can never run.
        """
        reason = self.refusal(len(prompt_ids), max_new_tokens)
        if reason is not None:
            raise ValueError(f"request {request_id}: {reason}")
        sequence = Sequence(
            request_id=request_id,
            prompt_ids=list(prompt_ids),
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            sampling=sampling,
            rng=None if sampling == GREEDY else np.random.default_rng(seed),
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[TokenEvent]:
        """One launch over every running sequence; the tokens it gave (none for an unfinished prompt)."""
        if self.runner.needs_new_cache:
            self.scheduler.restart()
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        tokens = self.runner.run(chunks)
        self.num_steps += 1
        events = []
        for chunk, token in zip(chunks, tokens, strict=True):
            sequence, samples = chunk.sequence, chunk.samples
            self.scheduler.advance(chunk)
            if samples:
                sequence.generated_tokens.append(token)
                events.append(TokenEvent(sequence, token, sequence.is_finished))
                if sequence.is_finished:
                    self.scheduler.remove(sequence)
        return events

    def run(self) -> Iterator[TokenEvent]:
        """Step until nothing is left. After an exception, or if the caller stops early, what is left stays queued
        until it is run again or dropped by `reset`; after an exception in a step only `reset` is safe."""
        while self.has_work:
            yield from self.step()

    def reset(self) -> None:
        """Drop all requests, free all pages, and let the cache go."""
        self.scheduler.clear()
        self.runner.drop_cache()
