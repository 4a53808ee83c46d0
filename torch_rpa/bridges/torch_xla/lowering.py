"""A call of an op as a computation of PyTorch/XLA.

torch_xla's call_jax lowers a JAX function, hands the HLO to PyTorch/XLA as a computation, and adds a call of it to the
lazy graph. The same three steps are taken here, but the first two once for each static configuration (shapes, dtypes,
options), after which a call is a look-up and the third step. call_jax repeats its look-ups, its pytree work and its
environment writes in every call, keeps every function for ever, and is not thread-safe.

Lowering names its platform and starts no JAX backend, so that a TPU stays with PyTorch/XLA.
"""

import threading
from functools import lru_cache

import torch
import torch_xla.core.xla_builder as xb

from torch_rpa.bridges.configuration import Configuration
from torch_rpa.bridges.interface import MAX_LOWERED_CALLS
from torch_rpa.bridges.torch_xla import device
from torch_rpa.bridges.torch_xla.names import xla

_LOCK = threading.Lock()


def call(op: str, args: dict[str, torch.Tensor], options: dict) -> list[torch.Tensor]:
    """``Bridge.call`` for arguments as they are: under SPMD every chip's own parts, see ``torch_rpa.sharding``."""
    configuration = Configuration.of_call(op, args, options)
    with _LOCK:  # one thread lowers a configuration, the others wait for it
        computation = _computation(configuration)
    return xla.user_computation(f"xla::rpa_{op}", list(args.values()), computation)


@lru_cache(maxsize=MAX_LOWERED_CALLS)
def _computation(configuration: Configuration):
    """The lowered computation; checks the call first."""
    configuration = configuration.for_target(device.target)
    return xb.computation_from_module_proto(f"rpa_{configuration.op}", hlo_of(configuration))


def hlo_of(configuration: Configuration) -> bytes:
    """The serialized HLO of a call."""
    xla.init_client()  # PyTorch/XLA takes the TPU before JAX may touch it
    function, shapes = configuration.as_function()
    from torch_rpa import jax_names

    lowered = jax_names.lower(function, shapes, configuration.target.platform)
    return lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
