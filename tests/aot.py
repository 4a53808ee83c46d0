"""Compile the ops for a named TPU without one, and print what the compiled program is like, as JSON.

Run in a process of its own, with the environment of ``ENVIRONMENT``: python aot.py '{"chip": "v6e", ...}'."""

import json
import re
import sys
import time

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
NUM_TOKENS, MODEL_DIM, MAX_NUM_SEQS, CONTEXT, NUM_PAGES = 512, 1024, 64, 8192, 1024


def compile_between_projections(chip, heads, page_size, dtype="bfloat16", kv_dtype=None, update=False, **options):
    """x @ Wq, Wk, Wv -> view -> op -> view -> @ Wo; returns the compiled program and the bytes of the pages."""
    import jax
    import jax.numpy as jnp
    from jax import export
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from torch_rpa import kernels

    num_q_heads, num_kv_heads, dim = heads
    device = topologies.get_topology_desc(topology_name=TOPOLOGIES[chip], platform="tpu").devices[0]

    def spec(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=SingleDeviceSharding(device))

    def step(pages, x, wq, wk, wv, wo, *metadata):
        q, k, v = (
            (x @ w).reshape(NUM_TOKENS, n, dim) for w, n in ((wq, num_q_heads), (wk, num_kv_heads), (wv, num_kv_heads))
        )
        if update:
            out, pages = kernels.ragged_paged_attention_update(q, k, v, pages, *metadata, **options)
            return out.reshape(NUM_TOKENS, -1) @ wo, pages
        return kernels.ragged_paged_attention(q, pages, *metadata, **options).reshape(NUM_TOKENS, -1) @ wo

    pages = spec(NUM_PAGES, page_size, 2 * num_kv_heads * dim, dtype=kv_dtype or dtype)
    weights = [spec(MODEL_DIM, n * dim) for n in (num_q_heads, num_kv_heads, num_kv_heads)]
    table = spec(MAX_NUM_SEQS, CONTEXT // page_size, dtype="int32")
    metadata = [spec(MAX_NUM_SEQS, dtype="int32"), table, spec(MAX_NUM_SEQS + 1, dtype="int32"), spec(1, dtype="int32")]
    args = pages, spec(NUM_TOKENS, MODEL_DIM), *weights, spec(num_q_heads * dim, MODEL_DIM), *metadata
    exported = export.export(jax.jit(step), platforms=["tpu"])(*args)  # Mosaic version 7, which libtpu reads
    lowered = jax.jit(exported.call, donate_argnums=0 if update else ()).trace(*args).lower(lowering_platforms=("tpu",))
    return lowered.compile(), pages.size * pages.dtype.itemsize


def report(**case):
    """What the tests assert about one compiled program."""
    start = time.perf_counter()
    compiled, page_bytes = compile_between_projections(**case)
    seconds = time.perf_counter() - start
    copies = re.findall(r"= (?!s32)(\w+\[[\d,]*\])\S* (?:copy|copy-start|transpose)\(", compiled.as_text())
    memory = compiled.memory_analysis()
    return {
        "seconds": round(seconds, 1),
        "copies": copies,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "page_bytes": page_bytes,
    }


if __name__ == "__main__":
    print(json.dumps([report(**case) for case in json.loads(sys.argv[1])]))
