"""What a user of `torch_rpa.hf` writes; see ops.py."""

from typing import Any, assert_type

import torch
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

import torch_rpa.hf


def answer(model: PreTrainedModel, prompts: list[list[int]]) -> dict[str, GenerationOutput]:
    patched = torch_rpa.hf.patch(model, page_size=None, max_num_seqs=64, kv_dtype=torch.float8_e4m3fn)
    assert_type(patched, torch_rpa.hf.PatchedModel)
    patched.warmup(progress_bar=False)
    results = patched.generate_batch(prompts, max_new_tokens=32, seed=1)
    assert_type(results, dict[str, GenerationOutput])
    assert_type(patched.device, Any)
    assert_type(torch_rpa.hf.unpatch(patched), PreTrainedModel)
    return results


def serve(model: PreTrainedModel, prompt: list[int]) -> GenerationOutput | None:
    with torch_rpa.hf.patch(model).continuous_batching_context_manager(warmup=False) as manager:
        request_id = manager.add_request(prompt, max_new_tokens=3)
        assert_type(request_id, str)
        return manager.get_result(request_id)


def patch_the_class() -> None:
    assert_type(torch_rpa.hf.patch(LlamaForCausalLM, token_buckets=(8, 64)), type[LlamaForCausalLM])
    torch_rpa.hf.unpatch(LlamaForCausalLM)


def mistakes(model: PreTrainedModel) -> None:
    torch_rpa.hf.patch(model, pages=3)  # type: ignore[call-overload]
    torch_rpa.hf.patch(model, page_size="large")  # type: ignore[call-overload]
    torch_rpa.hf.patch("llama")  # type: ignore[call-overload]
    torch_rpa.hf.patch(model).generate_batch(3)  # type: ignore[arg-type]
