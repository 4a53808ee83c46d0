"""Continuous batching: requests in, tokens out, one launch and one sync a step."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from tqdm.auto import tqdm

from torch_rpa.bridges import Interrupted
from torch_rpa.hf.engine.config import EngineConfig
from torch_rpa.hf.engine.page_allocator import PageAllocator, pages_for
from torch_rpa.hf.engine.runner import Lost, ModelRunner
from torch_rpa.hf.engine.sampling import GREEDY, SampleRow, SamplingParams
from torch_rpa.hf.engine.scheduler import Chunk, Scheduler
from torch_rpa.hf.engine.sequence import Sequence
from torch_rpa.hf.engine.stop_strings import StopStrings

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Steps that only decode between two looks at the model.
STEPS_BETWEEN_LOOKS = 7
# Of a step, by other code that computes on the device; in a row, after which it fails.
MAX_INTERRUPTIONS = 10


@dataclass(frozen=True)
class StepEvent:
    """What a step did for `sequence`: it generated `token`, or the request failed with `error`."""

    sequence: Sequence
    token: int | None = None
    error: Exception | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it is the last one for its sequence."""
        return self.error is not None or self.sequence.is_finished


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was made, and what stands now.

    prefix_hit_rate             share of the admitted tokens that shared pages held already, 0 to 1
    num_compilations            XLA programs that its steps have compiled
    compilations_after_warm_up  of these, after the last `warm_up`; None if there was none
    """

    num_steps: int
    num_running: int
    num_waiting: int
    num_finished: int
    num_cancelled: int
    num_failed: int
    num_preemptions: int
    prefix_hit_rate: float
    num_free_pages: int
    num_pages: int
    num_compilations: int
    compilations_after_warm_up: int | None


class Engine:
    """Runs any number of requests on one patched model. Not thread-safe: one thread calls its methods.

    for event in engine.run(): ...      # after engine.add(...), possibly adding more on the way
    """

    def __init__(self, model, config: EngineConfig) -> None:
        self.config = config = config.on(model.device)
        self.runner = ModelRunner(model, config)
        self.allocator = PageAllocator(self.runner.num_pages, prefix_caching=config.prefix_caching)
        self.scheduler = Scheduler(
            self.allocator,
            page_size=config.page_size,
            max_num_seqs=config.max_num_seqs,
            max_step_tokens=config.max_step_tokens,
        )
        self.num_steps = self._num_finished = self._num_cancelled = self._num_failed = 0
        self.num_failed_steps = self._num_interruptions = 0  # in a row
        self._steps_until_look = 0
        self._compilations_at_warm_up: int | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def is_warm(self) -> bool:
        """Whether every program has been compiled by `warm_up`."""
        return self._compilations_at_warm_up is not None

    @property
    def stats(self) -> EngineStats:
        compiled = self.runner.num_compilations
        return EngineStats(
            num_steps=self.num_steps,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_finished=self._num_finished,
            num_cancelled=self._num_cancelled,
            num_failed=self._num_failed,
            num_preemptions=self.scheduler.stats.num_preemptions,
            prefix_hit_rate=self.scheduler.stats.prefix_hit_rate,
            num_free_pages=self.allocator.num_free,
            num_pages=self.allocator.num_pages,
            num_compilations=compiled,
            compilations_after_warm_up=compiled - self._compilations_at_warm_up if self.is_warm else None,
        )

    def warm_up(self, progress_bar: bool = True) -> None:
        """Run every program that serving can need once, so that XLA compiles nothing afterwards."""
        self._forget_outdated()
        bar = tqdm(total=self.runner.num_programs, desc="Warming up", unit="program", disable=not progress_bar)
        with bar, self.reporting(lambda program: None):  # the bar names it already
            for name in self.runner.warm_up():
                bar.set_postfix_str(name)
                bar.update()
        self._compilations_at_warm_up = self.runner.num_compilations

    @contextmanager
    def reporting(self, before_compiling: Callable[[str], None]) -> Iterator[None]:
        """Inside the block this is called with the name of each program before it is compiled; nothing is logged."""
        former, self.runner.before_compiling = self.runner.before_compiling, before_compiling
        try:
            yield
        finally:
            self.runner.before_compiling = former

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
            limits_itself = self.config.max_seq_len == self.runner.max_tokens_per_seq
            limit = "max_seq_len" if limits_itself else "the model's max_position_embeddings"
            return f"{sizes}, but {limit} is {self.runner.max_tokens_per_seq}"
        return None

    def add(
        self,
        prompt_ids: list[int],
        *,
        request_id: str,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        stop_token_ids: frozenset[int] = frozenset(),
        stop_strings: StopStrings | None = None,
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
            min_new_tokens=min_new_tokens,
            stop_token_ids=stop_token_ids,
            stop_strings=stop_strings,
            sampling=sampling,
            rng=np.random.default_rng(seed) if sampling.do_sample else None,
            vocab_size=self.runner.model.config.vocab_size,
        )
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Take out a request that is waiting or running; its pages are free at once."""
        self.scheduler.remove(sequence)
        self._num_cancelled += 1

    def step(self) -> list[StepEvent]:
        """One launch over every running sequence: what it did for each (nothing for an unfinished prompt).

        What a request raises itself, such as its tokenizer, fails that request. What the launch raises fails those that
        were in it, and the cache is made anew: the others are computed again, with the same tokens.
        """
        if self._steps_until_look and self.scheduler.only_decodes:
            self._steps_until_look -= 1
        else:
            self._forget_outdated()
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        rows, failed = self._each(chunks, lambda chunk: chunk.sequence.sample_row() if chunk.samples else SampleRow())
        if not rows:
            return failed
        try:
            results = self.runner.run(list(rows), list(rows.values()))
        except Interrupted as error:
            return failed + self._interrupt_step(rows, error)
        except Exception as error:
            return failed + self._fail_step(rows, error)
        self.num_steps += 1
        self.num_failed_steps = self._num_interruptions = 0
        tokens = dict(zip(rows, results, strict=True))
        events, failed_after = self._each(tokens, lambda chunk: self._take_in(chunk, *tokens[chunk]))
        return [event for event in events.values() if event is not None] + failed + failed_after

    def _each(self, chunks: Iterable[Chunk], work: Callable[[Chunk], T]) -> tuple[dict[Chunk, T], list[StepEvent]]:
        """The work on each chunk by itself: its results, and an event for each request whose work raised."""
        results, failed = {}, []
        for chunk in chunks:
            try:
                results[chunk] = work(chunk)
            except Exception as error:
                failed.append(self._fail(chunk.sequence, error))
        return results, failed

    def _take_in(self, chunk: Chunk, token: int, logprob: float) -> StepEvent | None:
        """The chunk has run."""
        sequence = chunk.sequence
        self.scheduler.advance(chunk)
        if not chunk.samples:
            return None
        sequence.append(token, logprob)
        if sequence.is_finished:
            self.scheduler.remove(sequence)
            self._num_finished += 1
        return StepEvent(sequence, token)

    def _fail(self, sequence: Sequence, error: Exception) -> StepEvent:
        self.scheduler.remove(sequence)
        self._num_failed += 1
        return StepEvent(sequence, error=error)

    def _interrupt_step(self, chunks: Iterable[Chunk], error: Interrupted) -> list[StepEvent]:
        """Compute everything again, unless that is all that ever happens."""
        self._num_interruptions += 1
        if self._num_interruptions > MAX_INTERRUPTIONS:
            return self._fail_step(chunks, error)
        logger.info("a step was interrupted, and runs again: %s", error)
        self._drop_cache()
        return []

    def _fail_step(self, chunks: Iterable[Chunk], error: Exception) -> list[StepEvent]:
        logger.error("a step failed, and its requests with it", exc_info=error)
        self._drop_cache()
        self.num_failed_steps += 1
        self._num_interruptions = 0
        return [self._fail(chunk.sequence, error) for chunk in chunks]

    def _forget_outdated(self) -> None:
        """Look whether the model is still the one that the steps know.

        That is done before every step that reads a prompt, or may begin one, so that whoever changes the model and then
        asks gets the changed one's tokens; after a pause; and before every eighth step that only decodes.
        """
        lost = self.runner.forget_outdated()
        if lost is Lost.PAGES:
            self.scheduler.restart()
        elif lost is Lost.PREFIXES:
            self.forget_prefixes()
        self._steps_until_look = STEPS_BETWEEN_LOOKS

    def run(self) -> Iterator[StepEvent]:
        """Step until nothing is left, and raise the first error of a request. What is left then, or if the caller stops
        early, stays queued until it is run again or dropped by `end_session`."""
        while self.has_work:
            for event in self.step():
                if event.error is not None:
                    raise event.error
                yield event

    def _drop_cache(self) -> None:
        self.runner.drop_cache()
        self._steps_until_look = 0

    def forget_prefixes(self) -> None:
        """Share no page that was filled up to now, and look at the model anew: it may have changed."""
        self._steps_until_look = 0
        self.allocator.forget_prefixes()

    def end_session(self, *, keep_prefixes: bool = False) -> None:
        """Leave nothing behind for the next caller but, if asked for, the pages of prefixes. Requests that are left,
        because something was raised, maybe by Ctrl-C, are dropped with everything else."""
        self.num_failed_steps = 0
        if self.has_work:
            self.reset()
        elif not keep_prefixes:
            self.forget_prefixes()

    def reset(self) -> None:
        """Drop all requests, free all pages, and let the cache go."""
        self.scheduler.clear()
        self._drop_cache()
