"""What the ops are lowered for, where that is not the device that is there.

``torch_rpa.aot`` traces a whole model for a TPU that this host does not have. So the target stands beside the model's
code and not among its arguments: a value in a context variable, of the thread that traces.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    """What the ops are lowered for, and how memory is had.

    Attributes:
        platform: "cpu" or "tpu".
        chip: the TPU's name, "v6e"; None off TPU, and where it is not known.
        memory: a bridge's own way to make pages and to share tensors out over chips; None: on the device. It plays no
            part in lowering.
    """

    platform: str
    chip: str | None
    memory: Any = field(default=None, compare=False)


_chosen: ContextVar[Target | None] = ContextVar("torch_rpa.target", default=None)


@contextmanager
def using(target: Target) -> Iterator[None]:
    """Inside the block and in this thread the target is this one, whatever the device."""
    token = _chosen.set(target)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> Target | None:
    """What ``using`` says; None where the device that is there is meant."""
    return _chosen.get()
