"""Hugging Face transformers models on ragged paged attention: `patch(model)`, then `model.generate_batch(...)`."""

from torch_rpa.hf.patching.patch import patch, unpatch

__all__ = ["patch", "unpatch"]
