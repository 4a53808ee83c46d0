"""One run of a manager: from the requests that it starts with to its end, with a thread of its own."""

import atexit
import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum

from torch_rpa.hf.api.gate import EngineGate
from torch_rpa.hf.api.loop import EngineLoop, described
from torch_rpa.hf.api.mailboxes import Mailboxes
from torch_rpa.hf.api.request_state import CANCELLED, RequestState

logger = logging.getLogger(__name__)

QUEUE_TIMEOUT = 10.0  # seconds that a request waits for a place in a full queue, as transformers' does
STOPPED = "the manager was stopped"


class Status(Enum):
    """A session goes through them in this order, and never back.

    NEW       takes requests, and runs none yet
    RUNNING   its thread has the engine
    STOPPING  takes no more requests; its thread answers those that it has, or fails them after a hard stop
    ENDED     the engine is given back; what was answered can still be read
    """

    NEW = 0
    RUNNING = 1
    STOPPING = 2
    ENDED = 3


class Session:
    """Requests from any thread on the way to one engine.

    fatal_error: what ended it before it was stopped.
    """

    def __init__(self, max_queue_size: int, indices: Iterator[int]) -> None:
        self.mailboxes = Mailboxes()
        self.status = Status.NEW
        self.fatal_error: BaseException | None = None
        self._indices = indices
        self._max_queue_size = max_queue_size
        self._changed = threading.Condition()  # guards all of the following, and the status
        self._new: deque[RequestState] = deque()
        self._cancelled: deque[RequestState] = deque()
        self._is_hard_stop = self._keeps_prefixes = False
        self._gate: EngineGate | None = None
        self._thread: threading.Thread | None = None

    # ---- From any thread ------------------------------------------------------------------------------------------

    def start(self, gate: EngineGate) -> None:
        """Take the engine and start the thread. RuntimeError if something else has the engine."""
        gate.claim(self)
        self._gate, self.status = gate, Status.RUNNING
        self._thread = threading.Thread(target=self._run, name="torch_rpa manager", daemon=True)
        atexit.register(self._leave_process)
        try:
            self._thread.start()
        except BaseException:
            self._end(EngineLoop(self.mailboxes), STOPPED)
            raise

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def add(self, request_id: str | None, make: Callable[[str, int], RequestState]) -> str:
        """Queue the request that `make` makes of its id and its number among all requests; its id.

        Raises ValueError for an id in use, TypeError for one that is no text, RuntimeError if the session takes no
        requests any more, queue.Full.
        """
        with self._changed:
            self._require_open()
            if not self._changed.wait_for(self._has_room_or_ends, QUEUE_TIMEOUT):
                raise queue.Full(f"{self._max_queue_size} requests wait to be taken, max_queue_size allows no more")
            self._require_open()
            request_id, index = self._identify(request_id)
            state = make(request_id, index)
            self.mailboxes.add(state)
            self._new.append(state)
            self._changed.notify_all()
        return request_id

    def cancel(self, request_id: str) -> None:
        """Give up the request that has this id now; that no request has it is no error."""
        with self._changed:
            state = self.mailboxes.find(request_id)
            if state is None:
                return
            with self.mailboxes.update(state):
                state.given_up = CANCELLED
            if not state.is_ended:
                self._cancelled.append(state)
                self._changed.notify_all()

    def stop(self, *, hard: bool, keep_prefixes: bool) -> None:
        """Take no more requests, and end after those that are there, or at once."""
        with self._changed:
            self._keeps_prefixes = keep_prefixes
            self._is_hard_stop = self._is_hard_stop or hard
            if self.status is Status.RUNNING:
                self.status = Status.STOPPING
            self._changed.notify_all()

    def join(self, timeout: float | None) -> None:
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning("the manager's thread did not end within %s s", timeout)

    def _require_open(self) -> None:
        if self.fatal_error is not None:
            raise RuntimeError("the manager has failed, and takes no requests") from self.fatal_error
        if self.status in (Status.STOPPING, Status.ENDED):
            raise RuntimeError("the manager is stopping, and takes no requests")

    def _has_room_or_ends(self) -> bool:
        has_room = not self._max_queue_size or len(self._new) < self._max_queue_size
        return has_room or self.status in (Status.STOPPING, Status.ENDED)

    def _identify(self, request_id: str | None) -> tuple[str, int]:
        """The request's id and number. Ids that a caller has given to requests of its own are passed over."""
        index = next(self._indices)
        if isinstance(request_id, str):
            return request_id, index
        if request_id is not None:
            raise TypeError(f"add_request: {request_id=} must be a text")
        while self.mailboxes.find(f"req_{index}") is not None:
            index = next(self._indices)
        return f"req_{index}", index

    # ---- The thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error, loop = STOPPED, EngineLoop(self.mailboxes)
        try:
            while not self._is_hard_stop:
                with self._gate.turn() as engine:
                    has_work = loop.turn(engine, *self._take_commands())
                if not has_work and not self._wait_for_commands():
                    break
        except BaseException as caught:
            logger.exception("the manager's thread failed; its requests fail with it")
            self.fatal_error, error = caught, described(caught)
        finally:
            self._end(loop, error)

    def _take_commands(self) -> tuple[list[RequestState], list[RequestState]]:
        """New requests, and cancelled ones, which were new before."""
        with self._changed:
            new, cancelled = list(self._new), list(self._cancelled)
            self._new.clear()
            self._cancelled.clear()
            self._changed.notify_all()  # there is room in the queue
            return new, cancelled

    def _wait_for_commands(self) -> bool:
        """Whether something came; else the session was stopped, and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._new or self._cancelled or self.status is Status.STOPPING)
            return bool(self._new or self._cancelled)

    def _end(self, loop: EngineLoop, error: str) -> None:
        """Fail what is left and give the engine back: each step of it is taken whatever another one raises."""
        with contextlib.ExitStack() as steps:  # the last one first
            steps.callback(atexit.unregister, self._leave_process)
            steps.callback(self.mailboxes.close)
            steps.callback(self._gate.give_back)
            steps.callback(self._clean_engine)
            steps.callback(loop.fail_all, error)
            steps.callback(self._fail_new, error)

    def _fail_new(self, error: str) -> None:
        with self._changed:
            self.status = Status.ENDED  # from here on no request is queued
            new, _ = self._take_commands()
        for state in new:
            with self.mailboxes.update(state):
                state.fail(error)

    def _clean_engine(self) -> None:
        with self._gate.turn() as engine:
            if self.fatal_error is not None:
                engine.reset()
            engine.end_session(keep_prefixes=self._keeps_prefixes)

    def _leave_process(self) -> None:
        """The interpreter ends: XLA must not run in a thread that is stopped in the middle of it.

        Whoever holds the session in a pause keeps it from running, too.
        """
        self.stop(hard=True, keep_prefixes=False)
        while self.is_running and not self._gate.is_paused:
            self._thread.join(0.1)
