"""Serving: a thread that runs the engine, and requests, cancellations and results from any other thread.

The methods are those of transformers' ContinuousBatchingManager. Where they differ, nothing is lost silently: a request
that can never run is refused by `add_request`, and a cancelled one ends with an output that says so.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from torch_rpa.hf.api.batching_config import BatchingOptions, batching_options
from torch_rpa.hf.api.generation_config import resolve
from torch_rpa.hf.api.outbox import Outbox
from torch_rpa.hf.api.requests import Request, check_seed, output_of, refusal, request_seed, token_ids
from torch_rpa.hf.api.state import engine_of, exclusive_engine, state_of
from torch_rpa.hf.engine.engine import Engine, EngineStats
from torch_rpa.hf.engine.sequence import Sequence

logger = logging.getLogger(__name__)

CANCELLED = "cancelled"
QUEUE_TIMEOUT = 10.0  # seconds that add_request waits for a place in a full queue, as transformers' does


@dataclass
class _Job:
    """A request on its way; `sequence` is set once the engine has it."""

    request: Request
    streaming: bool
    record_timestamps: bool
    sequence: Sequence | None = None


class Manager:
    """Answers requests while they come, from any number of threads.

    manager = model.init_continuous_batching(); manager.start()
    request_id = manager.add_request(prompt_ids, max_new_tokens=64, streaming=True)
    for output in manager.request_id_iter(request_id): ...      # GenerationOutput, with all tokens so far
    manager.stop()

    The engine is the model's; while the manager runs, generate_batch and generate refuse.
    """

    def __init__(
        self, model: PreTrainedModel, generation_config: GenerationConfig | None, options: BatchingOptions
    ) -> None:
        check_seed(options.seed)
        resolve(model, generation_config)  # raises now for what every request would raise
        self.model = model
        self.generation_config = generation_config
        self.fatal_error: BaseException | None = None
        self._options = options
        self._state = state_of(model)
        self._engine: Engine = engine_of(model)
        self._new: queue.Queue[_Job] = queue.Queue(maxsize=options.max_queue_size)
        self._cancelled: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._jobs: dict[str, _Job] = {}  # in the engine; the thread's own
        self._outbox = Outbox()
        self._thread: threading.Thread | None = None
        self._wake_up = threading.Event()
        self._ids_lock = threading.Lock()
        self._num_requests = 0
        self._active_ids: set[str] = set()
        self._resume = threading.Condition()
        self._pausing: list[int] = []  # identifiers of threads
        self._stopping = self._hard_stopping = self._keep_prefixes = self._has_ended = False

    # ---- The thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread. RuntimeError if this or another manager runs on the model."""
        with exclusive_engine(self.model):
            self._state.has_manager = True
        self.fatal_error = None
        self._stopping = self._hard_stopping = self._has_ended = False
        self._outbox.open()
        self._thread = threading.Thread(target=self._run, name="torch_rpa manager", daemon=True)
        self._thread.start()

    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """End the thread: after the requests that it has, or at once, and then they fail.

        Without keep_for_next_session the pages of common prefixes are forgotten. RuntimeError inside `pause`, where
        the thread could not end.
        """
        if self._thread is None:
            return
        if block and threading.get_ident() in self._pausing:
            raise RuntimeError("stop inside pause would wait for ever: the thread is held; leave pause first")
        self._keep_prefixes = keep_for_next_session
        self._stopping, self._hard_stopping = True, hard_stop or self._hard_stopping
        self._wake_up.set()
        if block:
            self.join(timeout)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread to end after `stop`, at most `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                logger.warning("the manager's thread did not end within %s s", timeout)

    def destroy(self) -> None:
        self.stop(hard_stop=True)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Hold the thread between two steps, to change the model's weights in place; no request is lost.

        Afterwards no page filled before is shared with new requests.
        """
        thread = threading.get_ident()
        with self._resume:
            self._pausing.append(thread)
        try:
            with self._state.lock:
                yield
                self._engine.forget_prefixes()
        finally:
            with self._resume:
                self._pausing.remove(thread)
                self._resume.notify_all()

    def warmup(self, progress_bar: bool = True) -> None:
        """Compile every program that serving can need, before `start`."""
        warmup(self.model, progress_bar)

    @property
    def stats(self) -> EngineStats:
        """The engine's counters, such as free pages, prefix hits, preemptions, compilations after warm-up."""
        return self._engine.stats

    # ---- Requests, from any thread ------------------------------------------------------------------------------

    def add_request(
        self,
        input_ids: SequenceOf[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        tokenizer=None,
        seed: int | None = None,
        **generation_kwargs,
    ) -> str:
        """Queue a request and give its id. With streaming there is an output for each token, else one at the end.

        generation_kwargs: fields of a GenerationConfig, which go before the manager's; stop_strings need the
        tokenizer. seed fixes what is sampled, whatever else runs.

        Raises ValueError, with the numbers, for a request that can never run; RuntimeError if the manager is
        stopping or has failed; queue.Full if the queue stays full for 10 seconds.
        """
        self._check_open()
        check_seed(seed)
        params = resolve(
            self.model,
            self.generation_config,
            tokenizer,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            **generation_kwargs,
        )
        if params.num_return_sequences > 1:
            raise NotImplementedError("add_request: num_return_sequences > 1; add the request several times instead")
        prompt = token_ids(input_ids)
        reason = refusal(self._engine, prompt, params)
        if reason is not None:
            raise ValueError(f"add_request: {reason}")
        request_id, index = self._take_id(request_id)
        seed = request_seed(self._options.seed, index) if seed is None else seed
        self._enqueue(_Job(Request(request_id, prompt, params, seed), streaming, record_timestamps))
        return request_id

    def add_requests(self, inputs: SequenceOf[SequenceOf[int]], **kwargs) -> list[str]:
        """`add_request` for each prompt; their ids in that order."""
        return [self.add_request(prompt, **kwargs) for prompt in inputs]

    def cancel_request(self, request_id: str) -> None:
        """End a request before the next step: its pages are free then, and its output has the error "cancelled"."""
        self._cancelled.put(request_id)
        self._wake_up.set()

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """The next output (of this request); None after `timeout` seconds, or if the manager has ended."""
        if self._thread is None:
            timeout = 0
        return self._outbox.get(request_id, timeout)

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Outputs as they come, until the manager has ended."""
        while (output := self.get_result()) is not None:
            yield output

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:
        """This request's outputs as they come; the last one is finished."""
        while (output := self.get_result(request_id)) is not None:
            yield output
            if output.is_finished():
                return

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], None]) -> None:
        """Call `callback` on the running asyncio event loop for each output of this request, instead of queueing it."""
        self._outbox.register(request_id, callback, asyncio.get_running_loop())

    def _check_open(self) -> None:
        if self.fatal_error is not None:
            raise RuntimeError("the manager has failed, and takes no requests") from self.fatal_error
        if self._stopping:
            raise RuntimeError("the manager is stopping, and takes no requests")

    def _take_id(self, request_id: str | None) -> tuple[str, int]:
        """The request's id and its number among all requests. ValueError if another one has this id now."""
        with self._ids_lock:
            index = self._num_requests
            request_id = f"req_{index}" if request_id is None else request_id
            if request_id in self._active_ids:
                raise ValueError(f"add_request: {request_id=} is the id of a request that has not ended")
            self._active_ids.add(request_id)
            self._num_requests += 1
            return request_id, index

    def _enqueue(self, job: _Job) -> None:
        try:
            self._new.put(job, timeout=QUEUE_TIMEOUT)
        except queue.Full:
            self._active_ids.discard(job.request.request_id)
            raise
        self._wake_up.set()
        if self._has_ended:  # between the check and the put
            self._fail_new("the manager was stopped")

    # ---- What the thread does -----------------------------------------------------------------------------------

    def _run(self) -> None:
        error = "the manager was stopped"
        try:
            while not self._hard_stopping:
                self._wait_while_paused()
                with self._state.lock:
                    self._take_commands()
                    has_work = self._engine.has_work
                    if has_work:
                        self._step()
                if not has_work:
                    if self._stopping and self._new.empty():
                        break
                    self._wake_up.wait()
                    self._wake_up.clear()
        except BaseException as caught:
            logger.exception("the manager's thread failed; its requests fail with it")
            self.fatal_error, error = caught, f"{type(caught).__name__}: {caught}"
        finally:
            self._end(error)

    def _wait_while_paused(self) -> None:
        with self._resume:
            self._resume.wait_for(lambda: not self._pausing)

    def _take_commands(self) -> None:
        # Before the new requests, and carried out after them: what is cancelled was added before.
        cancelled = _drain(self._cancelled)
        for job in _drain(self._new):
            job.sequence = job.request.add_to(self._engine)
            self._jobs[job.request.request_id] = job
        for request_id in cancelled:
            job = self._jobs.pop(request_id, None)  # one that has ended already is no error
            if job is not None:
                self._engine.cancel(job.sequence)
                self._deliver(job, CANCELLED)

    def _step(self) -> None:
        for event in self._engine.step():
            job = self._jobs[event.sequence.request_id]
            if event.is_finished:
                del self._jobs[event.sequence.request_id]
            if event.is_finished or job.streaming:
                self._deliver(job)

    def _deliver(self, job: _Job, error: str | None = None) -> None:
        request = job.request
        if job.sequence is None:
            output = GenerationOutput(request.request_id, request.prompt_ids, status=RequestStatus.FAILED, error=error)
        else:
            logprobs, timestamps = self._options.return_logprobs, job.record_timestamps
            output = output_of(job.sequence, logprobs=logprobs, timestamps=timestamps, error=error)
        if output.is_finished():
            self._active_ids.discard(request.request_id)
        self._outbox.put(output)

    def _end(self, error: str) -> None:
        """Fail what is left and give the engine back."""
        self._has_ended = True
        self._fail_new(error)
        while self._jobs:
            self._deliver(self._jobs.popitem()[1], error)
        with self._state.lock:
            self._engine.end_session(keep_prefixes=self._keep_prefixes)
            self._state.has_manager = False
        self._outbox.close()

    def _fail_new(self, error: str) -> None:
        for job in _drain(self._new):
            self._deliver(job, error)


def _drain(source: queue.Queue | queue.SimpleQueue) -> list:
    items = []
    with contextlib.suppress(queue.Empty):
        while True:
            items.append(source.get_nowait())
    return items


def init_continuous_batching(
    model: PreTrainedModel,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints=None,
) -> Manager:
    """A `Manager` for this model, not started. workload_hints are not needed: the sizes are set by `patch`."""
    return Manager(model, generation_config, batching_options(continuous_batching_config))


@contextmanager
def continuous_batching_context_manager(
    model: PreTrainedModel,
    generation_config: GenerationConfig | None = None,
    block: bool = True,
    timeout: float | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    persistent_manager: bool = False,
    warmup: bool = True,
    workload_hints=None,
) -> Iterator[Manager]:
    """A running `Manager`, warmed up first, and stopped at the end with `block` and `timeout` as `Manager.stop` takes
    them; persistent_manager keeps the pages of common prefixes."""
    manager = init_continuous_batching(model, generation_config, continuous_batching_config)
    if warmup and not engine_of(model).is_warm:
        manager.warmup()
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=block, timeout=timeout, keep_for_next_session=persistent_manager)


def warmup(model: PreTrainedModel, progress_bar: bool = True) -> None:
    """Run every program that serving can need once: two for each token bucket, and one more. On an XLA device that
    compiles them, and no request compiles anything afterwards."""
    with exclusive_engine(model) as engine:
        engine.warm_up(progress_bar)
