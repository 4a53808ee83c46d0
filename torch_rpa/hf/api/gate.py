"""Who may use a patched model's engine: one call at a time, or a manager's session, step by step."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from torch_rpa.hf.engine.config import EngineConfig
from torch_rpa.hf.engine.engine import Engine

if TYPE_CHECKING:
    from torch_rpa.hf.api.session import Session

_ATTRIBUTE = "_torch_rpa_gate"


class EngineGate:
    """Stands on a patched model and lets one thread at a time to its engine, which is made when it is first needed.

    A call holds the engine from its beginning to its end (`exclusive`). A session claims it (`claim`), which refuses
    calls, holds it for each of its turns (`turn`), and lets whoever pauses hold it in between (`pause`). Waiting for
    what this very thread holds would be for ever, so it is a RuntimeError at once.
    """

    def __init__(self, model: PreTrainedModel, config: EngineConfig) -> None:
        self.model = model
        self.config = config
        self._engine: Engine | None = None
        self._engine_lock = threading.Lock()
        self._changed = threading.Condition()
        self._holder: int | None = None  # the thread that uses the engine now
        self._session: Session | None = None
        self._num_pausing = 0

    def __getstate__(self) -> dict:
        """A copy or a pickle of a patched model is patched too, with an engine and a gate of its own."""
        return {"model": self.model, "config": self.config}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    @property
    def engine(self) -> Engine:
        with self._engine_lock:
            if self._engine is None:
                self._engine = Engine(self.model, self.config)
            return self._engine

    # ---- Calls ----------------------------------------------------------------------------------------------------

    @contextmanager
    def exclusive(self, caller: str) -> Iterator[Engine]:
        """The engine for one call, after other threads' calls; raises what `hold` raises."""
        with self.hold(caller):
            yield self.engine

    @contextmanager
    def hold(self, caller: str) -> Iterator[None]:
        """No engine for others. RuntimeError while a manager runs, inside `pause`, or if the model was patched anew."""
        self.require_no_session(caller)
        with self._changed:
            self._acquire(caller)
        try:
            self.require_no_session(caller)  # one may have started meanwhile
            if self.model.__dict__.get(_ATTRIBUTE) is not self:
                raise RuntimeError(f"{caller}: the model was patched anew, or unpatched, while this call waited")
            yield
        finally:
            self._release()

    def require_no_session(self, caller: str) -> None:
        """RuntimeError while a manager runs."""
        if self._session is not None:
            raise RuntimeError(f"{caller}: a manager runs on this model: give it the requests, or stop it first")

    def require_not_held(self, caller: str) -> None:
        """RuntimeError if this thread holds the engine, so that waiting for it would be for ever."""
        if self._holder == threading.get_ident():
            raise RuntimeError(f"{caller} inside pause, or inside a step, would wait for ever: leave it first")

    # ---- A manager's session --------------------------------------------------------------------------------------

    def claim(self, session: "Session") -> None:
        """The engine is this session's until `give_back`. RuntimeError if it is another one's, or inside `pause`."""
        with self.hold("start"):
            self._session = session

    def give_back(self) -> None:
        with self._changed:
            self._session = None

    @contextmanager
    def turn(self) -> Iterator[Engine]:
        """The engine for one turn of the session's thread, once nobody pauses it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_pausing)
            self._acquire("a step")
        try:
            yield self.engine
        finally:
            self._release()

    @contextmanager
    def pause(self) -> Iterator[Engine]:
        """The engine between two turns of the session, or two calls."""
        self.require_not_held("pause")
        with self._changed, self._turns_held_back():
            self._acquire("pause")
            self._num_pausing += 1
        try:
            yield self.engine
        finally:
            with self._changed:
                self._num_pausing -= 1
                self._release()

    @contextmanager
    def _turns_held_back(self) -> Iterator[None]:
        """No turn begins while this thread waits for its pause, however the wait ends."""
        self._num_pausing += 1
        try:
            yield
        finally:
            self._num_pausing -= 1
            self._changed.notify_all()

    @property
    def is_paused(self) -> bool:
        return self._num_pausing > 0

    # ---- Under the condition --------------------------------------------------------------------------------------

    def _acquire(self, caller: str) -> None:
        self.require_not_held(caller)
        self._changed.wait_for(lambda: self._holder is None)
        self._holder = threading.get_ident()

    def _release(self) -> None:
        with self._changed:
            self._holder = None
            self._changed.notify_all()


def attach_gate(model: PreTrainedModel, config: EngineConfig) -> EngineGate:
    gate = model.__dict__[_ATTRIBUTE] = EngineGate(model, config)
    return gate


def detach_gate(model: PreTrainedModel) -> None:
    del model.__dict__[_ATTRIBUTE]


def gate_of(model: PreTrainedModel) -> EngineGate:
    """RuntimeError if the model is not patched."""
    gate = model.__dict__.get(_ATTRIBUTE)
    if gate is None:
        raise RuntimeError("this model is not patched: call torch_rpa.hf.patch(model) first")
    return gate


def engine_of(model: PreTrainedModel) -> Engine:
    """The patched model's engine, for callers that want the tokens as they come (`engine.run()`)."""
    return gate_of(model).engine
