"""Hugging Face transformers models on ragged paged attention: `patch(model)`, then `model.generate_batch(...)`."""

from torch_rpa.extras import from_extra

with from_extra("hf", "torch_rpa.hf"):
    import transformers  # noqa: F401  what all of it stands on

from torch_rpa.hf.patching.patch import patch, unpatch
from torch_rpa.hf.patching.patched_model import PatchedModel

__all__ = ["PatchedModel", "patch", "unpatch"]
