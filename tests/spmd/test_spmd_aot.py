"""A sharded model that is traced without its weights, as ``python -m torch_rpa.aot --whole-model`` does."""

import json
import re
from collections import Counter

import pytest
import torch
from tiny_models import make_model

from torch_rpa import bridges, hf, sharding
from torch_rpa.aot import graph, whole_model
from torch_rpa.hf.api.gate import gate_of
from torch_rpa.hf.engine.batch import BatchLayout
from torch_rpa.hf.engine.step import run_step
from torch_rpa.hf.model.cache import PagedKVCache

PAGE_SIZE, NUM_PAGES, TOKENS, SEQS, PAGES_PER_SEQ = 16, 32, 32, 4, 8
ON_TPU = {"head_dim": 64, "num_key_value_heads": 4}


def traced_with_weights(model, mesh):
    model = model.to("xla")
    model.tie_weights()  # which `to` undoes
    hf.patch(model, mesh=mesh, page_size=PAGE_SIZE)
    with graph.traced_for("v5e"), sharding.using(gate_of(model).config.heads):
        cache = PagedKVCache(model, NUM_PAGES, PAGE_SIZE, torch.bfloat16)
        layout = BatchLayout(TOKENS, SEQS, PAGES_PER_SEQ)
        packed = torch.from_numpy(layout.pack([])).to("xla")
        bridges.of("xla").run_pending([packed, *model.parameters(), *model.buffers()])
        results = run_step(model, layout, cache, packed)
        return graph.traced_program([*cache.layers, *results], updated=cache.layers)


def traced_with_placeholders(config):
    sizes = {"page_size": PAGE_SIZE, "num_pages": NUM_PAGES, "max_tokens": TOKENS, "max_seqs": SEQS}
    return whole_model.traced_step(config, "v5e", 4, kv_dtype="bfloat16", pages_per_seq=PAGES_PER_SEQ, **sizes)[0]


def parameters(program):
    """{number: what it is, and where it stands}"""
    entry = program.hlo.partition("\nENTRY ")[2]
    found = re.findall(r"= (\S+) parameter\((\d+)\), sharding=(\{.*\})$", entry, re.MULTILINE)
    return {int(number): (shape, spec) for shape, number, spec in found}


def instructions(program):
    """How often each instruction stands there; without the annotations, which a placeholder has twice."""
    lines = [line for line in program.hlo.splitlines() if '"Sharding"' not in line and " parameter(" not in line]
    return Counter(re.findall(r"= (\S+ [\w-]+)\(", "\n".join(lines)))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("smollm2", {"num_attention_heads": 8}), ("gpt-oss", {}), ("phi3", {"hidden_size": 512})],
)
def test_placeholders_give_the_program_of_the_real_model(mesh, family, changes):
    model = make_model(family, **ON_TPU | changes)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()  # RoPE's frequencies stay float32
    config = json.loads(model.config.to_json_string(use_diff=False))
    real, ours = traced_with_weights(model, mesh), traced_with_placeholders(config)
    assert Counter(parameters(ours).values()) == Counter(parameters(real).values())
    assert [parameters(ours)[i] for i in ours.updated] == [parameters(real)[i] for i in real.updated]
    assert instructions(ours) == instructions(real)
    assert ours.sharded_sizes() == real.sharded_sizes()
