"""`model.generate_batch`, in the shape that transformers gives it."""

import operator
import time
from collections.abc import Sequence as SequenceOf

from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from torch_rpa.hf.engine import Engine
from torch_rpa.hf.generation_config import RequestParams, resolve
from torch_rpa.hf.sequence import Sequence
from torch_rpa.hf.state import engine_of, state_of

# Keywords of transformers' own generate_batch that have no meaning here, and what to do instead.
_NO_MEANING = {
    "continuous_batching_config": "the engine's settings are torch_rpa.hf.patch's arguments",
    "persistent_manager": "the engine and its cache always live until unpatch",
    "warmup": "there are no CUDA graphs to capture; a token bucket is compiled at its first step",
}


def generate_batch(
    model: PreTrainedModel,
    inputs: SequenceOf[SequenceOf[int]],
    generation_config: GenerationConfig | None = None,
    *,
    max_new_tokens: int | None = None,
    record_timestamps: bool = False,
    progress_bar: bool = False,
    seed: int | None = None,
    **unsupported,
) -> dict[str, GenerationOutput]:
    """Answer all prompts in ragged batches; request ids "req_0", "req_1", ... in the order of the inputs.

    inputs             lists of token ids; of any lengths, no padding, none empty
    generation_config  do_sample, temperature, top_k, top_p, eos_token_id (one or several), max_new_tokens and
                       max_length are honoured; unset fields are filled as `model.generate` does
    max_new_tokens     goes before the config's
    record_timestamps  fill each output's `timestamps`, one for each token
    progress_bar       a tqdm bar of finished requests
    seed               fixes what is sampled: request i draws from numpy's default_rng([seed, i]), whatever else
                       is in the batch; None takes fresh entropy

    generated_tokens include the stop token, as transformers' do. The model is put into eval mode. All pages
    are free again afterwards, also after an exception or KeyboardInterrupt.

    Raises before anything runs: ValueError for empty or oversized requests (all of them, with their numbers),
    token ids outside the vocabulary, or no limit on the new tokens; NotImplementedError for generation
    settings the engine does not have; TypeError for unknown keywords.
    """
    _refuse_keywords(unsupported)
    if seed is not None and operator.index(seed) < 0:
        raise ValueError(f"generate_batch: {seed=} must be None or an integer of at least 0")
    prompts = [_token_ids(prompt) for prompt in inputs]
    if not prompts:
        return {}
    params = resolve(model, generation_config, max_new_tokens)
    model.eval()
    with state_of(model).lock:  # one call at a time: requests of another thread would end up in this result
        engine = engine_of(model)
        _check_requests(engine, prompts, params, model.config.vocab_size)
        try:
            sequences = _add_requests(engine, prompts, params, seed)
            outputs = _run(engine, sequences, record_timestamps, progress_bar)
        finally:
            if engine.has_work:  # something was raised, maybe by Ctrl-C
                engine.reset()
    return {sequence.request_id: outputs[sequence.request_id] for sequence in sequences}


def _add_requests(engine: Engine, prompts: list[list[int]], params: RequestParams, seed: int | None) -> list[Sequence]:
    return [
        engine.add(
            prompt,
            request_id=f"req_{index}",
            max_new_tokens=params.new_tokens_for(len(prompt)),
            stop_token_ids=params.stop_token_ids,
            sampling=params.sampling,
            seed=None if seed is None else [seed, index],
        )
        for index, prompt in enumerate(prompts)
    ]


def _run(engine: Engine, sequences: list[Sequence], timed: bool, progress_bar: bool) -> dict[str, GenerationOutput]:
    timestamps: dict[str, list[float]] = {sequence.request_id: [] for sequence in sequences}
    outputs = {}
    description = f"Solving {len(sequences)} requests"
    with tqdm(total=len(sequences), disable=not progress_bar, desc=description, unit="request") as bar:
        for event in engine.run():
            request_id = event.sequence.request_id
            timestamps[request_id].append(time.perf_counter())
            if event.is_finished:
                outputs[request_id] = _output(event.sequence, timestamps[request_id], timed)
                bar.update(1)
    return outputs


def _output(sequence: Sequence, timestamps: list[float], timed: bool) -> GenerationOutput:
    return GenerationOutput(
        request_id=sequence.request_id,
        prompt_ids=sequence.prompt_ids,
        generated_tokens=sequence.generated_tokens,
        status=RequestStatus.FINISHED,
        created_time=sequence.created_time,
        lifespan=(sequence.started_time, timestamps[-1]),
        timestamps=timestamps if timed else None,
    )


def _token_ids(prompt: SequenceOf[int]) -> list[int]:
    try:
        if isinstance(prompt, str):
            raise TypeError("text is not token ids")
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise TypeError(
            f"generate_batch: inputs must be a list of lists of token ids; one of them is {prompt!r}"
        ) from error


def _check_requests(engine: Engine, prompts: list[list[int]], params: RequestParams, vocab_size: int) -> None:
    problems = []
    for index, prompt in enumerate(prompts):
        max_new_tokens = params.new_tokens_for(len(prompt))
        reason = engine.refusal(len(prompt), max_new_tokens)
        if reason is not None and max_new_tokens < 1 and params.max_new_tokens is None:
            reason = f"{len(prompt)} prompt tokens leave none of max_length={params.max_length}"
        outside = [token for token in prompt if not 0 <= token < vocab_size]
        if reason is None and outside:
            reason = f"token ids {outside[:5]} are outside the vocabulary of {vocab_size}"
        if reason is not None:
            problems.append(f"inputs[{index}]: {reason}")
    if problems:
        raise ValueError("generate_batch: " + "; ".join(problems))


def _refuse_keywords(unsupported: dict) -> None:
    if unsupported:
        unknown = "unknown; sampling settings go into generation_config=GenerationConfig(...)"
        hints = [f"{name} ({_NO_MEANING.get(name, unknown)})" for name in unsupported]
        raise TypeError("generate_batch of a model patched by torch_rpa.hf does not take: " + "; ".join(hints))
