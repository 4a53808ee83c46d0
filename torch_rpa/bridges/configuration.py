"""What fixes a lowered call of an op: shapes, dtypes and options, never the values of a tensor."""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from torch_rpa.bridges import target as targets
from torch_rpa.bridges.target import Target
from torch_rpa.extras import require
from torch_rpa.options import AttentionOptions
from torch_rpa.validation import ArgSpec, check_static, dtype_name

_KERNEL_CHOICES = ("auto", "xla", "interpret")


class Configuration(NamedTuple):
    """The key that a lowered call is found by.

    Attributes:
        op: name of a function of ``torch_rpa.kernels``.
        specs: (name, shape, dtype, device) of each tensor, in the order they are given in.
        options: those that were given, as (name, value).
        kernel: what TORCH_RPA_XLA_KERNEL says.
        target: what is lowered for; None: the device.
    """

    op: str
    specs: tuple
    options: tuple
    kernel: str
    target: Target | None

    @classmethod
    def of_call(cls, op: str, args: dict[str, torch.Tensor], options: dict) -> "Configuration":
        specs = tuple([(name, t.shape, t.dtype, t.device) for name, t in args.items()])
        kernel = os.environ.get("TORCH_RPA_XLA_KERNEL", "auto")
        return cls(op, specs, tuple(options.items()), kernel, targets.chosen())

    def for_target(self, device_target: Callable[[], Target]) -> "Configuration":
        """With a target, which without one of its own is the device's, and checked.

        Raises:
            ModuleNotFoundError: JAX is not installed.
            ValueError, TypeError, NotImplementedError: what the static checks raise.
        """
        device = self.specs[0][3].type
        require("jax", extra=device, needed_for=f'device "{device}"')
        configuration = self._replace(target=self.target or device_target())
        configuration._check()
        return configuration

    def _check(self) -> None:
        args = {
            name: ArgSpec(tuple(shape), dtype_name(dtype), str(device)) for name, shape, dtype, device in self.specs
        }
        # Plain XLA ops have no limits of their own on a TPU.
        check_static(args, self._options, self.target.platform if self.kernel != "xla" else None)
        if self.kernel not in _KERNEL_CHOICES:
            raise ValueError(f"TORCH_RPA_XLA_KERNEL must be one of {', '.join(_KERNEL_CHOICES)}, got {self.kernel!r}")

    def as_function(self):
        """A JAX function of the tensors in order, and their ``jax.ShapeDtypeStruct``s. It must have a target."""
        import jax
        import jax.numpy as jnp

        from torch_rpa import kernels

        names = [name for name, *_ in self.specs]
        shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype_name(dtype))) for _, shape, dtype, _ in self.specs]
        choice = {"interpret": self.kernel == "interpret", "backend": "xla" if self.kernel == "xla" else "auto"}

        def function(*arrays):
            args = dict(zip(names, arrays, strict=True))
            return getattr(kernels, self.op)(**args, **vars(self._options), **choice, chip=self.target.chip)

        return function, shapes

    @property
    def _options(self) -> AttentionOptions:
        return AttentionOptions(**dict(self.options))
