"""The paged KV cache: an array of pages for each layer, on the device."""

import logging

import torch

import torch_rpa
from torch_rpa import bridges
from torch_rpa.hf.config import EngineConfig
from torch_rpa.hf.page_allocator import pages_for

logger = logging.getLogger(__name__)

# With num_pages=None, where the device does not tell its free memory, the pool holds max_num_seqs sequences of this
# many tokens (or of the model's own limit).
DEFAULT_TOKENS_PER_SEQ = 1024
# Of what is free when the engine is made, with the weights in place; the rest is for a step's activations and logits.
MEMORY_FRACTION = 0.8


class PagedKVCache:
    """One array of pages for each layer with keys and values of its own, all addressed by the same page table.

    layers: what `torch_rpa.empty_kv_pages(num_pages, page_size, num_kv_heads, head_dim)` gives on the model's
    device, for each such layer. A page number means that page in every layer, so one table serves them all,
    windowed or not. A layer that shares another one's keys and values (Gemma3n) has no array, it reads the other's.
    """

    def __init__(self, model, num_pages: int, page_size: int, dtype: torch.dtype) -> None:
        config = model.config
        self._sources = kv_source_layers(config)
        owners = sorted(set(self._sources))
        self._arrays = {layer: index for index, layer in enumerate(owners)}
        self.layers = [
            torch_rpa.empty_kv_pages(
                num_pages,
                page_size,
                num_kv_heads_of(config),
                head_dim_of(config),
                dtype=dtype,
                device=model.device,
            )
            for _ in owners
        ]

    def layer_pages(self, layer_idx: int) -> torch.Tensor:
        """The pages that attention layer `layer_idx` reads."""
        return self.layers[self._arrays[self._sources[layer_idx]]]

    def writes(self, layer_idx: int) -> bool:
        """Whether the layer has keys and values of its own to write into its pages."""
        return self._sources[layer_idx] == layer_idx


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


def page_bytes(model_config, page_size: int, dtype: torch.dtype) -> int:
    """Bytes that one page takes, over all layers with pages of their own."""
    num_layers = len(set(kv_source_layers(model_config)))
    return num_layers * page_size * 2 * num_kv_heads_of(model_config) * head_dim_of(model_config) * dtype.itemsize


def pool_pages(model, config: EngineConfig) -> int:
    """num_pages; or if that is None as many as fit into MEMORY_FRACTION of the device's free memory, at most what
    max_num_seqs of the longest sequences need; or where the device does not say what is free, pages for max_num_seqs
    sequences of 1024 tokens, or of the longest if that is shorter. What was chosen is logged at INFO."""
    if config.num_pages is not None:
        return config.num_pages
    longest = config.longest(model.config)
    free_bytes = _free_bytes(model.device)
    if free_bytes is None:
        tokens = min(longest, DEFAULT_TOKENS_PER_SEQ)
        num_pages = config.max_num_seqs * pages_for(tokens, config.page_size)
        reason = f"{config.max_num_seqs} sequences of {tokens} tokens ({model.device} does not say what memory is free)"
    else:
        one = page_bytes(model.config, config.page_size, config.kv_dtype or model.dtype)
        fitting = int(free_bytes * MEMORY_FRACTION) // one
        num_pages = max(1, min(fitting, config.max_num_seqs * pages_for(longest, config.page_size)))
        reason = (
            f"{num_pages * one / 2**30:.2f} GiB of the {free_bytes / 2**30:.2f} GiB that are free on {model.device}"
        )
    logger.info("num_pages=None: chose %d pages of %d tokens, %s", num_pages, config.page_size, reason)
    return num_pages


def _free_bytes(device: torch.device) -> int | None:
    bridge = bridges.of(device)
    return None if bridge is None else bridge.free_memory_bytes(device)
