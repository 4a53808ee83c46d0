"""A transformers GenerationConfig as the engine's own parameters; what has no meaning here is refused."""

import logging
import numbers
import operator
from dataclasses import dataclass
from functools import lru_cache

from transformers import GenerationConfig, PreTrainedTokenizerBase

from torch_rpa.hf.api import settings
from torch_rpa.hf.engine.sampling import GREEDY, SamplingParams
from torch_rpa.hf.engine.stop_strings import StopStrings
from torch_rpa.hf.names import unknown_names

logger = logging.getLogger(__name__)

# Integers, and the least that each may be; for top_k that depends on whether anything is sampled.
_COUNTS = {
    "max_new_tokens": 1, "max_length": 1, "min_new_tokens": 0, "min_length": 0, "num_return_sequences": 1, "top_k": None
}  # fmt: skip
_NUMBERS = ("temperature", "top_p", "repetition_penalty")
_FIELDS = [name for name in vars(GenerationConfig()) if not name.startswith("_")]


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
    not do (`settings` says which), TypeError for a name that is no field, ValueError for a bad value.
    """
    values = _checked_kinds(_accepted(model.generation_config, config, overrides))
    return RequestParams(
        max_new_tokens=values["max_new_tokens"],
        max_length=values["max_length"],
        min_new_tokens=values["min_new_tokens"],
        min_length=values["min_length"],
        stop_token_ids=frozenset(i for i in token_id_list("eos_token_id", values["eos_token_id"]) if i >= 0),
        stop_strings=_stop_strings(values["stop_strings"], tokenizer),
        sampling=_sampling(values),
        num_return_sequences=values["num_return_sequences"] or 1,
    )


def _accepted(defaults: GenerationConfig, config: GenerationConfig | None, overrides: dict) -> dict:
    """The value of every field, once nothing that was said is refused."""
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config must be a transformers.GenerationConfig, got {type(config).__name__}")
    _check_names(overrides)
    own = _said(defaults)
    given = (_said(config) if config is not None else {}) | {n: v for n, v in overrides.items() if v is not None}
    values = dict.fromkeys(_FIELDS) | {n: v for n, v in (own | given).items() if n in _FIELDS}
    said = {name: value for name, value in values.items() if value is not None}
    samples = bool(values["do_sample"])
    refused = settings.refused(said, settings.GENERATION, samples=samples) + _undefined(given, own)
    if refused:
        raise NotImplementedError(f"torch_rpa.hf does not support these generation settings: {', '.join(refused)}")
    if not samples:
        _warn_of_what_only_sampling_reads(given, own)
    return values


def _check_names(overrides: dict) -> None:
    if unknown := unknown_names(overrides, _FIELDS, settings.NAMES_ELSEWHERE):
        raise TypeError(f"torch_rpa.hf does not know the keywords {unknown}; see transformers.GenerationConfig")


def _said(config: GenerationConfig) -> dict:
    """The attributes that are set, among them those that GenerationConfig does not define."""
    return {n: v for n, v in vars(config).items() if v is not None and not n.startswith("_")}


def _undefined(given: dict, own: dict) -> list[str]:
    """What is refused because GenerationConfig does not define it: what the caller set, and of what stands on
    model.generation_config, which checkpoints fill with much that nobody reads, only names with a meaning elsewhere."""
    extra = {n: v for n, v in given.items() if n not in _FIELDS and not settings.is_same(v, own.get(n))}
    extra |= {name: own[name] for name in settings.NAMES_ELSEWHERE if name in own}
    hint = "GenerationConfig does not define it"
    return [
        f"{n}={v!r} ({hint}; {settings.NAMES_ELSEWHERE[n]})" if n in settings.NAMES_ELSEWHERE else f"{n}={v!r} ({hint})"
        for n, v in extra.items()
    ]


def _warn_of_what_only_sampling_reads(given: dict, own: dict) -> None:
    """Once for each text, as transformers does, and not for what the checkpoint says anyway."""
    unread = [
        f"{name}={given[name]!r}"
        for name, setting in settings.GENERATION.items()
        if setting.only_sampling and name in given
        if not setting.is_off(given[name]) and not settings.is_same(given[name], own.get(name))
    ]
    if unread:
        _warn_once(f"{', '.join(unread)} without do_sample=True: the most likely token is taken, whatever they say")


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    logger.warning(message)


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


def token_id_list(name: str, value: object) -> list[int]:
    """One token id or several, also in an array or a tensor; none for None. ValueError for anything else."""
    if value is None:
        return []
    value = value.tolist() if hasattr(value, "tolist") else value
    ids = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    return [as_integer(name, token_id) for token_id in ids]


def _stop_strings(strings: str | list[str] | None, tokenizer) -> StopStrings | None:
    if strings is None or not len(strings):
        return None
    if tokenizer is None:
        raise ValueError(f"stop_strings={strings!r} need the keyword tokenizer=, to turn tokens into text")
    return StopStrings((strings,) if isinstance(strings, str) else tuple(strings), tokenizer)
