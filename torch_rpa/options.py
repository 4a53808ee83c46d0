"""The options of the ops, as one frozen value that every implementation reads."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class AttentionOptions:
    """Everything about a call that is not a tensor. Different options are different compiled programs.

    Attributes:
        sm_scale: factor of the scores, usually ``head_dim ** -0.5``.
        causal: a query sees no later key.
        sliding_window: a query sees only keys fewer than this many tokens away, or None for no window.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``, or None.
        k_scale: what a stored key is multiplied by, None for 1.0 (required for int8 pages).
        v_scale: what a stored value is multiplied by, None for 1.0 (required for int8 pages).
        num_kv_pages_per_block: pages fetched for one step of the inner loop, or None to let the kernel choose.
        num_queries_per_block: rows of a sequence computed together, or None to let the kernel choose.
        vmem_limit_bytes: what the TPU kernel may take of VMEM, or None for its own limit.
    """

    sm_scale: float = 1.0
    causal: bool = True
    sliding_window: int | None = None
    soft_cap: float | None = None
    k_scale: float | None = None
    v_scale: float | None = None
    num_kv_pages_per_block: int | None = None
    num_queries_per_block: int | None = None
    vmem_limit_bytes: int | None = None

    @property
    def mask(self) -> dict:
        """The keyword arguments of the functions in ``mask.py``."""
        return {"causal": self.causal, "sliding_window": self.sliding_window}

    @property
    def score_scale(self) -> float:
        """What the dot product of a query and a stored key is multiplied by."""
        return self.sm_scale * (1.0 if self.k_scale is None else self.k_scale)

    @property
    def value_scale(self) -> float:
        """What a weighted sum of stored values is multiplied by."""
        return 1.0 if self.v_scale is None else self.v_scale

    def check(self) -> None:
        """Raise ValueError for the first option that is out of range."""
        if not math.isfinite(self.sm_scale):
            raise ValueError(f"sm_scale must be finite, got {self.sm_scale}")
        if self.soft_cap is not None and (self.soft_cap == 0 or not math.isfinite(self.soft_cap)):
            raise ValueError(f"soft_cap must be finite and not 0, got {self.soft_cap}; None means no cap")
        for name in ("k_scale", "v_scale"):
            scale = getattr(self, name)
            if scale is not None and not (scale > 0 and math.isfinite(scale)):
                raise ValueError(f"{name} must be positive and finite, got {scale}; None means 1.0")
        for name in ("sliding_window", "num_kv_pages_per_block", "num_queries_per_block", "vmem_limit_bytes"):
            count = getattr(self, name)
            if count is not None and count <= 0:
                raise ValueError(f"{name} must be at least 1, got {count}; None means the default")


OPTION_NAMES = tuple(field.name for field in fields(AttentionOptions))
