"""A transformers GenerationConfig as the engine's own parameters; what has no meaning here is refused."""

import operator
from dataclasses import dataclass

from transformers import GenerationConfig

from torch_rpa.hf.sampling import GREEDY, SamplingParams

# Fields the engine honours.
_HONOURED = {"max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "eos_token_id"}
# Fields that change nothing here: nothing is padded, nothing is compiled by transformers, and the assistant's
# settings matter only with an assistant model, which generate_batch does not take.
_WITHOUT_EFFECT = {
    "pad_token_id", "bos_token_id", "decoder_start_token_id", "disable_compile", "transformers_version",
    "early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size",
}  # fmt: skip
# Values other than None, False, 0 and [] that mean "off".
_NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "use_cache": True, "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0, "typical_p": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class RequestParams:
    """What one call of generate_batch asks of each request; one of the two limits may be None."""

    max_new_tokens: int | None
    max_length: int | None
    stop_token_ids: frozenset[int]
    sampling: SamplingParams

    def new_tokens_for(self, num_prompt_tokens: int) -> int:
        """The limit of generated tokens for a prompt of this length."""
        return self.max_length - num_prompt_tokens if self.max_new_tokens is None else self.max_new_tokens


def resolve(model, config: GenerationConfig | None, max_new_tokens: int | None) -> RequestParams:
    """Fields left None come from model.generation_config, then from transformers' defaults, as in `generate`.

    The keyword max_new_tokens goes before the config's, and max_new_tokens before max_length. Raises
    NotImplementedError that lists every field set to something the engine does not do, ValueError for a bad
    value.
    """
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(
            f"generate_batch: generation_config must be a transformers.GenerationConfig, got {type(config).__name__}"
        )
    values = _merged(config, model.generation_config)
    refused = [f"{name}={value!r}" for name, value in values.items() if not _is_supported(name, value)]
    if refused:
        raise NotImplementedError(f"generate_batch does not support these generation settings: {', '.join(refused)}")
    if max_new_tokens is None:
        max_new_tokens = values["max_new_tokens"]
    if max_new_tokens is None and values["max_length"] is None:
        raise ValueError(
            "generate_batch: max_new_tokens is not given, and the generation config has neither max_new_tokens nor "
            "max_length; pages are reserved for the whole answer, so a limit is needed"
        )
    return RequestParams(
        max_new_tokens, values["max_length"], _stop_token_ids(values["eos_token_id"]), _sampling(values)
    )


def _merged(config: GenerationConfig | None, defaults: GenerationConfig) -> dict:
    fields = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    values = {name: getattr(defaults, name, None) for name in fields}
    given = {name: getattr(config, name, None) for name in fields} if config is not None else {}
    values.update({name: value for name, value in given.items() if value is not None})
    return values


def _is_supported(name: str, value: object) -> bool:
    return name in _HONOURED or name in _WITHOUT_EFFECT or not value or value == _NEUTRAL.get(name)


def _sampling(values: dict) -> SamplingParams:
    if not values["do_sample"]:
        return GREEDY  # temperature, top_k and top_p are for sampling only, as in transformers
    temperature, top_k, top_p = (values[name] for name in ("temperature", "top_k", "top_p"))
    return SamplingParams(
        temperature=1.0 if temperature is None else temperature,
        top_k=50 if top_k is None else top_k,  # transformers' default when sampling
        top_p=1.0 if top_p is None else top_p,
    )


def _stop_token_ids(eos_token_id: int | list[int] | None) -> frozenset[int]:
    """One id, several or none; negative ids mean none."""
    if eos_token_id is None:
        return frozenset()
    ids = eos_token_id if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
    return frozenset(operator.index(token_id) for token_id in ids if token_id >= 0)
