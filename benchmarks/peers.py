"""The public TPU kernels that ours is compared with, compiled for a named chip without a TPU.

v2: jax.experimental.pallas.ops.tpu.ragged_paged_attention, in the installed jax (what torch_xla calls)
v3: ragged paged attention v3 of the PyPI package tpu-inference (arXiv 2604.15464), one launch for decode and one for
    the rest; `make bench-tpu` puts it beside the newer jax that it needs

    python -m benchmarks.peers v2 v6e          compile in this process; ``compile_peer`` starts it with libtpu's dumps
"""

import re
import subprocess
import sys
import time
import types
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np

from torch_rpa import aot, workloads
from torch_rpa.aot import OpCase
from torch_rpa.chips import named

REPO = Path(__file__).parents[1]
NEXT_PYTHON = REPO / ".venv-next" / "bin" / "python"
TPU_INFERENCE = REPO / ".venv-next" / "tpu-inference"
# The names of each one's launches in libtpu's dumps.
LAUNCHES = {"v2": ("",), "v3": ("RPAd", "RPAm")}


def compile_peer(name: str, case: OpCase, dump_to: str) -> float:
    """Compile a peer for the shapes and the chip of a case, with libtpu's dumps; returns seconds."""
    python = str(NEXT_PYTHON) if _needs_newer_jax(name, case.chip) else sys.executable
    command = [python, "-m", "benchmarks.peers", name, case.chip]
    env = aot.child_environment(dump_to)
    result = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{name} does not compile for {case.chip}:\n{result.stderr[-2000:]}")
    return float(result.stdout.splitlines()[-1])


def scalars(name: str, case: OpCase, batch) -> list[np.ndarray]:
    """The scalar operands of each of a peer's launches, with those that its wrapper adds."""
    kv_lens, table, cu_q_lens, num_seqs = workloads.metadata(batch, case.page_size, case.max_num_seqs, case.context)
    if name == "v2":
        return [kv_lens, table, cu_q_lens, np.zeros(2, np.int32), num_seqs]
    num_decodes = next((i for i, (q_len, _) in enumerate(batch) if q_len != 1), len(batch))  # they come first
    distribution = np.array([num_decodes, num_decodes, len(batch)], np.int32)
    cursors = np.zeros(3, np.int32), np.full(4, -1, np.int32), np.full(6, -1, np.int32)
    return [kv_lens, table.reshape(-1), cu_q_lens, distribution, *cursors]


def function_v2(case: OpCase):
    """JAX's kernel and the shapes of its arguments."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    # Its table has no entry for pages of 128 tokens, and its default, 128 pages a block, does not fit; blocks of 512
    # keys and 32 rows are what the table has for smaller pages.
    blocks = {"num_kv_pages_per_block": 512 // case.page_size, "num_queries_per_block": 32}
    options = {"sm_scale": case.heads[2] ** -0.5, "vmem_limit_bytes": 64 * 2**20, **blocks}

    def function(q, pages, *metadata):
        return ragged_paged_attention(q, pages, *metadata, **options)

    num_q_heads, num_kv_heads, head_dim = case.heads
    pages = case.num_pages, case.page_size, 2 * num_kv_heads, head_dim
    return function, [*_specs(case, (case.num_tokens, num_q_heads, head_dim), pages), *_metadata_specs(case)]


def function_v3(case: OpCase):
    """tpu-inference's kernel, which updates the cache too, and the shapes of its arguments."""
    # The package's own __init__ starts vLLM; the kernel needs nothing of it.
    package = types.ModuleType("tpu_inference")
    package.__path__ = [str(TPU_INFERENCE / "tpu_inference")]
    sys.modules["tpu_inference"] = package
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel

    kernel.get_tpu_version = lambda: int(re.search(r"\d", case.chip)[0])  # it would ask the machine

    def function(q, k, v, pages, kv_lens, table, cu_q_lens, distribution):
        metadata = kv_lens, table.reshape(-1), cu_q_lens, distribution
        return kernel.ragged_paged_attention(q, k, v, pages, *metadata, sm_scale=case.heads[2] ** -0.5)

    num_q_heads, num_kv_heads, head_dim = case.heads
    new = (case.num_tokens, num_kv_heads, head_dim)
    pages = case.num_pages, case.page_size, num_kv_heads, 2, head_dim
    specs = [*_specs(case, (case.num_tokens, num_q_heads, head_dim), new, new, pages), *_metadata_specs(case)]
    return function, [*specs[:-1], _int32(3)]


def _specs(case: OpCase, *shapes):
    import jax

    return [jax.ShapeDtypeStruct(shape, case.dtype) for shape in shapes]


def _metadata_specs(case: OpCase):
    table = _int32(case.max_num_seqs, case.context // case.page_size)
    return [_int32(case.max_num_seqs), table, _int32(case.max_num_seqs + 1), _int32(1)]


def _int32(*shape):
    import jax

    return jax.ShapeDtypeStruct(shape, "int32")


def _needs_newer_jax(name: str, chip: str) -> bool:
    return name == "v3" or chip == "7x"


@contextmanager
def _as_on_a_tpu(chip: str):
    """The newer jax asks which TPU the machine has: here it hears of the chip to compile for."""
    import jax

    device = jax.sharding.AbstractDevice(platform="tpu", device_kind=named(chip).device_kinds[0], num_cores=1)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def main():
    name, chip = sys.argv[1:]
    case = OpCase(chip, workloads.MODELS["llama-3-8b"].heads)
    function, specs = {"v2": function_v2, "v3": function_v3}[name](case)
    start = time.perf_counter()
    with _as_on_a_tpu(chip) if _needs_newer_jax(name, chip) else nullcontext():
        aot.compile_for(chip, function, specs)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
