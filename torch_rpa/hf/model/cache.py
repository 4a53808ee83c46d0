"""The paged KV cache: an array of pages for each layer, on the device."""

import torch

import torch_rpa
from torch_rpa.hf.model.heads import head_dim_of, kv_source_layers, num_kv_heads_of


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

    def fits(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a model on this device, with pages of this dtype, can go on with it."""
        return (self.layers[0].device, self.layers[0].dtype) == (device, dtype)

    def layer_pages(self, layer_idx: int) -> torch.Tensor:
        """The pages that attention layer `layer_idx` reads."""
        return self.layers[self._arrays[self._sources[layer_idx]]]

    def writes(self, layer_idx: int) -> bool:
        """Whether the layer has keys and values of its own to write into its pages."""
        return self._sources[layer_idx] == layer_idx
