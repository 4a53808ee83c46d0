"""Trace a step of a whole patched Llama for TPU, sharded over as many virtual chips as asked: two layers of
Llama-3-8B's shape, with a smaller vocabulary.

python model_program.py v5e 4 FILE              chip, chips, file; program.py compiles it
"""

import json
import os
import sys
from pathlib import Path

TOKENS, LAYERS, NUM_PAGES, PAGE_SIZE, MAX_NUM_SEQS = 512, 2, 256, 128, 64


def trace(chip, num_chips, path):
    os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(num_chips))
    import numpy as np
    import torch
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr
    from transformers import LlamaConfig, LlamaForCausalLM

    from torch_rpa import aot_graph, bridge, hf, sharding
    from torch_rpa.hf.batch import BatchLayout
    from torch_rpa.hf.cache import PagedKVCache
    from torch_rpa.hf.state import state_of
    from torch_rpa.hf.step import run_step

    xr.use_spmd()
    torch.set_grad_enabled(False)
    config = LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32768, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for parameter in model.parameters():
        parameter.zero_()
    model = model.to("xla")
    hf.patch(model, mesh=xs.Mesh(np.arange(num_chips), (num_chips,), ("model",)), page_size=PAGE_SIZE)
    with aot_graph.traced_for(chip), sharding.using(state_of(model).config.heads):
        cache = PagedKVCache(model, NUM_PAGES, PAGE_SIZE, torch.bfloat16)
        layout = BatchLayout(TOKENS, MAX_NUM_SEQS, 8192 // PAGE_SIZE)
        packed = torch.from_numpy(layout.pack([])).to("xla")
        bridge.run_pending([packed, *model.parameters(), *model.buffers()])
        results = run_step(model, layout, cache, packed)
        program = aot_graph.traced_program([*cache.layers, *results], updated=cache.layers)
    cache_bytes = sum(pages.nbytes for pages in cache.layers)
    report = {"hlo": program.hlo, "updated": program.updated, "cache_bytes": cache_bytes}
    Path(path).write_text(json.dumps(report))


if __name__ == "__main__":
    trace(sys.argv[1], int(sys.argv[2]), sys.argv[3])
