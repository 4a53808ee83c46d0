"""Trace two attention blocks of Llama-3-8B's shape for TPU, sharded over as many virtual chips as asked, and compile.

python program.py trace v5e 4 FILE 8    chip, chips, file, KV heads
python program.py compile v5e:2x2 FILE  prints what the tests assert, as JSON
"""

import json
import os
import re
import sys
from pathlib import Path

TOKENS, MODEL_DIM, NUM_Q_HEADS, HEAD_DIM, LAYERS = 512, 4096, 32, 128, 2
NUM_PAGES, PAGE_SIZE, MAX_NUM_SEQS, PAGES_PER_SEQ = 1024, 128, 64, 64


def trace(chip, num_chips, path, num_kv_heads):
    os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(num_chips))
    import numpy as np
    import torch
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr

    import torch_rpa
    from torch_rpa import bridges
    from torch_rpa.aot import graph

    xr.use_spmd()
    torch.set_grad_enabled(False)
    mesh = xs.Mesh(np.arange(num_chips), (num_chips,), ("model",))
    torch_rpa.sharding.use_mesh(mesh, "model")

    def zeros(*shape, dtype=torch.bfloat16, partition=None):
        x = torch.zeros(shape, dtype=dtype, device="xla")
        xs.mark_sharding(x, mesh, partition or (None,) * len(shape))
        return x

    def layer():
        columns, rows = (None, "model"), ("model", None)
        kv_columns = columns if num_kv_heads % num_chips == 0 else None  # a head on many chips: each computes it
        wq = zeros(MODEL_DIM, NUM_Q_HEADS * HEAD_DIM, partition=columns)
        wk, wv = (zeros(MODEL_DIM, num_kv_heads * HEAD_DIM, partition=kv_columns) for _ in "kv")
        pages = torch_rpa.empty_kv_pages(
            NUM_PAGES, PAGE_SIZE, num_kv_heads, HEAD_DIM, dtype=torch.bfloat16, device="xla"
        )
        return wq, wk, wv, zeros(NUM_Q_HEADS * HEAD_DIM, MODEL_DIM, partition=rows), pages

    with graph.traced_for(chip):
        x, layers = zeros(TOKENS, MODEL_DIM), [layer() for _ in range(LAYERS)]
        shapes = (MAX_NUM_SEQS,), (MAX_NUM_SEQS, PAGES_PER_SEQ), (MAX_NUM_SEQS + 1,), (1,)
        metadata = [zeros(*shape, dtype=torch.int32) for shape in shapes]
        bridges.of("xla").run_pending([x, *metadata, *(w for weights in layers for w in weights)])
        for wq, wk, wv, wo, pages in layers:
            q, k, v = ((x @ w).view(TOKENS, -1, HEAD_DIM) for w in (wq, wk, wv))
            out = torch.ops.rpa.ragged_paged_attention_update_(q, k, v, pages, *metadata, sm_scale=HEAD_DIM**-0.5)
            x = x + out.view(TOKENS, -1) @ wo
        pages = [weights[-1] for weights in layers]
        program = graph.traced_program([*pages, x], updated=pages)
    Path(path).write_text(json.dumps({"hlo": program.hlo, "updated": program.updated}))


def compile_for(topology_name, path):
    from torch_rpa import aot
    from torch_rpa.aot import graph

    os.environ.update(aot.environment())
    program = json.loads(Path(path).read_text())
    compiled = graph.compile_program(graph.Program(program["hlo"], tuple(program["updated"])), topology_name)
    text, memory = compiled.hlo_modules()[0].to_string(), compiled.get_compiled_memory_stats()
    return {
        "collectives": [kind for kind, _ in graph.collectives(text)],
        "copies": aot.hbm_copies(text),
        "kernels": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "page_bytes_of_a_head": LAYERS * NUM_PAGES * PAGE_SIZE * 2 * HEAD_DIM * 2,
    }


if __name__ == "__main__":
    if sys.argv[1] == "trace":
        trace(sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    else:
        print(json.dumps(compile_for(*sys.argv[2:])))
