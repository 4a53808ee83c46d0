"""All of transformers that torch_rpa.hf uses and transformers does not promise: private names, and deep modules.

`from torch_rpa.hf._transformers import GenerationOutput` works for each name of the table; what a release has taken
away is an ImportError that names it.
"""

from torch_rpa.private_names import PrivateNames

names = PrivateNames(
    "transformers",
    "5.24.0",
    {
        # Public classes that stand deep inside.
        "ContinuousBatchingConfig": "transformers.generation.configuration_utils:ContinuousBatchingConfig",
        "GenerateDecoderOnlyOutput": "transformers.generation.utils:GenerateDecoderOnlyOutput",
        "GenerationOutput": "transformers.generation.continuous_batching.requests:GenerationOutput",
        "RequestStatus": "transformers.generation.continuous_batching.requests:RequestStatus",
        # Registries and helpers.
        "ALL_EXPERTS_FUNCTIONS": "transformers.integrations.moe:ALL_EXPERTS_FUNCTIONS",
        "layer_number_to_wildcard": "transformers.integrations.tensor_parallel:replace_layer_number_by_wildcard",
        # Methods and properties; the functions below call them.
        "attention": "transformers:PreTrainedConfig._attn_implementation",
        "experts": "transformers:PreTrainedConfig._experts_implementation",
        "can_set_attention": "transformers:PreTrainedModel._can_set_attn_implementation",
        "can_set_experts": "transformers:PreTrainedModel._can_set_experts_implementation",
        "prepare_generation_config": "transformers:GenerationMixin._prepare_generation_config",
        "is_heterogeneous": "transformers:PreTrainedConfig.is_heterogeneous",
        "per_layer_attributes": "transformers:PreTrainedConfig.per_layer_attributes",
    },
)


def __getattr__(name: str):
    return getattr(names, name)


def attention_of(config) -> str:
    """The name of its attention implementation."""
    return config._attn_implementation


def experts_of(config) -> str:
    """The name of its implementation of experts."""
    return config._experts_implementation


def can_set_attention(model_class: type) -> bool:
    """Whether its attention goes through AttentionInterface."""
    return model_class._can_set_attn_implementation()


def can_set_experts(model) -> bool:
    """Whether it has experts whose implementation can be chosen."""
    return model._can_set_experts_implementation()


def prepare_generation_config(model, generation_config, **keywords) -> tuple:
    """The settings that `generate` would use, and the keywords that are none."""
    return model._prepare_generation_config(generation_config, **keywords)


def differing_attributes(config) -> list[str]:
    """What its layers differ in, where they differ; reading one of these raises."""
    return sorted(config.per_layer_attributes) if config.is_heterogeneous else []
