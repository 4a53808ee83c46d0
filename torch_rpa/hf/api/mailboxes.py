"""Outputs on their way from a session's thread to whoever asks for them, a mailbox for each request."""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch_rpa.hf._transformers import GenerationOutput
from torch_rpa.hf.api.request_state import LOOP_CLOSED, Handler, RequestState

# Of requests that were cancelled, so many last outputs can still be read; and so many handlers wait for their request.
MAX_GIVEN_UP = 256
MAX_HANDLERS = 4096


class Mailboxes:
    """The requests of a session that have not ended, or whose outputs were not all read; thread-safe.

    Every change of a request's state goes through `update`, which wakes up its readers or calls its handler. Readers of
    other requests are not woken up, and finding a mailbox takes the same time however many there are.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._states: dict[str, RequestState] = {}
        self._with_output: OrderedDict[RequestState, None] = OrderedDict()  # the one that has waited longest first
        self._given_up: OrderedDict[RequestState, None] = OrderedDict()
        self._handlers: OrderedDict[str, Handler] = OrderedDict()  # of requests that are still to come
        self._has_more = threading.Condition(self._lock)  # for readers of any request
        self._has_added = threading.Condition(self._lock)  # for readers of one that is still to come
        self._is_closed = False

    # ---- From the session -----------------------------------------------------------------------------------------

    def add(self, state: RequestState) -> None:
        """ValueError if another request has its id and has not ended, or has an answer that was not read."""
        with self._lock:
            self._require_free(state.request_id)
            state.handler = self._handlers.pop(state.request_id, None)
            state.changed = threading.Condition(self._lock)
            self._states[state.request_id] = state
            self._has_added.notify_all()

    def find(self, request_id: str) -> RequestState | None:
        with self._lock:
            return self._states.get(request_id)

    @contextmanager
    def update(self, state: RequestState) -> Iterator[None]:
        """Change a request's state in here. Whoever waits for it sees all of the change, or nothing."""
        with self._lock:
            yield
            if state.handler is not None:
                self._call_handler(state)
            if state.is_ended and state.given_up:
                self._keep_for_a_while(state)
            self._announce(state)

    def forget_handler(self, request_id: str) -> None:
        """Its request was refused."""
        with self._lock:
            self._handlers.pop(request_id, None)

    def close(self) -> None:
        """Nothing will come any more: wake up whoever waits. What is there can still be read."""
        with self._lock:
            self._is_closed = True
            waited_for = [state.changed for state in self._states.values()]
            for condition in (self._has_more, self._has_added, *waited_for):
                condition.notify_all()

    # ---- From readers ---------------------------------------------------------------------------------------------

    def take(self, request_id: str | None, timeout: float | None) -> GenerationOutput | None:
        """The next output (of this request); None if the time is up, or there will be none any more."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while (output := self._take_now(request_id)) is None and not self._is_closed:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._condition_for(request_id).wait(left)
            return output

    def register(self, request_id: str, handler: Handler) -> None:
        """Hand outputs of this request to the handler; first those that wait here already."""
        with self._lock:
            state = self._states.get(request_id)
            if state is not None:
                with self.update(state):
                    state.handler = handler
                return
            for key in [key for key, waiting in self._handlers.items() if waiting.loop.is_closed()]:
                del self._handlers[key]
            self._handlers[request_id] = handler
            if len(self._handlers) > MAX_HANDLERS:
                self._handlers.popitem(last=False)

    # ---- Under the lock -------------------------------------------------------------------------------------------

    def _require_free(self, request_id: str) -> None:
        state = self._states.get(request_id)
        if state is None:
            return
        if not state.is_ended:
            raise ValueError(f"add_request: {request_id=} is the id of a request that has not ended")
        if not state.given_up:
            raise ValueError(f"add_request: {request_id=} is the id of a request whose answer has not been read")
        self._forget(state)

    def _condition_for(self, request_id: str | None) -> threading.Condition:
        if request_id is None:
            return self._has_more
        return self._states[request_id].changed if request_id in self._states else self._has_added

    def _take_now(self, request_id: str | None) -> GenerationOutput | None:
        state = next(iter(self._with_output), None) if request_id is None else self._states.get(request_id)
        if state is None or not state.has_output:
            return None
        output = state.next_output()
        self._with_output.pop(state, None)
        self._announce(state)
        return output

    def _announce(self, state: RequestState) -> None:
        """Where the state stands now: to be read, or read to its end."""
        if state.is_read:
            self._forget(state)
        elif state.has_output and state.handler is None:
            self._with_output[state] = None
            state.changed.notify_all()
            self._has_more.notify_all()

    def _call_handler(self, state: RequestState) -> None:
        while state.has_output:
            if not state.handler.call(state.next_output()):
                state.handler, state.given_up = None, LOOP_CLOSED
                return

    def _keep_for_a_while(self, state: RequestState) -> None:
        self._given_up[state] = None
        if len(self._given_up) > MAX_GIVEN_UP:
            self._forget(next(iter(self._given_up)))

    def _forget(self, state: RequestState) -> None:
        if self._states.get(state.request_id) is state:
            del self._states[state.request_id]
        self._with_output.pop(state, None)
        self._given_up.pop(state, None)
        state.changed.notify_all()
