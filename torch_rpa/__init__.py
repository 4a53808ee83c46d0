"""Ragged paged attention for PyTorch on TPU.

Importing this package registers ``torch.ops.rpa.*``. It imports neither JAX nor torch_xla nor transformers: the first
call on an XLA tensor does, and ``torch_rpa.hf``. Without torch, ``torch_rpa.kernels``, the pure JAX entry, is there.
"""

import sys
from importlib.util import find_spec

__version__ = "0.1.0"
__all__ = []


def _is_starting(*commands: str) -> bool:
    """Whether this import is Python's on its way to one of these modules, given by ``python -m``."""
    return sys.argv[:1] == ["-m"] and any(command in sys.orig_argv for command in commands)


# torch takes seconds to load: these commands first read what was typed, and then import the modules that they need.
if find_spec("torch") is not None and not _is_starting("torch_rpa.aot", "torch_rpa.info"):
    from torch_rpa import sharding
    from torch_rpa.compilation_cache import use_compilation_cache
    from torch_rpa.functional import (
        ragged_paged_attention,
        ragged_paged_attention_update,
        ragged_paged_attention_update_,
        ragged_paged_attention_with_lse,
    )
    from torch_rpa.merge import merge_attention_states
    from torch_rpa.ops import check_batch
    from torch_rpa.pages import empty_kv_pages

    __all__ += [
        "check_batch",
        "empty_kv_pages",
        "merge_attention_states",
        "ragged_paged_attention",
        "ragged_paged_attention_update",
        "ragged_paged_attention_update_",
        "ragged_paged_attention_with_lse",
        "sharding",
        "use_compilation_cache",
    ]
