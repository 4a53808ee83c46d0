"""The options of the ops, as one frozen value that every implementation reads."""

from dataclasses import dataclass, replace

# XLA, and so a TPU, takes smaller numbers than the smallest normal one as 0.
SMALLEST_FLOAT32, LARGEST_FLOAT32 = 2.0**-126, 2.0**128 - 2.0**104
# A larger cap changes no score that float32 can tell from another, and score / cap would be 0.
_LARGEST_SOFT_CAP = 2.0**64


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
    def key_scale(self) -> float:
        """What a stored key is multiplied by, and a new one divided by."""
        return 1.0 if self.k_scale is None else self.k_scale

    @property
    def score_scale(self) -> float:
        """What the dot product of a query and a stored key is multiplied by."""
        return self.sm_scale * self.key_scale

    @property
    def value_scale(self) -> float:
        """What a weighted sum of stored values is multiplied by, and a new value divided by."""
        return 1.0 if self.v_scale is None else self.v_scale

    def within(self, max_kv_len: int) -> "AttentionOptions":
        """The same without a window that hides nothing in ``max_kv_len`` keys, so that positions fit in int32."""
        if self.sliding_window is not None and self.sliding_window >= max_kv_len:
            return replace(self, sliding_window=None)
        return self

    def check(self) -> None:
        """Raise ValueError for the first option that is out of range, TypeError for one of a wrong kind."""
        if not isinstance(self.causal, bool):
            raise TypeError(f"causal must be True or False, got {self.causal!r}")
        if not _is_number_up_to(LARGEST_FLOAT32, "sm_scale", self.sm_scale):
            raise ValueError(f"sm_scale must be finite in float32, got {self.sm_scale}")
        if self.soft_cap is not None:
            self._check_soft_cap()
        for name in ("k_scale", "v_scale"):
            self._check_stored_scale(name)
        self._check_products()
        for name in ("sliding_window", "num_kv_pages_per_block", "num_queries_per_block", "vmem_limit_bytes"):
            self._check_count(name)

    def _check_soft_cap(self):
        cap = self.soft_cap
        if not _is_number_up_to(_LARGEST_SOFT_CAP, "soft_cap", cap) or abs(cap) < SMALLEST_FLOAT32:
            raise ValueError(
                f"soft_cap must be from 2**-126 to 2**64 in magnitude (float32), got {cap}; None means no cap"
            )

    def _check_stored_scale(self, name):
        scale = getattr(self, name)
        if scale is None:
            return
        if not _is_number_up_to(LARGEST_FLOAT32, name, scale) or scale < SMALLEST_FLOAT32:
            raise ValueError(f"{name} must be positive and normal in float32, got {scale}; None means 1.0")

    def _check_products(self):
        """The factors that implementations multiply a dot product by."""
        products = {"sm_scale * k_scale": self.score_scale}
        if self.soft_cap is not None:
            products["sm_scale * k_scale / soft_cap"] = self.score_scale / self.soft_cap
        for name, value in products.items():
            if abs(value) > LARGEST_FLOAT32:
                raise ValueError(f"{name} must be finite in float32, got {value}")

    def _check_count(self, name):
        count = getattr(self, name)
        if count is None:
            return
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"{name} must be an integer or None, got {count!r}")
        if count <= 0:
            raise ValueError(f"{name} must be at least 1, got {count}; None means the default")


def _is_number_up_to(largest, name, value) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return abs(value) <= largest  # a NaN is not
