"""Results on their way from the manager's thread to whoever asks for them."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable

from transformers.generation.continuous_batching.requests import GenerationOutput


class Outbox:
    """Outputs wait here until they are asked for, by request or in order, or go to a handler on an event loop."""

    def __init__(self) -> None:
        self._outputs: deque[GenerationOutput] = deque()
        self._handlers: dict[str, tuple[Callable, asyncio.AbstractEventLoop]] = {}
        self._changed = threading.Condition()
        self._is_closed = False

    def put(self, output: GenerationOutput) -> None:
        with self._changed:
            handler = self._handlers.get(output.request_id)
            if handler is None:
                self._outputs.append(output)
                self._changed.notify_all()
                return
            if output.is_finished():
                del self._handlers[output.request_id]
        callback, loop = handler
        loop.call_soon_threadsafe(callback, output)

    def get(self, request_id: str | None, timeout: float | None) -> GenerationOutput | None:
        """The oldest output (of this request); None if the time is up, or there will be none any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._find(request_id) is not None, timeout)
            output = self._find(request_id)
            if output is not None:
                self._outputs.remove(output)
            return output

    def register(self, request_id: str, callback: Callable, loop: asyncio.AbstractEventLoop) -> None:
        """Hand outputs of this request to the callback, on the loop; first those that wait here already."""
        with self._changed:
            waiting = [output for output in self._outputs if output.request_id == request_id]
            for output in waiting:
                self._outputs.remove(output)
                loop.call_soon_threadsafe(callback, output)
            if not any(output.is_finished() for output in waiting):
                self._handlers[request_id] = (callback, loop)

    def open(self) -> None:
        with self._changed:
            self._is_closed = False

    def close(self) -> None:
        """Nothing will be put any more: wake up whoever waits."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _find(self, request_id: str | None) -> GenerationOutput | None:
        return next((output for output in self._outputs if request_id in (None, output.request_id)), None)
