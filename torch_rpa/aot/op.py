"""Compile the ops for a named TPU without having one.

JAX and libtpu read the environment when they start, so ``compile_report`` works in a process of its own. In a process
that was started with ``environment()``, ``compile_op`` gives the compiled program itself. Pure JAX, no torch.
"""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

_MODEL_DIM = 1024  # of the projections around the op; it changes nothing in the kernel
# ``copy-start`` is none: it moves an array between memories as it is. Nor is a transpose that keeps the order.
_COPY = re.compile(r"= (?!s32)(\w+\[\d[\d,]*\])\S* (?:copy|transpose)\([^)]*\)(?:, dimensions=\{([\d,]*)\})?")
_KERNEL_CALL = re.compile(r'^.*custom_call_target="tpu_custom_call".*$', re.MULTILINE)
_USED_VMEM = re.compile(r'used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"')

_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*: ")
# The kernels need no torch, and its import takes longer than JAX's.
_CHILD = """
import json, sys
sys.modules["torch"] = None
from torch_rpa import aot
print(json.dumps(aot.report(aot.OpCase(**json.loads(sys.argv[1])))._asdict()))
"""


@dataclass(frozen=True)
class OpCase:
    """One op at one set of shapes, for one chip.

    Attributes:
        chip: a name in ``torch_rpa.chips.CHIPS``.
        heads: (num_q_heads, num_kv_heads, head_dim).
        kv_dtype: of the pages; None for that of q.
        form: of the pages, "flat" or "heads".
        update: the op that writes new tokens first, instead of the one that only reads.
        sinks: whether sinks are given.
        num_tokens, max_num_seqs, context, num_pages: sizes of the batch, the page table and the cache; context is the
            number of tokens that one sequence's entries in the page table have room for.
        projections: compile ``x @ W`` and views before the op and after it, as a model has them; otherwise the op
            alone, on [tokens, heads * head_dim] arrays.
        options: keyword options of the op.
    """

    chip: str
    heads: tuple[int, int, int]
    page_size: int = 128
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    form: str = "flat"
    update: bool = False
    sinks: bool = False
    num_tokens: int = 512
    max_num_seqs: int = 64
    context: int = 8192
    num_pages: int = 4096
    projections: bool = True
    options: dict = field(default_factory=dict)

    @property
    def pages_shape(self) -> tuple[int, ...]:
        _, num_kv_heads, head_dim = self.heads
        token = (2 * num_kv_heads, head_dim) if self.form == "heads" else (2 * num_kv_heads * head_dim,)
        return self.num_pages, self.page_size, *token


class Report(NamedTuple):
    """What one compiled program is like; of a compile that failed only ``error`` and ``seconds`` say something.

    Attributes:
        error: why it does not compile, in one line; None if it does.
        seconds: lowering and compiling, without imports.
        vmem_bytes: vector memory that the kernel takes.
        copies: shapes of what is copied or transposed in HBM; empty as it should be.
        alias_bytes: bytes of results that take the place of arguments: all pages where they are updated in place.
        temp_bytes: bytes of HBM for intermediate results, between projections.
        page_bytes: bytes of the pages.
        smem_bytes: scalar memory that the metadata takes.
        block_keys: tokens of a sequence that the kernel fetches at once, ``num_kv_pages_per_block`` pages.
        block_rows: rows of q that it stages at once, ``num_queries_per_block``.
    """

    error: str | None
    seconds: float
    vmem_bytes: int = 0
    copies: tuple[str, ...] = ()
    alias_bytes: int = 0
    temp_bytes: int = 0
    page_bytes: int = 0
    smem_bytes: int = 0
    block_keys: int = 0
    block_rows: int = 0


