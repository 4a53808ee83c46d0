"""From a caller's prompt to the engine, and from the engine to transformers' GenerationOutput."""

import operator
import reprlib
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from torch_rpa.hf._transformers import GenerationOutput, RequestStatus
from torch_rpa.hf.api.generation_config import RequestParams, as_integer
from torch_rpa.hf.engine.engine import Engine
from torch_rpa.hf.engine.sequence import Sequence


@dataclass(frozen=True)
class Request:
    """A prompt that has been checked, and what is asked for it."""

    request_id: str
    prompt_ids: list[int]
    params: RequestParams
    seed: int | list[int] | None = None

    def add_to(self, engine: Engine) -> Sequence:
        keywords = self.params.for_prompt(len(self.prompt_ids), engine.runner.max_tokens_per_seq)
        return engine.add(self.prompt_ids, request_id=self.request_id, seed=self.seed, **keywords)


def prompts_of(inputs: SequenceOf[SequenceOf[int]]) -> list[list[int]]:
    """Prompts as lists of ints. TypeError for anything else."""
    expected = 'inputs must be a list of lists of token ids, such as tokenizer(texts)["input_ids"]'
    if isinstance(inputs, (str, Mapping)):
        raise TypeError(f"{expected}, got {_short(inputs)}")
    return [_as_integers(prompt, f"{expected}; one of them is") for prompt in inputs]


def token_ids(prompt: SequenceOf[int]) -> list[int]:
    """A prompt as a list of ints. TypeError for anything else."""
    return _as_integers(prompt, 'input_ids must be a list of token ids, such as tokenizer(text)["input_ids"], got')


def _as_integers(prompt: SequenceOf[int], message: str) -> list[int]:
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise TypeError(f"{message} {_short(prompt)}") from error


def _short(value: object) -> str:
    """A value of plain types, shortened; the type of any other."""
    is_plain = isinstance(value, (str, int, float, list, tuple))
    return reprlib.repr(value) if is_plain else f"a {type(value).__name__}"


def refusal(engine: Engine, prompt_ids: list[int], params: RequestParams) -> str | None:
    """Why this request can never run, with the numbers; None if it can."""
    max_new_tokens = params.for_prompt(len(prompt_ids), engine.runner.max_tokens_per_seq)["max_new_tokens"]
    reason = engine.refusal(len(prompt_ids), max_new_tokens)
    if reason is not None and max_new_tokens < 1 and params.max_new_tokens is None:
        return f"{len(prompt_ids)} prompt tokens leave none of max_length={params.max_length}"
    vocab_size = engine.runner.model.config.vocab_size
    outside = [token for token in prompt_ids if not 0 <= token < vocab_size]
    if reason is None and outside:
        return f"token ids {outside[:5]} are outside the vocabulary of {vocab_size}"
    return reason


def check_seed(seed: int | None) -> None:
    if seed is not None:
        as_integer("seed", seed, least=0)


def request_seed(seed: int | None, index: int, copy: int = 0) -> list[int] | None:
    """The seed of request `index` of a call, and of its further return sequences: none like another's."""
    if seed is None:
        return None
    return [seed, index, copy] if copy else [seed, index]


def output_of(
    sequence: Sequence,
    *,
    status: RequestStatus = RequestStatus.FINISHED,
    num_tokens: int | None = None,
    error: str | None = None,
    logprobs: bool = False,
    timestamps: bool = False,
) -> GenerationOutput:
    """The sequence with its first num_tokens generated tokens (None: all), as lists of its own."""
    ended = sequence.timestamps[-1] if status == RequestStatus.FINISHED else -1
    return GenerationOutput(
        request_id=sequence.request_id,
        prompt_ids=list(sequence.prompt_ids),
        generated_tokens=sequence.generated_tokens[:num_tokens],
        logprobs=sequence.logprobs[:num_tokens] if logprobs else [],
        status=status,
        error=error,
        created_time=sequence.created_time,
        lifespan=(sequence.started_time, ended),
        timestamps=sequence.timestamps[:num_tokens] if timestamps else None,
    )
