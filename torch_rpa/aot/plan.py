"""What somebody means to serve on which chips, what memory that takes, and what has to be compiled to know the rest."""

from dataclasses import dataclass

from torch_rpa import chips, workloads
from torch_rpa.aot.models import LayerKind, ModelFacts
from torch_rpa.aot.op import OpCase
from torch_rpa.validation import PAGE_SIZES, TPU_MAX_TABLE_BYTES, page_table_bytes, stored_kv_heads

KV_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
DTYPE = "bfloat16"  # of weights and queries
DEFAULT_CONTEXT = 8192
CACHE_SHARE = 0.8  # of what the weights leave: the engine takes as much, and keeps the rest for a step's activations


@dataclass(frozen=True)
class Plan:
    """A model on ``num_chips`` chips, its heads shared out over them, and the sizes of its steps.

    Attributes:
        chip: a name in ``torch_rpa.chips.CHIPS``.
        max_tokens: rows of a step.
        max_seqs: sequences at a time.
        max_context: tokens of one sequence.
        kv_dtype: of the cache, one of ``KV_DTYPES``.
    """

    chip: str
    model: ModelFacts
    page_size: int = 128
    max_tokens: int = 512
    max_seqs: int = 64
    max_context: int = DEFAULT_CONTEXT
    kv_dtype: str = DTYPE
    num_chips: int = 1

    def problems(self) -> list[str]:
        """What can be said to fail without compiling, each with the option to change; empty if nothing can."""
        return [*self._heads_problems(), *self._size_problems(), *self._weight_problems()] or self._smem_problems()

    def hbm_problem(self) -> str | None:
        """Why there is no room for one sequence in HBM, with the options to change; None if there is."""
        if self.cache_tokens >= self.max_context:
            return None
        hbm, weights = chips.CHIPS[self.chip].hbm_bytes, self.weight_bytes or 0
        return (
            f"HBM: beside weights of {weights / 2**30:.1f} GiB a {self.chip} of {hbm / 2**30:.0f} GiB has room for "
            f"{self.cache_tokens} tokens, less than one sequence: raise --num-chips, or lower --max-context"
        )

    @property
    def pages_per_seq(self) -> int:
        return -(-self.max_context // self.page_size)

    @property
    def weight_bytes(self) -> int | None:
        """Of one chip, the model's weights in bfloat16 shared out evenly; None where they are not known."""
        count = self.model.num_parameters
        return None if count is None else 2 * count // self.num_chips

    @property
    def token_bytes(self) -> int:
        """Of one chip's cache, for one token in all layers."""
        layers = ((*self.heads_of_one_chip(kind), count) for kind, count in self.model.layers.items() if kind.writes)
        return workloads.itemsize(self.kv_dtype) * sum(2 * heads * dim * count for _, heads, dim, count in layers)

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values fit beside the weights: whole pages in ``CACHE_SHARE`` of what is left."""
        left = chips.CHIPS[self.chip].hbm_bytes - (self.weight_bytes or 0)
        return max(0, int(left * CACHE_SHARE) // (self.token_bytes * self.page_size)) * self.page_size

    @property
    def cache_pages(self) -> int:
        return self.cache_tokens // self.page_size

    @property
    def patch_settings(self) -> dict[str, object] | None:
        """The settings of ``torch_rpa.hf.patch`` that make the engine what is planned here; None if none do.

        The mesh of several chips is left out, and the dtype of the cache is a name.
        """
        if self.model.config is None or self.kv_dtype == "int8":
            return None
        return {
            "page_size": self.page_size,
            "num_pages": self.cache_pages,
            "max_num_seqs": self.max_seqs,
            "max_seq_len": self.max_context,
            "token_buckets": tuple(sorted({self.max_seqs, self.max_tokens})),
            **({"kv_dtype": self.kv_dtype} if self.kv_dtype != DTYPE else {}),
        }

    def heads_of_one_chip(self, kind: LayerKind) -> tuple[int, int, int]:
        """(num_q_heads, num_kv_heads, head_dim) that one chip computes; with more chips than KV heads each has one."""
        num_q_heads, num_kv_heads, head_dim = kind.heads
        return num_q_heads // self.num_chips, max(1, num_kv_heads // self.num_chips), head_dim

    def ops(self, reading: bool = True) -> list["PlannedOp"]:
        """What to compile for each kind of layer: the op that its steps call and, if ``reading``, the one that only
        reads for layers that write, too."""
        found = []
        for kind, count in self.model.layers.items():
            for update in (False, True) if kind.writes and reading else (kind.writes,):
                name = ("update" if update else "read") + (f", window {kind.window}" if kind.window else "")
                name = _unlike(name, [op.name for op in found])
                found.append(PlannedOp(name, self._case(kind, update), count if update == kind.writes else 0))
        return found

    def _case(self, kind: LayerKind, update: bool) -> OpCase:
        # One layer's pages: as many as the page table has room for, but those of one layer fit easily.
        num_pages = max(self.pages_per_seq, min(self.max_seqs * self.pages_per_seq, self.cache_pages))
        return OpCase(
            chip=self.chip,
            heads=self.heads_of_one_chip(kind),
            page_size=self.page_size,
            dtype=DTYPE,
            kv_dtype=self.kv_dtype,
            update=update,
            sinks=kind.sinks,
            num_tokens=self.max_tokens,
            max_num_seqs=self.max_seqs,
            context=self.pages_per_seq * self.page_size,
            num_pages=num_pages,
            options=dict(kind.options) | workloads.scales(self.kv_dtype),
        )

    def _heads_problems(self) -> list[str]:
        found = []
        for num_q_heads, num_kv_heads in dict.fromkeys(kind.heads[:2] for kind in self.model.layers):
            if num_q_heads % num_kv_heads:
                found.append(f"{num_q_heads} query heads are no multiple of {num_kv_heads} KV heads: change --heads")
            elif num_q_heads % self.num_chips:
                found.append(f"{num_q_heads} query heads cannot be shared evenly: change --num-chips {self.num_chips}")
            elif stored_kv_heads(num_kv_heads, self.num_chips) is None:
                found.append(
                    f"of {num_kv_heads} KV heads and --num-chips {self.num_chips} one must be a multiple of the other: "
                    "change --num-chips"
                )
        return found

    def _size_problems(self) -> list[str]:
        found = []
        if self.page_size not in PAGE_SIZES:
            found.append(f"--page-size must be one of {', '.join(map(str, PAGE_SIZES))}, got {self.page_size}")
        if self.max_seqs > self.max_tokens:
            found.append(
                f"a step of {self.max_tokens} tokens has no row for each of {self.max_seqs} sequences: raise "
                "--max-tokens, or lower --max-seqs"
            )
        longest = self.model.longest
        if longest is not None and self.max_context > longest:
            found.append(f"the model has positions for {longest} tokens only: lower --max-context {self.max_context}")
        return found

    def _weight_problems(self) -> list[str]:
        hbm, weights = chips.CHIPS[self.chip].hbm_bytes, self.weight_bytes or 0
        if weights < hbm:
            return []
        return [
            f"HBM: weights of {weights / 2**30:.1f} GiB do not fit in the {hbm / 2**30:.0f} GiB of a {self.chip}: "
            f"raise --num-chips to {-(-weights * self.num_chips // hbm)} or more"
        ]

    def _smem_problems(self) -> list[str]:
        table = page_table_bytes(self.max_seqs, self.pages_per_seq)
        if table <= TPU_MAX_TABLE_BYTES:
            return []
        return [
            f"SMEM: a page table for {self.max_seqs} sequences of {self.pages_per_seq} pages takes {table // 2**10} "
            f"of {TPU_MAX_TABLE_BYTES // 2**10} KiB: lower --max-context or --max-seqs, or raise --page-size"
        ]


@dataclass(frozen=True)
class PlannedOp:
    """One program to compile, and how many layers of the model call it in a step."""

    name: str
    case: OpCase
    num_layers: int


def _unlike(name: str, names) -> str:
    """The name, with a number if there is one like it already."""
    return next(n for n in (name, *(f"{name} ({i})" for i in range(2, 99))) if n not in names)
