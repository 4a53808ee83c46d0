"""How many pages the pool of all sequences has, and what a page takes."""

import logging

import torch

from torch_rpa import bridges
from torch_rpa.hf.engine.config import EngineConfig
from torch_rpa.hf.engine.page_allocator import pages_for
from torch_rpa.hf.model.heads import head_dim_of, kv_source_layers, num_kv_heads_of

logger = logging.getLogger(__name__)

# With num_pages=None, where the device does not tell its free memory, the pool holds max_num_seqs sequences of this
# many tokens (or of the model's own limit).
DEFAULT_TOKENS_PER_SEQ = 1024
# Of what is free when the engine is made, with the weights in place; the rest is for a step's activations and logits.
MEMORY_FRACTION = 0.8


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
