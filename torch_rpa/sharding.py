"""Heads over chips: the ops under PyTorch/XLA's SPMD.

A TPU kernel is one opaque call to XLA's partitioner: left alone, it gathers q and the whole cache to every chip. So the
ops partition themselves: each chip calls the kernel on its KV heads, the query heads that share them and its part of
the pages, and nothing crosses chips until the output projection adds up.

    chips of the axis            0          1          2          3
    q, out [.., 8 heads, ..]     0 1        2 3        4 5        6 7
    pages  [.., K0 V0 K1 ..]     K0 V0      K1 V1      K2 V2      K3 V3
    metadata                     all of it on every chip

With more chips than KV heads a KV head stands on several chips, once for each: the pages then have one head per chip.

A context too long for one chip is shared out by pages instead, see ``attend_over_chips``.

    xr.use_spmd()
    mesh = xs.Mesh(np.arange(4), (4,), ("model",))
    torch_rpa.sharding.use_mesh(mesh, "model")          # from here on the ops and empty_kv_pages are sharded
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from torch_rpa.merge import merge_attention_states
from torch_rpa.validation import stored_kv_heads

__all__ = ["HeadSharding", "attend_over_chips", "current", "use_mesh"]

_of_process: "HeadSharding | None" = None
_of_block: ContextVar["HeadSharding"] = ContextVar("torch_rpa.sharding")


def use_mesh(mesh, axis: str | None = None) -> None:
    """Shard heads over ``axis`` of ``mesh`` in all calls of the ops on XLA tensors from now on, in every thread.

    Args:
        mesh: a ``torch_xla.distributed.spmd.Mesh`` with named axes, or None: shard nothing (the state at import).
        axis: the name of its axis for heads, by convention "model" or "tp".

    Raises:
        ValueError: the mesh has no such axis.
        RuntimeError: SPMD is off; call ``torch_xla.runtime.use_spmd()`` first.
    """
    global _of_process
    _of_process = None if mesh is None else over(mesh, axis)


def over(mesh, axis: str) -> "HeadSharding":
    """Heads over ``axis`` of ``mesh``; raises as ``use_mesh`` does."""
    import torch_xla.runtime as xr

    if not xr.is_spmd():
        raise RuntimeError("a mesh needs SPMD: call torch_xla.runtime.use_spmd() first, before any XLA tensor is made")
    if axis not in mesh.shape():
        raise ValueError(f"axis must be one of the mesh's axes {tuple(mesh.shape())}, got {axis!r}")
    return HeadSharding(mesh, axis)


@contextmanager
def using(heads: "HeadSharding") -> Iterator[None]:
    """Shard so inside the block and in this thread only, whatever ``use_mesh`` says."""
    token = _of_block.set(heads)
    try:
        yield
    finally:
        _of_block.reset(token)


def current() -> "HeadSharding | None":
    """How heads are sharded here: as the innermost ``using`` says, else as ``use_mesh`` said last."""
    return _of_block.get(_of_process)


def sharding_of(tensor: torch.Tensor) -> str:
    """How a tensor is sharded, as PyTorch/XLA has it: "{devices=[4,1]0,1,2,3}", or "" if every chip has all of it."""
    return _spmd().sharding_of(tensor)


def for_call(q: torch.Tensor) -> "HeadSharding | None":
    """How a call of an op under SPMD is to be sharded; None if it is not, or q is every chip's own part already."""
    if sharding_of(q) == "{manual}":
        return None
    heads = current()
    if heads is None:
        warnings.warn(
            "an op of torch_rpa under SPMD without torch_rpa.sharding.use_mesh(mesh, axis): every chip gathers and "
            "computes all heads",
            stacklevel=3,
        )
    return heads


