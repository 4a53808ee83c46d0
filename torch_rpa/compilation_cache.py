"""Compiled programs kept on disk by PyTorch/XLA, so that the next process compiles nothing."""

import os
import warnings


def use_compilation_cache(folder: str | os.PathLike, *, readonly: bool = False) -> None:
    """Keep every program that is compiled for the XLA device in ``folder``, and look there before compiling one.

    To be called before the first program. One is found again by its graph, shapes, options and compiler flags; another
    version of torch_xla or of libtpu should get another folder. Processes may share one.

    Args:
        folder: on this host, made if it is not there.
        readonly: only look there; for all hosts but one where several share a folder over a network.

    Raises:
        RuntimeError: programs have been compiled already, or the call was made before.
    """
    import torch_xla.runtime as xr

    from torch_rpa.bridges.torch_xla.names import xla

    if "XLA_PERSISTENT_CACHE_PATH" in os.environ or xla.is_compilation_cache_made():
        raise RuntimeError(
            "torch_rpa.use_compilation_cache must be called once, before the first program on the XLA device, and "
            "instead of setting XLA_PERSISTENT_CACHE_PATH"
        )
    if xr.device_type() == "CPU":
        warnings.warn(
            "PJRT CPU keeps its programs in a compilation cache but cannot load them again: each process compiles anew",
            stacklevel=2,
        )
    xr.initialize_cache(os.fspath(folder), readonly=readonly)
