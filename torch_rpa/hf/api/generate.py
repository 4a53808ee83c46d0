"""`model.generate_batch`, in the shape that transformers gives it."""

from collections.abc import Sequence as SequenceOf

from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from torch_rpa.hf._transformers import ContinuousBatchingConfig, GenerationOutput
from torch_rpa.hf.api.batching_config import batching_options
from torch_rpa.hf.api.gate import gate_of
from torch_rpa.hf.api.generation_config import RequestParams, resolve
from torch_rpa.hf.api.requests import Request, check_seed, output_of, prompts_of, refusal, request_seed
from torch_rpa.hf.engine.engine import Engine


def generate_batch(
    model: PreTrainedModel,
    inputs: SequenceOf[SequenceOf[int]],
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    record_timestamps: bool = False,
    progress_bar: bool = False,
    persistent_manager: bool = False,
    warmup: bool = False,
    *,
    tokenizer=None,
    seed: int | None = None,
    **generation_kwargs,
) -> dict[str, GenerationOutput]:
    """Answer all prompts in ragged batches; request ids "req_0", "req_1", ... in the order of the inputs.

    inputs              lists of token ids; of any lengths, no padding, none empty
    generation_config   do_sample, temperature, top_k, top_p, repetition_penalty, eos_token_id (one or several),
                        stop_strings, max_new_tokens, max_length, min_new_tokens, min_length and
                        num_return_sequences are honoured; unset fields are filled as `model.generate` does
    continuous_batching_config  return_logprobs and seed are honoured; sizes are set by `patch`
    record_timestamps   fill each output's `timestamps`, one for each token
    progress_bar        a tqdm bar of finished requests
    persistent_manager  keep the pages of common prefixes for the next call; the weights must not change until then
    warmup              compile every program first, if that has not been done yet
    tokenizer           needed for stop_strings
    seed                fixes what is sampled: request i draws from numpy's default_rng([seed, i]), whatever else
                        is in the batch; None takes fresh entropy
    generation_kwargs   fields of the generation config, which go before it, such as max_new_tokens

    generated_tokens include the stop token, as transformers' do; further sequences of request "req_0" are
    "req_0__child#0", ..., before it. The model is put into eval mode. All pages are free again afterwards, also
    after an exception or KeyboardInterrupt.

    Raises before anything runs: ValueError for empty or oversized requests (all of them, with their numbers) or
    token ids outside the vocabulary; NotImplementedError for settings the engine does not have; TypeError for
    unknown keywords; RuntimeError while a manager runs on the model.
    """
    options = batching_options(continuous_batching_config, gate_of(model).config)
    seed = options.seed if seed is None else seed
    check_seed(seed)
    prompts = prompts_of(inputs)
    if not prompts:
        return {}
    params = resolve(model, generation_config, tokenizer, **generation_kwargs)
    with gate_of(model).exclusive("generate_batch") as engine:
        _check(engine, prompts, params)
        if warmup and not engine.is_warm:
            engine.warm_up(progress_bar)
        try:
            sequences = [request.add_to(engine) for request in _requests(prompts, params, seed)]
            _run(engine, len(sequences), progress_bar)
        finally:
            engine.end_session(keep_prefixes=persistent_manager)
    return {
        sequence.request_id: output_of(sequence, logprobs=options.return_logprobs, timestamps=record_timestamps)
        for sequence in sequences
    }


def _requests(prompts: list[list[int]], params: RequestParams, seed: int | None) -> list[Request]:
    """In the order of the results: children before their parent."""
    num_children = params.num_return_sequences - 1
    requests = []
    for index, prompt in enumerate(prompts):
        for child in range(num_children):
            requests.append(
                Request(f"req_{index}__child#{child}", prompt, params, request_seed(seed, index, child + 1))
            )
        requests.append(Request(f"req_{index}", prompt, params, request_seed(seed, index)))
    return requests


def _run(engine: Engine, num_requests: int, progress_bar: bool) -> None:
    description = f"Solving {num_requests} requests"
    with tqdm(total=num_requests, disable=not progress_bar, desc=description, unit="request") as bar:
        for event in engine.run():
            if event.is_finished:
                bar.update(1)


def _check(engine: Engine, prompts: list[list[int]], params: RequestParams) -> None:
    reasons = [refusal(engine, prompt, params) for prompt in prompts]
    problems = [f"inputs[{index}]: {reason}" for index, reason in enumerate(reasons) if reason is not None]
    if problems:
        raise ValueError("generate_batch: " + "; ".join(problems))
