"""What a model's config says of keys and values: how many heads, how wide, and which layers have their own."""


def kv_source_layers(model_config) -> list[int]:
    """For each layer the one whose keys and values it attends to: itself, or, where `kv_sharing_modes` (Gemma3n) says
    "reuse", the layer of its type that says "store"."""
    modes = getattr(model_config, "kv_sharing_modes", None) or [None] * model_config.num_hidden_layers
    types = getattr(model_config, "layer_types", None)
    stores = {types[layer]: layer for layer, mode in enumerate(modes) if mode == "store"}
    return [stores[types[layer]] if mode == "reuse" else layer for layer, mode in enumerate(modes)]


def head_dim_of(model_config) -> int:
    return getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads


def num_kv_heads_of(model_config) -> int:
    """num_key_value_heads; in older configs one with multi_query (GPT-BigCode), else as many as query heads."""
    if getattr(model_config, "multi_query", False):
        return 1
    return getattr(model_config, "num_key_value_heads", None) or model_config.num_attention_heads
