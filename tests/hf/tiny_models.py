"""Tiny models with random weights, of the real transformers classes, and what plain transformers says of them."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 128
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large enough for logits that differ clearly, so that greedy tokens are no coin toss
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-mha-rope-scaled": (
        LlamaConfig,
        LlamaForCausalLM,
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": 5}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2-window-in-one-layer": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}


def make_config(family: str = "llama", **changes):
    config_class, _, family_changes = FAMILIES[family]
    return config_class(**{**_SIZES, **family_changes, **changes})


def make_model(family: str = "llama", *, seed: int = 0, **changes):
    """A model on the CPU in eval mode, the same for the same arguments."""
    torch.manual_seed(seed)
    return FAMILIES[family][1](make_config(family, **changes)).eval()


def make_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def plain_greedy(model, prompts: list[list[int]], max_new_tokens: int, **kwargs) -> list[list[int]]:
    """What transformers' own generate gives with eager attention, one prompt at a time."""
    former = model.config._attn_implementation
    model.set_attn_implementation("eager")
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **kwargs,
        )
        answers.append(output[0, len(prompt) :].tolist())
    model.set_attn_implementation(former)
    return answers


def tokens(outputs: dict) -> list[list[int]]:
    return [output.generated_tokens for output in outputs.values()]
