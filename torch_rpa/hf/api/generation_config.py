"""A transformers GenerationConfig as the engine's own parameters; what has no meaning here is refused."""

import numbers
import operator
from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedTokenizerBase

from torch_rpa.hf.engine.sampling import GREEDY, SamplingParams
from torch_rpa.hf.engine.stop_strings import StopStrings

# Fields the engine honours.
_HONOURED = {
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "do_sample", "temperature", "top_k", "top_p",
    "repetition_penalty", "eos_token_id", "stop_strings", "num_return_sequences",
}  # fmt: skip
# Fields that change nothing here: nothing is padded, nothing is compiled by transformers, and the assistant's
# settings matter only with an assistant model, which the engine does not take.
_WITHOUT_EFFECT = {
    "pad_token_id", "bos_token_id", "decoder_start_token_id", "disable_compile", "transformers_version",
    "early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size",
}  # fmt: skip
# Integers, and the least that each may be; for top_k that depends on whether anything is sampled.
_COUNTS = {
    "max_new_tokens": 1, "max_length": 1, "min_new_tokens": 0, "min_length": 0, "num_return_sequences": 1, "top_k": None
}  # fmt: skip
_NUMBERS = ("temperature", "top_p", "repetition_penalty")
# Values other than None, False, 0 and [] that mean "off".
_NEUTRAL = {"num_beams": 1, "use_cache": True, "encoder_repetition_penalty": 1.0, "typical_p": 1.0}


@dataclass(frozen=True)
class RequestParams:
    """What a request asks for, whatever its prompt; with no limit of new tokens it may fill the cache."""

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    stop_strings: StopStrings | None = None
    sampling: SamplingParams = GREEDY
    num_return_sequences: int = 1

    def for_prompt(self, num_prompt_tokens: int, max_tokens_per_seq: int) -> dict:
        """`Engine.add`'s keywords for a prompt of this length. max_new_tokens goes before max_length, as does the
        minimum of new tokens before that of all."""
        if self.max_new_tokens is not None:
            max_new_tokens = self.max_new_tokens
        elif self.max_length is not None:
            max_new_tokens = self.max_length - num_prompt_tokens
        else:  # the last token needs no place in the cache; a prompt that fills it all is refused by its size
            max_new_tokens = max(1, max_tokens_per_seq + 1 - num_prompt_tokens)
        min_new_tokens = self.min_new_tokens
        if min_new_tokens is None:
            min_new_tokens = (self.min_length or 0) - num_prompt_tokens
        return {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "stop_token_ids": self.stop_token_ids,
            "stop_strings": self.stop_strings,
            "sampling": self.sampling,
        }


def resolve(
    model,
    config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **overrides,
) -> RequestParams:
    """Overrides that are not None go first, then the config's fields, then model.generation_config, then
    transformers' defaults, as in `generate`.

    stop_strings need the tokenizer. Raises NotImplementedError that lists every field set to something the engine does
    not do, TypeError for a name that is no field, ValueError for a bad value.
    """
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config must be a transformers.GenerationConfig, got {type(config).__name__}")
    values = _checked_kinds(_merged(overrides, config, model.generation_config))
    refused = [f"{name}={value!r}" for name, value in values.items() if not _is_supported(name, value)]
    if refused:
        raise NotImplementedError(f"torch_rpa.hf does not support these generation settings: {', '.join(refused)}")
    return RequestParams(
        max_new_tokens=values["max_new_tokens"],
        max_length=values["max_length"],
        min_new_tokens=values["min_new_tokens"],
        min_length=values["min_length"],
        stop_token_ids=_stop_token_ids(values["eos_token_id"]),
        stop_strings=_stop_strings(values["stop_strings"], tokenizer),
        sampling=_sampling(values),
        num_return_sequences=values["num_return_sequences"] or 1,
    )


def _merged(overrides: dict, config: GenerationConfig | None, defaults: GenerationConfig) -> dict:
    fields = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    unknown = sorted(overrides.keys() - set(fields))
    if unknown:
        raise TypeError(
            f"torch_rpa.hf does not know the keywords {', '.join(unknown)}; see transformers.GenerationConfig"
        )
    values = {name: getattr(defaults, name, None) for name in fields}
    given = {name: getattr(config, name, None) for name in fields} if config is not None else {}
    for source in (given, overrides):
        values.update({name: value for name, value in source.items() if value is not None})
    return values


def _checked_kinds(values: dict) -> dict:
    """With counts as ints, whichever integers they were. ValueError, naming it, for a value of another kind."""
    values = dict(values)
    for name, least in _COUNTS.items():
        if values[name] is not None:
            values[name] = as_integer(name, values[name], least)
    for name in _NUMBERS:
        if values[name] is not None and not isinstance(values[name], numbers.Real):
            raise ValueError(f"{name}={values[name]!r} must be a number")
    return values


def as_integer(name: str, value: object, least: int | None = None) -> int:
    """The value as an int. ValueError, naming it, for what is none (True and False are none), or less than `least`."""
    is_integer = hasattr(type(value), "__index__") and not isinstance(value, bool)
    if not is_integer or (least is not None and value < least):
        wanted = "an integer" if least is None else f"an integer of at least {least}"
        raise ValueError(f"{name}={value!r} must be {wanted}")
    return operator.index(value)


def _is_supported(name: str, value: object) -> bool:
    return name in _HONOURED or name in _WITHOUT_EFFECT or not value or value == _NEUTRAL.get(name)


def _sampling(values: dict) -> SamplingParams:
    def given(name, default):
        return default if values[name] is None else values[name]

    penalty = given("repetition_penalty", 1.0)
    if not values["do_sample"]:  # temperature, top_k and top_p are for sampling only, as in transformers
        return SamplingParams(repetition_penalty=penalty)
    return SamplingParams(
        do_sample=True,
        temperature=given("temperature", 1.0),
        top_k=given("top_k", 50),  # transformers' default when sampling
        top_p=given("top_p", 1.0),
        repetition_penalty=penalty,
    )


def _stop_token_ids(eos_token_id: int | list[int] | None) -> frozenset[int]:
    """One id, several or none; negative ids mean none."""
    if eos_token_id is None:
        return frozenset()
    ids = eos_token_id if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
    ids = [as_integer("eos_token_id", token_id) for token_id in ids]
    return frozenset(token_id for token_id in ids if token_id >= 0)


def _stop_strings(strings: str | list[str] | None, tokenizer) -> StopStrings | None:
    if not strings:
        return None
    if tokenizer is None:
        raise ValueError(f"stop_strings={strings!r} need the keyword tokenizer=, to turn tokens into text")
    return StopStrings((strings,) if isinstance(strings, str) else tuple(strings), tokenizer)
