"""What a session does with an engine, turn by turn: requests in, steps, progress out. It knows nothing of threads."""

from collections.abc import Iterable

from torch_rpa.hf.api.mailboxes import Mailboxes
from torch_rpa.hf.api.request_state import RequestState
from torch_rpa.hf.engine.engine import Engine, StepEvent
from torch_rpa.hf.engine.sequence import Sequence

# After so many failed steps in a row, without one that succeeded, the next would fail, too.
MAX_FAILED_STEPS = 3


class EngineLoop:
    """The requests that a session has given to the engine."""

    def __init__(self, mailboxes: Mailboxes) -> None:
        self._mailboxes = mailboxes
        self._states: dict[Sequence, RequestState] = {}

    def turn(self, engine: Engine, new: Iterable[RequestState], cancelled: Iterable[RequestState]) -> bool:
        """Take the new requests in, the cancelled ones out, and run a step: whether there is more to do.

        Raises what a step raised, the third time in a row; its requests have failed with it.
        """
        for state in new:
            self._admit(engine, state)
        for state in cancelled:
            self._cancel(engine, state)
        events = engine.step()
        for event in events:
            self._report(engine, event)
        if engine.num_failed_steps >= MAX_FAILED_STEPS:
            raise events[-1].error
        return engine.has_work

    def fail_all(self, error: str) -> None:
        """The session ends."""
        for state in self._states.values():
            with self._mailboxes.update(state):
                state.fail(error)
        self._states.clear()

    def _admit(self, engine: Engine, state: RequestState) -> None:
        try:
            state.sequence = state.request.add_to(engine)
        except Exception as error:
            with self._mailboxes.update(state):
                state.fail(described(error))
        else:
            self._states[state.sequence] = state

    def _cancel(self, engine: Engine, state: RequestState) -> None:
        if self._states.pop(state.sequence, None) is None:
            return  # it has ended meanwhile
        engine.cancel(state.sequence)
        with self._mailboxes.update(state):
            state.fail(state.given_up)

    def _report(self, engine: Engine, event: StepEvent) -> None:
        state = self._states[event.sequence]
        if event.is_finished:
            del self._states[event.sequence]
        with self._mailboxes.update(state):
            if event.error is None:
                state.progress()
            else:
                state.fail(described(event.error))
        if state.given_up:
            self._cancel(engine, state)


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
