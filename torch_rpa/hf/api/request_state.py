"""A request on its way through a session: how far it is, what nobody has read of it yet, and who gave it up."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass

from torch_rpa.hf._transformers import GenerationOutput, RequestStatus
from torch_rpa.hf.api.requests import Request, output_of
from torch_rpa.hf.engine.sequence import Sequence

CANCELLED = "cancelled"
LOOP_CLOSED = "cancelled: the event loop of its handler is closed"


@dataclass(frozen=True)
class Handler:
    """Calls `callback` on an asyncio event loop."""

    callback: Callable[[GenerationOutput], None]
    loop: asyncio.AbstractEventLoop

    def call(self, output: GenerationOutput) -> bool:
        """False if the loop is closed, so that nobody will ever be called."""
        try:
            self.loop.call_soon_threadsafe(self.callback, output)
        except RuntimeError:
            return False
        return True


@dataclass(eq=False)
class RequestState:
    """What `Mailboxes` hands out of one request.

    An output is made when it is read, from the one list of tokens that the sequence has. So a stream that nobody reads
    keeps a number, `num_tokens_read`, and no copies.

    sequence        its place in the engine, once it has one
    num_tokens      tokens that may be read; all of the sequence's, once it has ended
    status, error   of the last output
    given_up        why nobody wants its answer any more, if so; what is left of it is the last output, with that error
    """

    request: Request
    streaming: bool = False
    logprobs: bool = False
    timestamps: bool = False
    handler: Handler | None = None
    sequence: Sequence | None = None
    num_tokens: int = 0
    num_tokens_read: int = 0
    status: RequestStatus = RequestStatus.PENDING
    error: str | None = None
    given_up: str | None = None
    is_read: bool = False  # the last output, too
    changed: threading.Condition | None = None  # for its readers

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def is_ended(self) -> bool:
        return self.status in (RequestStatus.FINISHED, RequestStatus.FAILED)

    def progress(self) -> None:
        """The engine has another token of it, maybe the last."""
        self.num_tokens = len(self.sequence.generated_tokens)
        self.status = RequestStatus.FINISHED if self.sequence.is_finished else RequestStatus.DECODING

    def fail(self, error: str) -> None:
        if self.sequence is not None:
            self.num_tokens = len(self.sequence.generated_tokens)
        self.status, self.error = RequestStatus.FAILED, error

    @property
    def has_output(self) -> bool:
        return not self.is_read and (self.is_ended or (self.streaming and self.num_tokens_read < self.num_tokens))

    def next_output(self) -> GenerationOutput:
        """The next of its outputs: one for each token while it streams, then the last one; `has_output` says so."""
        is_last = self.is_ended and not self._has_tokens_before_the_last
        self.is_read = is_last
        self.num_tokens_read = self.num_tokens if is_last else self.num_tokens_read + 1
        if self.sequence is None:
            return GenerationOutput(self.request_id, self.request.prompt_ids, status=self.status, error=self.error)
        return output_of(
            self.sequence,
            num_tokens=self.num_tokens_read,
            status=self.status if is_last else RequestStatus.DECODING,
            error=self.error if is_last else None,
            logprobs=self.logprobs,
            timestamps=self.timestamps,
        )

    @property
    def _has_tokens_before_the_last(self) -> bool:
        finishes = self.status == RequestStatus.FINISHED  # after a failure the last output comes at once
        return self.streaming and finishes and self.num_tokens_read + 1 < self.num_tokens
