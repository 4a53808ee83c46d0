"""One request on its way through the engine: what it asks for, and how far it is."""

import time
from dataclasses import dataclass, field

import numpy as np

from torch_rpa.hf.engine.page_allocator import page_key
from torch_rpa.hf.engine.sampling import GREEDY, SampleRow, SamplingParams, TokenSet
from torch_rpa.hf.engine.stop_strings import StopStrings


@dataclass(eq=False)
class Sequence:
    """One request: its tokens, how many of them are in the cache, and the pages that hold them.

    vocab_size is needed only where it is not greedy all the way (`needs_sampling`). The times are
    time.perf_counter()'s; timestamps has one for each generated token.
    """

    request_id: str
    prompt_ids: list[int]
    max_new_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    stop_strings: StopStrings | None = None
    sampling: SamplingParams = GREEDY
    rng: np.random.Generator | None = None
    vocab_size: int = 0
    generated_tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_cached: int = 0
    pages: list[int] = field(default_factory=list)
    created_time: float = field(default_factory=time.perf_counter)
    started_time: float = -1.0  # when it left the queue
    timestamps: list[float] = field(default_factory=list)
    is_finished: bool = False
    _uniform: float | None = None
    _page_keys: list[bytes] = field(default_factory=list)
    _seen: TokenSet | None = None
    _num_seen: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.generated_tokens)

    @property
    def num_uncached(self) -> int:
        """Tokens still to be run: 1 while decoding, more while the prompt is being read (or read again)."""
        return self.num_tokens - self.num_cached

    @property
    def needs_sampling(self) -> bool:
        """Whether its next token is more than the most likely one."""
        return self.sampling != GREEDY or self._forbids_stop

    @property
    def _forbids_stop(self) -> bool:
        return len(self.generated_tokens) < self.min_new_tokens and bool(self.stop_token_ids)

    def append(self, token: int, logprob: float) -> None:
        """The next token of the answer; sets is_finished if it is the last one."""
        self._uniform = None
        self.generated_tokens.append(token)
        self.logprobs.append(logprob)
        self.timestamps.append(time.perf_counter())
        self.is_finished = (
            len(self.generated_tokens) >= self.max_new_tokens
            or token in self.stop_token_ids
            or (self.stop_strings is not None and self._completes_stop_string(self.stop_strings))
        )

    def tokens(self, start: int, count: int) -> list[int]:
        """`count` tokens of prompt and answer from position `start`."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.generated_tokens[start - num_prompt : start - num_prompt + count]
        return (self.prompt_ids[start : start + count] + self.generated_tokens)[:count]

    def page_keys(self, count: int, page_size: int) -> list[bytes]:
        """The keys of its first `count` full pages (`page_allocator.page_key`); each is computed once."""
        keys = self._page_keys
        while len(keys) < count:
            keys.append(page_key(keys[-1] if keys else b"", self.tokens(len(keys) * page_size, page_size)))
        return keys[:count]

    def sample_row(self) -> SampleRow:
        """What the next token's choice takes; the same until the token is there, however often its step is run."""
        if self._uniform is None:
            self._uniform = self.rng.random() if self.sampling.do_sample else 0.0
        return SampleRow(
            params=self.sampling,
            uniform=self._uniform,
            seen=self._seen_tokens() if self.sampling.repetition_penalty != 1 else None,
            forbidden=self._stop_tokens() if self._forbids_stop else None,
        )

    def _seen_tokens(self) -> TokenSet:
        self._seen = self._seen or TokenSet(self.vocab_size)
        self._seen.update(self.tokens(self._num_seen, self.num_tokens - self._num_seen))
        self._num_seen = self.num_tokens
        return self._seen

    def _stop_tokens(self) -> TokenSet:
        return TokenSet(self.vocab_size, (token for token in self.stop_token_ids if token < self.vocab_size))

    def _completes_stop_string(self, stop_strings: StopStrings) -> bool:
        count = min(stop_strings.num_tokens, self.num_tokens)
        return stop_strings.is_completed_by_last(self.tokens(self.num_tokens - count, count))