@dataclass(frozen=True)
class HeadSharding:
    """Heads over one axis of a mesh; along the others everything is replicated."""

    mesh: Any
    axis: str

    @property
    def num_chips(self) -> int:
        """Chips along the axis."""
        return self.mesh.shape()[self.axis]

    @property
    def where(self) -> str:
        """For messages."""
        return f"the {self.num_chips} chips of mesh axis {self.axis!r}"

    def check_q_heads(self, num_q_heads: int) -> None:
        """ValueError if the chips cannot share so many query heads."""
        if num_q_heads % self.num_chips:
            raise ValueError(f"q has {num_q_heads} heads, which cannot be shared out evenly over {self.where}")

    def stored_kv_heads(self, num_kv_heads: int) -> int:
        """KV heads that pages have in all; ValueError if the chips cannot share so many."""
        stored = stored_kv_heads(num_kv_heads, self.num_chips)
        if stored is None:
            raise ValueError(
                f"{num_kv_heads=} cannot be shared out over {self.where}: one number must be a multiple of the other"
            )
        return stored

    def spec(self, name: str, tensor: torch.Tensor) -> tuple:
        """The partition spec of an argument or a result: heads over the axis, all else replicated."""
        dim = {"q": 1, "k": 1, "v": 1, "out": 1, "lse": 1, "kv_pages": 2, "sinks": 0}.get(name)
        return tuple(self.axis if i == dim else None for i in range(tensor.dim()))

    def shards(self, args: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The arguments of a call as every chip's own part of them.

        Raises ValueError for heads that cannot be shared out, and for pages that are not sharded.
        """
        self._check_heads(args)
        parts = {name: self._repeat_heads(name, x, args) for name, x in args.items() if name != "kv_pages"}
        parts = {name: _spmd().to_part(x, self.mesh, self.spec(name, x)) for name, x in parts.items()}
        return {name: parts[name] if name in parts else self._pages_part(x) for name, x in args.items()}

    def whole(self, name: str, part: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The result of ``shape`` that every chip has its own part of."""
        return _spmd().to_whole(part, self.mesh, self.spec(name, part), shape)

    def mark(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor, with its data sharded as the op takes it."""
        return self.mark_spec(tensor, self.spec(name, tensor))

    def mark_spec(self, tensor: torch.Tensor, spec: tuple) -> torch.Tensor:
        """The same tensor, with its data sharded: for each dimension the axis, or None."""
        _spmd().mark(tensor, self.mesh, spec)
        return tensor

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """A traced tensor, such as logits [rows, vocabulary], of which each chip computes its part along the last
        dimension if that divides; then all of it on every chip."""
        rows = (None,) * (tensor.dim() - 1)
        if tensor.shape[-1] % self.num_chips == 0:
            # Said first, or the partitioner would gather what the tensor is computed from, such as lm_head's weight.
            tensor = _spmd().annotated(tensor, self.mesh, (*rows, self.axis))
        return _spmd().annotated(tensor, self.mesh, (*rows, None))

    def _repeat_heads(self, name, tensor, args):
        """k and v with each head as often as it stands in the pages."""
        if name not in ("k", "v"):
            return tensor
        copies = _stored_heads(args) // tensor.shape[1]
        return tensor if copies == 1 else tensor.unsqueeze(2).expand(-1, -1, copies, -1).flatten(1, 2)

    def _check_heads(self, args):
        self.check_q_heads(args["q"].shape[1])
        stored = _stored_heads(args)
        expected = self.stored_kv_heads(args["k"].shape[1] if "k" in args else stored)
        if stored != expected:
            raise ValueError(
                f"kv_pages has {stored} KV heads, expected {expected} for {self.where}; make it with "
                "torch_rpa.empty_kv_pages after torch_rpa.sharding.use_mesh"
            )

    def _pages_part(self, pages):
        """Every chip's own pages; their data is sharded already, or ValueError."""
        is_marked = bool(sharding_of(pages))
        marked = pages if is_marked else _spmd().annotated(pages, self.mesh, (None,) * pages.dim())
        part = _spmd().part(marked)
        if part.shape != (*pages.shape[:2], pages.shape[2] // self.num_chips, *pages.shape[3:]):
            raise ValueError(
                f"kv_pages must be sharded by head over {self.where}, or each of them would hold all of it; make it "
                "with torch_rpa.empty_kv_pages after torch_rpa.sharding.use_mesh, or shard it with "
                f"xs.mark_sharding(kv_pages, mesh, {self.spec('kv_pages', pages)})"
            )
        return part


def attend_over_chips(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    kv_lens: torch.Tensor,
    page_indices: torch.Tensor,
    cu_q_lens: torch.Tensor,
    num_seqs: torch.Tensor,
    *,
    mesh,
    axis: str,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a context whose pages are shared out over chips: each chip its own pages, merged by lse.

    Every row sees all keys of its sequence, on whatever chip: the tokens before this step's. A decode row's own token
    may be among them. The new tokens of a prefill chunk, of which a row sees some, are one more part: attend to them
    alone, and put both together with ``torch_rpa.merge_attention_states``.

    Args:
        q: [num_tokens, num_q_heads, head_dim]; cu_q_lens, num_seqs: as for the op; on every chip.
        kv_pages: of either form, sharded along num_pages over ``axis``: chip c of n holds the c-th n-th of the pages.
        kv_lens: int32 [chips, max_num_seqs], tokens of each sequence that stand on each chip, 0 for none.
        page_indices: int32 [chips, max_num_seqs, pages_per_seq], counted from the chip's own first page.
        mesh, axis: as for ``use_mesh``, which is not needed: heads are not sharded here.
        options: sm_scale, soft_cap, k_scale, v_scale and block sizes, as for the op.

    Returns:
        out and lse, as from ``torch.ops.rpa.ragged_paged_attention_with_lse``.

    Raises:
        ValueError: a first dimension that the chips cannot share; what the op refuses.
    """
    num_chips, refused = over(mesh, axis).num_chips, {"causal", "sliding_window", "sinks"} & options.keys()
    if refused:
        raise ValueError(f"attend_over_chips takes no {', '.join(sorted(refused))}: every row sees every key")
    for name, x in (("kv_lens", kv_lens), ("page_indices", page_indices)):
        if x.shape[0] != num_chips:
            raise ValueError(f"{name} must have one entry for each of {num_chips} chips, got {list(x.shape)}")
    if kv_pages.shape[0] % num_chips:
        raise ValueError(f"kv_pages has {kv_pages.shape[0]} pages, which {num_chips} chips cannot share evenly")

    def part(x, is_shared=False):
        return _spmd().to_part(x, mesh, tuple(axis if is_shared and i == 0 else None for i in range(x.dim())))

    lens, table, pages = (part(x, is_shared=True) for x in (kv_lens, page_indices, kv_pages))
    results = torch.ops.rpa.ragged_paged_attention_with_lse(
        part(q), pages, lens[0], table[0], part(cu_q_lens), part(num_seqs), causal=False, **options
    )
    outs, lses = (
        _spmd().to_whole(x.unsqueeze(0), mesh, (axis, *[None] * x.dim()), (num_chips, *x.shape)) for x in results
    )
    return merge_attention_states(outs, lses)


def _stored_heads(args) -> int:
    pages, head_dim = args["kv_pages"], args["q"].shape[2]
    return pages[0, 0].numel() // (2 * head_dim)


def _spmd():
    from torch_rpa.bridges.torch_xla import spmd  # imports torch_xla

    return spmd
