"""Tiny models with random weights, of the real transformers classes, and what plain transformers says of them."""

from dataclasses import dataclass, field, fields

import torch
import transformers

VOCAB_SIZE = 128
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    # Large enough for logits that differ clearly, so that greedy tokens are no coin toss.
    "initializer_range": 0.3,
    "init_std": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_WINDOW_THEN_FULL = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_NO_ROPE_SCALING = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_FIVE_WINDOWS_THEN_FULL = {
    "num_hidden_layers": 6,
    "sliding_window": 6,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"],
}
_TWO_LAYERS_SHARE = {
    "num_hidden_layers": 4,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}


@dataclass(frozen=True)
class Family:
    """A transformers class, the name its users know it by, and what its tiny config has beyond the common sizes.

    seed: of the weights, chosen so that no greedy token of the tests is a close call.
    """

    title: str
    model_class: str
    changes: dict = field(default_factory=dict)
    seed: int = 0

    @property
    def model_type(self) -> type:
        return getattr(transformers, self.model_class)

    def config(self, **changes):
        """The common sizes, as far as this config has them, and the changes."""
        config_class = self.model_type.config_class
        known = {one.name for one in fields(config_class)} | set(config_class.attribute_map)
        sizes = {name: value for name, value in {**_SIZES, **_EXPERTS}.items() if name in known}
        return config_class(**{**sizes, **self.changes, **changes})


FAMILIES = {
    "llama": Family("Llama", "LlamaForCausalLM"),
    "llama-mha-rope-scaled": Family(
        "Llama, scaled RoPE",
        "LlamaForCausalLM",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "smollm2": Family(
        "SmolLM2",
        "LlamaForCausalLM",
        {"hidden_size": 96, "num_attention_heads": 6, "tie_word_embeddings": True},
        seed=1,
    ),
    "smollm3": Family("SmolLM3", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
    "mistral-window": Family("Mistral", "MistralForCausalLM", {"sliding_window": 5}),
    "ministral": Family("Ministral", "MinistralForCausalLM", _WINDOW_THEN_FULL),
    "mixtral": Family("Mixtral", "MixtralForCausalLM"),
    "qwen2": Family("Qwen2, Qwen2.5", "Qwen2ForCausalLM"),
    "qwen2-window-in-one-layer": Family(
        "Qwen2, windowed",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2-moe": Family("Qwen2-MoE", "Qwen2MoeForCausalLM", {"shared_expert_intermediate_size": 32}, seed=1),
    "qwen3": Family("Qwen3", "Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3-moe": Family("Qwen3-MoE", "Qwen3MoeForCausalLM", {"norm_topk_prob": True}, seed=1),
    "phi": Family("Phi-1, Phi-2", "PhiForCausalLM", seed=1),
    "phi3": Family("Phi-3, Phi-4", "Phi3ForCausalLM", {"sliding_window": 6}, seed=1),
    "gemma": Family("Gemma", "GemmaForCausalLM", {"num_key_value_heads": 1}),
    "gemma2": Family(
        "Gemma2",
        "Gemma2ForCausalLM",
        {**_WINDOW_THEN_FULL, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 128},
    ),
    "gemma3": Family("Gemma3, text", "Gemma3ForCausalLM", {**_FIVE_WINDOWS_THEN_FULL, "query_pre_attn_scalar": 64}),
    "gemma3n": Family(
        "Gemma3n, text",
        "Gemma3nForCausalLM",
        {
            **_TWO_LAYERS_SHARE,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        },
    ),
    "granite": Family("Granite", "GraniteForCausalLM", {"attention_multiplier": 0.4, "residual_multiplier": 0.8}),
    "granite-moe": Family("Granite-MoE", "GraniteMoeForCausalLM", {"attention_multiplier": 0.4}, seed=2),
    "olmo": Family("OLMo", "OlmoForCausalLM"),
    "olmo2": Family("OLMo2", "Olmo2ForCausalLM", seed=1),
    "olmo3": Family("OLMo3", "Olmo3ForCausalLM", _WINDOW_THEN_FULL),
    "olmoe": Family("OLMoE", "OlmoeForCausalLM"),
    "cohere": Family("Command R", "CohereForCausalLM", {"logit_scale": 1.0}),
    "cohere2": Family("Command A, R7B", "Cohere2ForCausalLM", {**_WINDOW_THEN_FULL, "logit_scale": 1.0}, seed=2),
    "gpt-oss": Family("GPT-OSS", "GptOssForCausalLM", {**_WINDOW_THEN_FULL, **_NO_ROPE_SCALING}, seed=1),
    "glm": Family("GLM-4 9B", "GlmForCausalLM"),
    "glm4": Family("GLM-4 0414", "Glm4ForCausalLM"),
    "seed-oss": Family("Seed-OSS", "SeedOssForCausalLM"),
    "ernie4.5": Family("ERNIE 4.5", "Ernie4_5ForCausalLM"),
    "hunyuan": Family("HunYuan, dense", "HunYuanDenseV1ForCausalLM"),
    "exaone4": Family("EXAONE 4", "Exaone4ForCausalLM", _WINDOW_THEN_FULL, seed=1),
    "helium": Family("Helium", "HeliumForCausalLM"),
    "arcee": Family("Arcee", "ArceeForCausalLM"),
    "starcoder2": Family("StarCoder2", "Starcoder2ForCausalLM", {"sliding_window": 6}, seed=1),
    "gpt-bigcode": Family("StarCoder", "GPTBigCodeForCausalLM", {"multi_query": True}),
    "stablelm": Family("StableLM", "StableLmForCausalLM", {"num_key_value_heads": 1}),
    "gpt-neox": Family("GPT-NeoX, Pythia", "GPTNeoXForCausalLM"),
    "opt": Family("OPT", "OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt2": Family("GPT-2", "GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}),
}


def make_config(family: str = "llama", **changes):
    return FAMILIES[family].config(**changes)


def make_model(family: str = "llama", *, seed: int | None = None, **changes):
    """A model on the CPU in eval mode, the same for the same arguments; the family's seed if none is given."""
    torch.manual_seed(FAMILIES[family].seed if seed is None else seed)
    return FAMILIES[family].model_type(make_config(family, **changes)).eval()


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


def smallest_lead(model, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """By how much the logit of an answer's token leads the next best one, at the closest call of all; below zero if
    a token is not the greedy one. One plain eager forward over each prompt and its answer."""
    former = model.config._attn_implementation
    model.set_attn_implementation("eager")
    leads = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
        chosen = torch.tensor(answer)[:, None]
        others = logits.scatter(1, chosen, -torch.inf).max(1).values
        leads.append((logits.gather(1, chosen)[:, 0] - others).min().item())
    model.set_attn_implementation(former)
    return min(leads)
