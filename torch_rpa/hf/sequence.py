"""One request on its way through the engine."""

import time
from dataclasses import dataclass, field

import numpy as np

from torch_rpa.hf.page_allocator import page_key
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
    started_time: float = -1.0  # when it left the queue for the first time
    _page_keys: list[bytes] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.generated_tokens)

    @property
    def num_uncached(self) -> int:
        """Tokens still to be run: 1 while decoding, more while the prompt is being read (or read again)."""
        return self.num_tokens - self.num_cached

    @property
    def is_finished(self) -> bool:
        generated = self.generated_tokens
        return len(generated) >= self.max_new_tokens or (bool(generated) and generated[-1] in self.stop_token_ids)

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
