"""What stands before the kernels of every op, on every device: no derivative, and one dtype under autocast.

AUTOCAST     q, k and v, which a model under autocast computes in different dtypes, are brought to one
AUTOGRAD     a call that asks for a derivative, in reverse or in forward mode, is refused
"""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from torch_rpa.validation import FLOAT_DTYPES, dtype_name

# TorchTPU's device is PrivateUse1.
AUTOCAST_KEYS = ("AutocastCPU", "AutocastXLA", "AutocastPrivateUse1")
_DIFFERENTIABLE = ("q", "k", "v", "kv_pages", "sinks")


def refusing_derivatives(op: torch._ops.OpOverload, named: Callable) -> Callable:
    """An Autograd kernel: refuses inputs that a derivative is asked for, then goes on to the device's kernel.

    Args:
        op: the op it stands before.
        named: a call of the op -> (its tensors by name, its options by name).
    """

    def kernel(*tensors, **kwargs):
        args, _ = named(*tensors, **kwargs)
        args = {name: args[name] for name in _DIFFERENTIABLE if name in args}
        _refuse_forward_mode(op, args)
        if torch.is_grad_enabled():
            _refuse_reverse_mode(op, args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*tensors, **kwargs)

    return kernel


def _refuse_reverse_mode(op, args):
    names = [name for name, t in args.items() if t.requires_grad]
    if names:
        raise RuntimeError(
            f"torch.ops.{op.overloadpacket} is for inference and has no derivative, but grad mode is on and "
            f"{', '.join(names)} requires grad; call it under torch.no_grad() or torch.inference_mode()"
        )


def _refuse_forward_mode(op, args):
    names = [name for name, t in args.items() if forward_ad.unpack_dual(t).tangent is not None]
    if names:
        raise RuntimeError(
            f"torch.ops.{op.overloadpacket} is for inference and has no derivative, but {', '.join(names)} has a "
            "tangent of forward-mode AD (torch.func.jvp); give it torch.autograd.forward_ad.unpack_dual(...).primal"
        )


def in_one_dtype(op: torch._ops.OpOverload, named: Callable) -> Callable:
    """An Autocast kernel: q, k and v in the dtype of the pages, or in autocast's own where those are quantised.

    A model under autocast computes v by a matrix product, in autocast's dtype, and q and k may have another after their
    rotary positions. The result has the one dtype.

    Args:
        op: the op it stands before.
        named: a call of the op -> (its tensors by name, its options by name).
    """

    def kernel(*tensors, **kwargs):
        args, options = named(*tensors, **kwargs)
        device_type, dtype = args["q"].device.type, args["kv_pages"].dtype
        if dtype_name(dtype) not in FLOAT_DTYPES:
            dtype = torch.get_autocast_dtype(device_type)
        casts = {name: args[name].to(dtype) for name in ("q", "k", "v") if _is_float(args.get(name))}
        if _is_float(args.get("sinks")):
            casts["sinks"] = args["sinks"].float()
        with torch.autocast(device_type, enabled=False):
            return op(**{**args, **casts}, **options)

    return kernel


def _is_float(tensor: torch.Tensor | None) -> bool:
    """Whether it is one that autocast may have made; any other is for the static checks to refuse."""
    return tensor is not None and dtype_name(tensor.dtype) in FLOAT_DTYPES
