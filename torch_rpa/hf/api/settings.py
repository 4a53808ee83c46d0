"""How each setting of transformers is taken. This is the one definition: it checks, and docs/generation_settings.md.

    HONOURED   the engine does what it says
    NEUTRAL    no value of it changes the answer here
    REFUSED    any value is a NotImplementedError, but for those that ask for nothing

What was not said, None or a field's own default, is not asked about. A setting that is not in the tables, such as one
of a newer transformers, is REFUSED.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    HONOURED = "honoured"
    NEUTRAL = "changes nothing"
    REFUSED = "refused"


@dataclass(frozen=True)
class Setting:
    """One row.

    off            values that mean the same as leaving it out
    note           what it does, why it changes nothing, or what to write instead
    only_sampling  it says something to a request that samples only, as in transformers
    patch          the setting of `torch_rpa.hf.patch` that fixes it; agreeing values are `off`
    """

    kind: Kind
    note: str = ""
    off: tuple = ()
    only_sampling: bool = False
    patch: str | None = None

    def is_off(self, value: object) -> bool:
        return any(is_same(value, off) for off in self.off)

    def is_refused(self, value: object, *, samples: bool = True) -> bool:
        if self.kind is not Kind.REFUSED or (self.only_sampling and not samples):
            return False
        return not self.is_off(value)


def is_same(value: object, other: object) -> bool:
    """Plain equality, for plain values only: an array, which has no single answer, equals nothing but itself."""
    return value is other or (isinstance(value, (bool, int, float, str, list, tuple, dict)) and value == other)


def refused(settings: Mapping[str, object], table: Mapping[str, Setting], *, samples: bool = True) -> list[str]:
    """What of the settings that were said is refused, as texts: "num_beams=4 (each request is one sequence)"."""
    rows = {name: table.get(name, _UNKNOWN) for name in settings}
    return [
        f"{name}={value!r}" + (f" ({rows[name].note})" if rows[name].note else "")
        for name, value in settings.items()
        if rows[name].is_refused(value, samples=samples)
    ]


def _honoured(note: str, *off, only_sampling: bool = False) -> Setting:
    return Setting(Kind.HONOURED, note, off, only_sampling=only_sampling)


def _neutral(note: str) -> Setting:
    return Setting(Kind.NEUTRAL, note)


def _refused(note: str = "", *off, only_sampling: bool = False, patch: str | None = None) -> Setting:
    return Setting(Kind.REFUSED, note, off, only_sampling, patch)


def _of_patch(name: str) -> Setting:
    return _refused(f"torch_rpa.hf.patch has {name}=", patch=name)


_UNKNOWN = _refused("torch_rpa does not know it")
_BEAMS = "it is about beams, and there are none"
_ASSISTANT = "it is about an assistant model, and there is none"
_NO_ENCODER = "it is about encoder-decoder models"
_OUTPUTS = "the engine keeps no such outputs; ContinuousBatchingConfig(return_logprobs=True) gives log probabilities"
_CUDA = "it is about CUDA"

# The fields of GenerationConfig.
GENERATION = {
    "max_new_tokens": _honoured("tokens of the answer; goes before max_length"),
    "max_length": _honoured("tokens of prompt and answer"),
    "min_new_tokens": _honoured("no stop token before so many; goes before min_length"),
    "min_length": _honoured("no stop token before so many tokens of prompt and answer"),
    "early_stopping": _neutral(_BEAMS),
    "max_time": _refused("limit max_new_tokens, or cancel the request"),
    "stop_strings": _honoured("needs the keyword tokenizer="),
    "do_sample": _honoured("without it the most likely token", False),
    "num_beams": _refused("each request is one sequence", 1),
    "use_mtp": _refused("no speculative decoding", False),
    "use_cache": _neutral("pages are the cache, and always used"),
    "cache_implementation": _refused(
        "the pages are the cache; for a quantised one torch_rpa.hf.patch has kv_dtype=",
        *("dynamic", "static", "sliding_window", "hybrid", "hybrid_chunked", "paged"),
    ),
    "cache_config": _refused("the cache is set by torch_rpa.hf.patch", {}),
    "max_cache_len": _refused("torch_rpa.hf.patch has max_seq_len="),
    "temperature": _honoured("", 1.0, only_sampling=True),
    "top_k": _honoured("0 for all tokens", 50, only_sampling=True),
    "top_p": _honoured("", 1.0, only_sampling=True),
    "min_p": _refused("top_p is there", 0.0, only_sampling=True),
    "top_h": _refused("top_p is there", only_sampling=True),
    "typical_p": _refused("top_p is there", 1.0, only_sampling=True),
    "epsilon_cutoff": _refused("top_p is there", 0.0, only_sampling=True),
    "eta_cutoff": _refused("top_p is there", 0.0, only_sampling=True),
    "repetition_penalty": _honoured("", 1.0),
    "encoder_repetition_penalty": _refused("", 1.0),
    "length_penalty": _neutral(_BEAMS),
    "no_repeat_ngram_size": _refused("", 0),
    "bad_words_ids": _refused("", []),
    "renormalize_logits": _neutral("log probabilities are normalised anyway"),
    "forced_bos_token_id": _refused("put it into the prompt"),
    "forced_eos_token_id": _refused(""),
    "remove_invalid_values": _neutral("finite logits have none"),
    "exponential_decay_length_penalty": _refused(),
    "suppress_tokens": _refused("", []),
    "begin_suppress_tokens": _refused("", []),
    "sequence_bias": _refused("", {}),
    "token_healing": _refused("", False),
    "guidance_scale": _refused("", 1.0),
    "watermarking_config": _refused(),
    "num_return_sequences": _honoured("`add_request` takes 1 only: add the request several times", 1),
    "output_attentions": _refused(_OUTPUTS, False),
    "output_hidden_states": _refused(_OUTPUTS, False),
    "output_scores": _refused(_OUTPUTS, False),
    "output_logits": _refused(_OUTPUTS, False),
    "return_dict_in_generate": _refused("only `generate` has it, and honours it", False),
    "pad_token_id": _neutral("nothing is padded; `generate` fills its rows with it"),
    "bos_token_id": _neutral("prompts are taken as they are"),
    "eos_token_id": _honoured("one or several, also as an array or a tensor; a negative one is none"),
    "encoder_no_repeat_ngram_size": _refused("", 0),
    "decoder_start_token_id": _neutral(_NO_ENCODER),
    "is_assistant": _refused("it would end answers early", False),
    "num_assistant_tokens": _neutral(_ASSISTANT),
    "num_assistant_tokens_schedule": _neutral(_ASSISTANT),
    "assistant_confidence_threshold": _neutral(_ASSISTANT),
    "prompt_lookup_num_tokens": _refused("no speculative decoding"),
    "max_matching_ngram_size": _neutral("it is about prompt_lookup_num_tokens"),
    "assistant_early_exit": _refused("no speculative decoding"),
    "assistant_lookbehind": _neutral(_ASSISTANT),
    "target_lookbehind": _neutral(_ASSISTANT),
    "assistant_ensemble_weight": _neutral(_ASSISTANT),
    "speculation_type": _refused("no speculative decoding"),
    "compile_config": _refused("torch_rpa.hf.patch has xla_step="),
    "disable_compile": _neutral("transformers compiles nothing here"),
    "continuous_batching_config": _refused("give it as the keyword continuous_batching_config="),
    "low_memory": _refused("", False),
    "penalty_alpha": _refused("", 0.0),
    "dola_layers": _refused(),
    "diversity_penalty": _refused("", 0.0),
    "num_beam_groups": _refused("", 1),
    "constraints": _refused("", []),
    "force_words_ids": _refused("", []),
    "prefill_chunk_size": _neutral("prompts are read in chunks of the token buckets anyway"),
    "transformers_version": _neutral("it says who wrote the file"),
}

# The fields of ContinuousBatchingConfig; a field's own default asks for nothing.
BATCHING = {
    "page_size": _of_patch("page_size"),
    "block_size": _of_patch("page_size"),
    "num_blocks": _of_patch("num_pages"),
    "max_batch_tokens": _of_patch("token_buckets"),
    "max_requests_per_batch": _of_patch("max_num_seqs"),
    "allow_block_sharing": _of_patch("prefix_caching"),
    "max_memory_percent": _neutral("the pool of pages is sized by torch_rpa.hf.patch"),
    "max_blocks_per_request": _neutral("it is about flash attention"),
    "use_async_batching": _neutral(_CUDA),
    "use_cuda_graph": _neutral(_CUDA),
    "q_padding_interval_size": _neutral(_CUDA),
    "kv_padding_interval_size": _neutral(_CUDA),
    "varlen_compile_config": _refused("torch_rpa.hf.patch has xla_step="),
    "decode_compile_config": _refused("torch_rpa.hf.patch has xla_step="),
    "default_compile_level": _refused("torch_rpa.hf.patch has xla_step="),
    "use_default_compile_configs": _refused("torch_rpa.hf.patch has xla_step=", False),
    "scheduler_type": _refused("requests start in the order in which they come"),
    "safety_margin": _refused("a page that is missing is taken from the newest request"),
    "return_logprobs": _honoured("fills the outputs' logprobs"),
    "seed": _honoured("of all that is sampled; the keyword seed= goes before it"),
    "auto_switch_to_flash": _neutral("it is about flash attention"),
    "cpu_offload_space": _refused("a request without pages is computed again"),
    "cpu_offload_space_safety_threshold": _neutral("it is about cpu_offload_space"),
    "max_queue_size": _honoured("requests of a manager that wait; 0 for any number"),
    "per_request_processors": _neutral("each request has its own parameters anyway"),
    "drop_unsupported_processors": _neutral("what is not supported is refused, never dropped"),
    "disable_nccl_graph_mixing": _neutral(_CUDA),
    "cpu_group_timeout": _neutral(_CUDA),
    "max_cached_graphs": _neutral(_CUDA),
}

# What `generate` takes beside the fields of GenerationConfig.
GENERATE_KEYWORDS = {
    "inputs": _honoured("[batch, length] token ids, padded on the left"),
    "input_ids": _honoured("the same as inputs"),
    "attention_mask": _honoured("[batch, length], 0 for padding"),
    "generation_config": _honoured("with the fields above"),
    "tokenizer": _honoured("for stop_strings"),
    "logits_processor": _refused("", []),
    "stopping_criteria": _refused("stop_strings and eos_token_id are there", []),
    "prefix_allowed_tokens_fn": _refused(),
    "synced_gpus": _refused("", False),
    "assistant_model": _refused("no speculative decoding"),
    "assistant_tokenizer": _refused("no speculative decoding"),
    "streamer": _refused("init_continuous_batching().add_request(..., streaming=True) streams"),
    "negative_prompt_ids": _refused(),
    "negative_prompt_attention_mask": _refused(),
    "custom_generate": _refused("torch_rpa.hf.unpatch(model) gives transformers' generate back"),
    "trust_remote_code": _neutral("it is about custom_generate"),
    "past_key_values": _refused("the pages are the cache"),
    "inputs_embeds": _refused("prompts are token ids"),
    "position_ids": _refused("positions are counted without the padding"),
    "token_type_ids": _refused(),
}

# What other servers and their clients say -> what to say here.
NAMES_ELSEWHERE = {
    "max_tokens": "write max_new_tokens",
    "max_completion_tokens": "write max_new_tokens",
    "min_tokens": "write min_new_tokens",
    "n": "write num_return_sequences",
    "stop": "write stop_strings",
    "stop_token_ids": "write eos_token_id",
    "seed": "write the keyword seed= of generate_batch or add_request",
    "logprobs": "write ContinuousBatchingConfig(return_logprobs=True)",
    "presence_penalty": "there is repetition_penalty only",
    "frequency_penalty": "there is repetition_penalty only",
    "logit_bias": "logits are not changed",
}
