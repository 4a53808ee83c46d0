"""An identity that cannot be lowered for TPU: only at lowering is the device of a traced JAX function known."""

from jax.extend.core import Primitive
from jax.interpreters import mlir


def refuse_on_tpu(x, why: str):
    """x, and NotImplementedError(why) where the function that computes it is lowered for TPU."""
    return _refuse.bind(x, why=why)


def _raise(context, x, *, why):
    raise NotImplementedError(why)


_refuse = Primitive("rpa_refuse_on_tpu")
_refuse.def_impl(lambda x, why: x)
_refuse.def_abstract_eval(lambda x, why: x)
mlir.register_lowering(_refuse, lambda context, x, why: [x])
mlir.register_lowering(_refuse, _raise, platform="tpu")
