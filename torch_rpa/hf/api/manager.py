"""Serving: a thread that runs the engine, and requests, cancellations and results from any other thread.

The methods are those of transformers' ContinuousBatchingManager. Where they differ, nothing is lost silently: a request
that can never run is refused by `add_request`, and a cancelled one ends with an output that says so.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager

from transformers import GenerationConfig, PreTrainedModel

from torch_rpa.hf._transformers import ContinuousBatchingConfig, GenerationOutput
from torch_rpa.hf.api.batching_config import BatchingOptions, batching_options
from torch_rpa.hf.api.gate import EngineGate, engine_of, gate_of
from torch_rpa.hf.api.generation_config import RequestParams, resolve
from torch_rpa.hf.api.request_state import Handler, RequestState
from torch_rpa.hf.api.requests import Request, check_seed, refusal, request_seed, token_ids
from torch_rpa.hf.api.session import Session, Status
from torch_rpa.hf.engine.engine import EngineStats


class Manager:
    """Answers requests while they come, from any number of threads.

    manager = model.init_continuous_batching(); manager.start()
    request_id = manager.add_request(prompt_ids, max_new_tokens=64, streaming=True)
    for output in manager.request_id_iter(request_id): ...      # GenerationOutput, with all tokens so far
    manager.stop()

    The engine is the model's; while the manager runs, generate_batch and generate refuse. Each start is a session of
    its own: what was not read in one is gone with the start of the next.
    """

    def __init__(
        self, model: PreTrainedModel, generation_config: GenerationConfig | None, options: BatchingOptions
    ) -> None:
        check_seed(options.seed)
        resolve(model, generation_config)  # raises now for what every request would raise
        self.model = model
        self.generation_config = generation_config
        self._options = options
        self._indices = itertools.count()
        self._session = self._new_session()

    def _new_session(self) -> Session:
        return Session(self._options.max_queue_size, self._indices)

    @property
    def _gate(self) -> EngineGate:
        return gate_of(self.model)

    # ---- Sessions -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start to answer, those first that were added before. RuntimeError if this or another manager runs on the
        model."""
        if self._session.status is Status.ENDED:
            self._session = self._new_session()
        self._session.start(self._gate)

    def is_running(self) -> bool:
        return self._session.is_running

    @property
    def fatal_error(self) -> BaseException | None:
        """What ended the manager before it was stopped: three steps that failed in a row, mostly."""
        return self._session.fatal_error

    @property
    def background_thread_status(self) -> Session:
        """What has `fatal_error`, where transformers' servers look for it."""
        return self._session

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """End: after the requests that are there, or at once, and then they fail.

        Without keep_for_next_session the pages of common prefixes are forgotten. RuntimeError inside `pause`, where
        nothing could end.
        """
        if self._session.status is Status.NEW:
            return
        if block:
            self._gate.require_not_held("stop")
        self._session.stop(hard=hard_stop, keep_prefixes=keep_for_next_session)
        if block:
            self._session.join(timeout)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end after `stop`, at most `timeout` seconds. RuntimeError inside `pause`."""
        if self._session.status is not Status.NEW:
            self._gate.require_not_held("join")
            self._session.join(timeout)

    def destroy(self) -> None:
        self.stop(hard_stop=True)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Hold the engine between two steps, to change the model's weights in place; no request is lost.

        Afterwards no page filled before is shared with new requests. RuntimeError inside another `pause` of the same
        thread.
        """
        with self._gate.pause() as engine:
            try:
                yield
            finally:
                engine.forget_prefixes()

    def warmup(self, progress_bar: bool = True) -> None:
        """Compile every program that serving can need, before `start`."""
        warmup(self.model, progress_bar)

    @property
    def stats(self) -> EngineStats:
        """The engine's counters, such as free pages, prefix hits, preemptions, compilations after warm-up."""
        return engine_of(self.model).stats

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
        try:
            check_seed(seed)
            params = resolve(
                self.model,
                self.generation_config,
                tokenizer,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_token_id,
                **generation_kwargs,
            )
            prompt = self._checked_prompt(input_ids, params)

            def make(request_id: str, index: int) -> RequestState:
                own_seed = request_seed(self._options.seed, index) if seed is None else seed
                request = Request(request_id, prompt, params, own_seed)
                return RequestState(request, streaming, self._options.return_logprobs, record_timestamps)

            return self._session.add(request_id, make)
        except BaseException:
            self._session.mailboxes.forget_handler(request_id)
            raise

    def _checked_prompt(self, input_ids: SequenceOf[int], params: RequestParams) -> list[int]:
        if params.num_return_sequences > 1:
            raise NotImplementedError("add_request: num_return_sequences > 1; add the request several times instead")
        prompt = token_ids(input_ids)
        reason = refusal(engine_of(self.model), prompt, params)
        if reason is not None:
            raise ValueError(f"add_request: {reason}")
        return prompt

    def add_requests(self, inputs: SequenceOf[SequenceOf[int]], **kwargs) -> list[str]:
        """`add_request` for each prompt; their ids in that order. With a seed equal prompts get equal answers."""
        return [self.add_request(prompt, **kwargs) for prompt in inputs]

    def cancel_request(self, request_id: str) -> None:
        """End the request that has this id now, before the next step: its pages are free then, and its output has the
        error "cancelled". That it has ended already, or never was, is no error."""
        self._session.cancel(request_id)

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """The next output (of this request); None after `timeout` seconds, or if the manager has ended.

        Before `start`, nothing is waited for. RuntimeError inside `pause` if there is none and no timeout.
        """
        mailboxes = self._session.mailboxes
        output = mailboxes.take(request_id, 0)
        if output is not None or self._session.status is Status.NEW:
            return output
        if timeout is None:
            self._gate.require_not_held("get_result")
        return mailboxes.take(request_id, timeout)

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
        self._session.mailboxes.register(request_id, Handler(callback, asyncio.get_running_loop()))


def init_continuous_batching(
    model: PreTrainedModel,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints=None,
) -> Manager:
    """A `Manager` for this model, not started. workload_hints are not needed: the sizes are set by `patch`."""
    return Manager(model, generation_config, batching_options(continuous_batching_config, gate_of(model).config))


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
    with gate_of(model).exclusive("warmup") as engine:
        engine.warm_up(progress_bar)