def environment(dump_to=None) -> dict[str, str]:
    """The environment variables that a process needs, from its start, to compile for TPU without one.

    Args:
        dump_to: a folder for libtpu's dumps of every stage, down to the final bundles; None for no dumps.
    """
    flags = f"--xla_jf_dump_to={dump_to} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it two processes abort on a lock file
        "TPU_ACCELERATOR_TYPE": "v6e-4",  # any will do: the topology says what is compiled for
        "TPU_WORKER_HOSTNAMES": "localhost",
        "LIBTPU_INIT_ARGS": "" if dump_to is None else flags,
    }


def child_environment(dump_to=None) -> dict[str, str]:
    """This process's environment with that of ``environment``, for another Python."""
    # jax sets TPU_LIBRARY_PATH, to its own libtpu, when it is imported.
    inherited = {name: value for name, value in os.environ.items() if name != "TPU_LIBRARY_PATH"}
    return inherited | environment(dump_to)


def compile_report(case: OpCase, dump_to=None, python: str = sys.executable) -> Report:
    """Compile one case in a process of its own; errors, crashes of libtpu included, are in the report.

    Args:
        dump_to: see ``environment``.
        python: whose jax and libtpu compile; torch_rpa must be importable there.
    """
    start = time.perf_counter()
    command = [python, "-c", _CHILD, json.dumps(asdict(case))]
    result = subprocess.run(
        command, env=child_environment(dump_to), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if result.returncode == 0:
        fields = json.loads(result.stdout.splitlines()[-1])
        return Report(**fields | {"copies": tuple(fields["copies"])})
    return Report(failure(result), round(time.perf_counter() - start, 1))


def report(case: OpCase) -> Report:
    """What the compiled program of a case is like; raises where it does not compile. Needs ``environment()``."""
    import jax.numpy as jnp
    import numpy as np

    start = time.perf_counter()
    compiled = compile_op(case)
    seconds = time.perf_counter() - start
    text, memory, config = compiled.as_text(), compiled.memory_analysis(), kernel_config(case)
    (kernel_call,) = _KERNEL_CALL.findall(text)
    return Report(
        error=None,
        seconds=round(seconds, 1),
        vmem_bytes=int(_USED_VMEM.search(kernel_call)[1]),
        copies=hbm_copies(text),
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        page_bytes=int(np.prod(case.pages_shape)) * jnp.dtype(case.kv_dtype or case.dtype).itemsize,
        smem_bytes=config.smem_bytes,
        block_keys=config.block_keys,
        block_rows=config.block_rows,
    )


def hbm_copies(text: str) -> tuple[str, ...]:
    """Shapes of all arrays that a compiled program copies or transposes, int32 metadata and scalars left out."""
    found = ((shape, dimensions.split(",")) for shape, dimensions in _COPY.findall(text))
    return tuple(shape for shape, dimensions in found if dimensions == [""] or dimensions != sorted(dimensions))


def kernel_config(case: OpCase):
    """The kernel's configuration for a case: a ``torch_rpa.kernels.config.KernelConfig``."""
    import jax

    from torch_rpa.kernels.config import make_config
    from torch_rpa.options import AttentionOptions

    pages, *_ = _specs(case, [])
    q = jax.ShapeDtypeStruct((case.num_tokens, case.heads[0], case.heads[2]), case.dtype)
    table = jax.ShapeDtypeStruct((case.max_num_seqs, case.context // case.page_size), "int32")
    parts = {"with_lse": False, "with_sinks": case.sinks, "with_update": case.update}
    options = AttentionOptions(**_options(case)).within(table.shape[1] * case.page_size)
    return make_config(q, pages, table, options, chip=case.chip, **parts)


def compile_op(case: OpCase):
    """The compiled program of a case, a ``jax.stages.Compiled``; the process needs ``environment()``."""
    function, specs = _projected(case) if case.projections else _alone(case)
    return compile_for(case.chip, function, specs, donate_argnums=0 if case.update else ())


def compile_for(chip: str, function, specs, donate_argnums=()):
    """Any JAX function compiled for one device of a chip.

    Args:
        chip: a name in ``torch_rpa.chips.CHIPS``; the installed libtpu must know it.
        specs: ``jax.ShapeDtypeStruct``s of the function's arguments.
    """
    import jax
    from jax import export
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from torch_rpa.chips import named

    device = topologies.get_topology_desc(topology_name=named(chip).topology, platform="tpu").devices[0]
    on_device = SingleDeviceSharding(device)
    specs = [jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=on_device) for spec in specs]
    # Plain lowering may emit a newer Mosaic than libtpu reads; an export keeps to the oldest that all readers know.
    exported = export.export(jax.jit(function), platforms=["tpu"])(*specs)
    jitted = jax.jit(exported.call, donate_argnums=donate_argnums)
    return jitted.trace(*specs).lower(lowering_platforms=("tpu",)).compile()


def _alone(case: OpCase):
    """The op on [tokens, heads * head_dim] arrays, and the shapes of its arguments, the pages first."""
    num_q_heads, num_kv_heads, head_dim = case.heads

    def function(pages, q, k, v, *rest):
        q, k, v = (x.reshape(case.num_tokens, -1, head_dim) for x in (q, k, v))
        out, *pages = _call(case, q, k, v, pages, *rest)
        return out.reshape(case.num_tokens, -1), *pages

    rows = [(case.num_tokens, heads * head_dim) for heads in (num_q_heads, num_kv_heads, num_kv_heads)]
    return function, _specs(case, rows)


def _projected(case: OpCase):
    """x @ Wq, Wk, Wv -> view -> op -> view -> @ Wo, and the shapes of its arguments, the pages first."""
    num_q_heads, num_kv_heads, head_dim = case.heads

    def function(pages, x, wq, wk, wv, wo, *rest):
        q, k, v = ((x @ w).reshape(case.num_tokens, -1, head_dim) for w in (wq, wk, wv))
        out, *pages = _call(case, q, k, v, pages, *rest)
        return out.reshape(case.num_tokens, -1) @ wo, *pages

    weights = [(_MODEL_DIM, heads * head_dim) for heads in (num_q_heads, num_kv_heads, num_kv_heads)]
    return function, _specs(case, [(case.num_tokens, _MODEL_DIM), *weights, (num_q_heads * head_dim, _MODEL_DIM)])


def _specs(case: OpCase, shapes):
    """Of the pages, the arrays of these shapes in q's dtype, the metadata, and the sinks."""
    import jax

    seqs, table = (case.max_num_seqs,), (case.max_num_seqs, case.context // case.page_size)
    return [
        jax.ShapeDtypeStruct(case.pages_shape, case.kv_dtype or case.dtype),
        *[jax.ShapeDtypeStruct(shape, case.dtype) for shape in shapes],
        *[jax.ShapeDtypeStruct(shape, "int32") for shape in (seqs, table, (case.max_num_seqs + 1,), (1,))],
        *[jax.ShapeDtypeStruct((case.heads[0],), "float32")] * case.sinks,
    ]


def _call(case: OpCase, q, k, v, pages, kv_lens, page_indices, cu_q_lens, num_seqs, sinks=None):
    """(out, pages) of the update op, (out,) of the other."""
    from torch_rpa import kernels

    metadata = kv_lens, page_indices, cu_q_lens, num_seqs
    options = {"sinks": sinks, "chip": case.chip, **_options(case)}
    if case.update:
        return kernels.ragged_paged_attention_update(q, k, v, pages, *metadata, **options)
    return (kernels.ragged_paged_attention(q, pages, *metadata, **options),)


def _options(case: OpCase) -> dict:
    return {"sm_scale": case.heads[2] ** -0.5, **case.options}


def failure(result: subprocess.CompletedProcess) -> str:
    """Why a process failed, in one line: its exception, or the last that it said before a crash."""
    lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    return (exceptions or lines)[-1][:300]
