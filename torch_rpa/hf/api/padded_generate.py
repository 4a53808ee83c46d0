"""`model.generate` on a patched model: padded rows of token ids in, padded rows out, through the engine."""

import torch
from transformers import GenerationConfig, PreTrainedModel

from torch_rpa.hf._transformers import GenerateDecoderOnlyOutput, prepare_generation_config
from torch_rpa.hf.api import settings
from torch_rpa.hf.api.gate import gate_of
from torch_rpa.hf.api.generation_config import RequestParams, resolve, token_id_list
from torch_rpa.hf.api.requests import Request, refusal, request_seed
from torch_rpa.hf.names import unknown_names


def generate(
    model: PreTrainedModel,
    inputs: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    tokenizer=None,
    **generation_kwargs,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """What transformers' `generate` gives for a decoder: int64 [batch * num_return_sequences, longest] token ids.

    inputs             or input_ids, [batch, length] token ids, padded on the left
    attention_mask     [batch, length], 1 for tokens and 0 for padding; None: pad_token_id is padding, if there is one
                       and it is no stop token, as transformers guesses it
    tokenizer          needed for stop_strings
    generation_kwargs  fields of the generation config, which go before it

    Each row is its input, padding included, and its answer, filled with pad_token_id after the end. Greedy tokens are
    those of transformers; sampled ones have its distribution and follow torch's global seed, but are not its draws.
    Unset fields, such as a limit of 20 new tokens, are as transformers fills them.

    Raises ValueError for inputs of another shape, padding elsewhere, or a request that can never run; TypeError and
    NotImplementedError for keywords and settings that the engine does not have.
    """
    ids = _two_dimensional(inputs, input_ids)
    config, other = prepare_generation_config(model, generation_config, **generation_kwargs)
    _check_keywords(other)
    gives_dict, config.return_dict_in_generate = config.return_dict_in_generate, False
    max_lengths = (generation_kwargs.get("max_length"), getattr(generation_config, "max_length", None))
    has_max_length = any(length is not None for length in (*max_lengths, model.generation_config.max_length))
    _set_limits(config, ids.shape[1], has_max_length)
    params = resolve(model, config, tokenizer)
    padding = next(iter(token_id_list("pad_token_id", config.pad_token_id)), None)
    prompts = _prompts(ids, attention_mask, padding, params.stop_token_ids)
    sequences = _with_answers(ids, _answer(model, prompts, params), params, _filler(padding, config))
    return GenerateDecoderOnlyOutput(sequences=sequences) if gives_dict else sequences


def _check_keywords(keywords: dict) -> None:
    """Those that are no fields of GenerationConfig, and no parameters of `generate` above."""
    known = [*settings.GENERATE_KEYWORDS, *settings.GENERATION]
    if unknown := unknown_names(keywords, known, settings.NAMES_ELSEWHERE):
        raise TypeError(f"generate of a model patched by torch_rpa.hf does not take {unknown}")
    said = {name: v for name, v in keywords.items() if v is not None and name not in settings.GENERATION}
    if refused := settings.refused(said, settings.GENERATE_KEYWORDS):
        raise NotImplementedError(f"generate of a model patched by torch_rpa.hf does not support {'; '.join(refused)}")


def _two_dimensional(inputs: torch.Tensor | None, input_ids: torch.Tensor | None) -> torch.Tensor:
    if (inputs is None) == (input_ids is None):
        raise ValueError("generate: one of inputs and input_ids is needed")
    ids = input_ids if inputs is None else inputs
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
        shape = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(f"generate: inputs must be an integer tensor [batch, length], got {shape}")
    return ids


def _set_limits(config: GenerationConfig, length: int, has_max_length: bool) -> None:
    """As numbers of new tokens, the same for each row: transformers' lengths include the padding, its default not."""
    if config.max_new_tokens is None:
        config.max_new_tokens = config.max_length - length if has_max_length else config.max_length
    if config.min_new_tokens is None:
        config.min_new_tokens = max(0, (config.min_length or 0) - length)
    config.max_length, config.min_length = None, None


def _prompts(
    ids: torch.Tensor, mask: torch.Tensor | None, pad_token_id: int | None, stop_token_ids: frozenset[int]
) -> list[list[int]]:
    """The rows without their padding."""
    ids = ids.cpu()
    if mask is None and pad_token_id is not None and pad_token_id not in stop_token_ids:
        mask = ids != pad_token_id
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    if mask.shape != ids.shape:
        raise ValueError(f"generate: attention_mask is {tuple(mask.shape)}, inputs are {tuple(ids.shape)}")
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("generate: attention_mask must be zeros, then ones in each row (padding on the left)")
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def _answer(model: PreTrainedModel, prompts: list[list[int]], params: RequestParams) -> list[list[int]]:
    """num_return_sequences answers to each prompt, one prompt's after the other's."""
    seed = int(torch.randint(2**62, ())) if params.sampling.do_sample else None
    with gate_of(model).exclusive("generate") as engine:
        problems = [f"row {row}: {reason}" for row, p in enumerate(prompts) if (reason := refusal(engine, p, params))]
        if problems:
            raise ValueError("generate: " + "; ".join(problems))
        try:
            sequences = [
                Request(f"{row}.{copy}", prompt, params, request_seed(seed, row, copy)).add_to(engine)
                for row, prompt in enumerate(prompts)
                for copy in range(params.num_return_sequences)
            ]
            for _ in engine.run():
                pass
        finally:
            engine.end_session()
    return [sequence.generated_tokens for sequence in sequences]


def _filler(padding: int | None, config: GenerationConfig) -> int:
    """pad_token_id or the first stop token; without either all answers are of one length."""
    if padding is not None:
        return padding
    return next(iter(token_id_list("eos_token_id", config.eos_token_id)), 0)


def _with_answers(ids: torch.Tensor, answers: list[list[int]], params: RequestParams, filler: int) -> torch.Tensor:
    longest = max(map(len, answers))
    rows = [answer + [filler] * (longest - len(answer)) for answer in answers]
    repeated = ids.repeat_interleave(params.num_return_sequences, dim=0)
    return torch.cat([repeated, torch.tensor(rows, dtype=ids.dtype, device=ids.device)], dim=1)
