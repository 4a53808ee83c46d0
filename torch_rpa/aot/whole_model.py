"""One step of a whole patched model, compiled by libtpu without a TPU and without the model's weights.

Weights, cache and inputs are PyTorch/XLA's placeholders: tensors with a shape and no memory, which become parameters of
the traced program. So it is the program that the engine would run, of all layers, and an 8B model takes 2 GB to trace.
For several chips it is traced under SPMD on as many virtual devices, and ``torch_rpa.hf.patch`` says how each weight is
cut, as for a real model.
"""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from typing import NamedTuple

from torch_rpa import chips
from torch_rpa.aot.op import child_environment, failure, hbm_copies
from torch_rpa.aot.plan import Plan


class ModelReport(NamedTuple):
    """What the compiled step is like; of a compile that failed only ``error`` and ``seconds`` say something.

    Attributes:
        error: why it does not compile, in one line; None if it does.
        seconds: tracing and compiling.
        kernels: calls of the Pallas kernel, one for each layer.
        argument_bytes: of weights, cache and inputs; these and all bytes are those of one chip.
        temp_bytes: of HBM for intermediate results.
        code_bytes: of the program.
        updated_bytes: of the cache that is updated in place, and cache_bytes: of all of it.
        copies: how often an array of which shape is copied or transposed.
        collectives: how often what crosses chips: "all-reduce", or "all-gather of bf16[64,128256]".
        gathered: shapes of what all chips gather that is as large as a weight or the pages of a layer: there should be
            none. (The logits are gathered as they should be; a weight as large as they are goes unnoticed.)
    """

    error: str | None
    seconds: float
    kernels: int = 0
    argument_bytes: int = 0
    temp_bytes: int = 0
    code_bytes: int = 0
    updated_bytes: int = 0
    cache_bytes: int = 0
    copies: dict[str, int] = {}  # noqa: RUF012  never changed
    collectives: dict[str, int] = {}  # noqa: RUF012  never changed
    gathered: tuple[str, ...] = ()


def model_report(plan: Plan) -> ModelReport:
    """Compile a step of ``max_tokens`` rows in a process of its own; errors, crashes included, are in the report.

    The cache has as many pages as fit beside the weights.
    """
    start = time.perf_counter()
    sizes = {name: getattr(plan, name) for name in ("chip", "num_chips", "page_size", "max_tokens", "max_seqs")}
    sizes |= {"kv_dtype": plan.kv_dtype, "pages_per_seq": plan.pages_per_seq, "num_pages": plan.cache_pages}
    config = json.loads(plan.model.config.to_json_string(use_diff=False))
    command = [sys.executable, "-m", __name__, json.dumps({"config": config, **sizes})]
    environment = child_environment() | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(plan.num_chips)}
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode == 0:
        fields = json.loads(result.stdout.splitlines()[-1])
        return ModelReport(**fields | {"gathered": tuple(fields["gathered"])})
    return ModelReport(failure(result), round(time.perf_counter() - start, 1))


def report(config: dict, chip: str, num_chips: int, **sizes) -> ModelReport:
    """``model_report`` in this process, which needs its environment; raises what goes wrong."""
    from torch_rpa.aot import graph

    start = time.perf_counter()
    program, cache_bytes = traced_step(config, chip, num_chips, **sizes)
    compiled = graph.compile_program(program, chips.named(chip).topology_of(num_chips), num_chips)
    text, memory = compiled.hlo_modules()[0].to_string(), compiled.get_compiled_memory_stats()
    crossing = graph.collectives(text)
    of_weights_or_pages = program.sharded_sizes() - {sizes["max_seqs"] * config["vocab_size"]}
    return ModelReport(
        error=None,
        seconds=round(time.perf_counter() - start, 1),
        kernels=len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        updated_bytes=memory.alias_size_in_bytes,
        cache_bytes=cache_bytes // num_chips,
        copies=dict(Counter(hbm_copies(text))),
        collectives=dict(Counter(map(_described, crossing))),
        gathered=tuple(c.shape for c in crossing if c.kind == "all-gather" and c.num_elements in of_weights_or_pages),
    )


def traced_step(config, chip, num_chips, *, num_pages, page_size, max_tokens, max_seqs, kv_dtype, pages_per_seq):
    """The program of a step without sampling, and the bytes of the cache that it updates, on all chips together."""
    import torch

    import torch_rpa.hf
    from torch_rpa import sharding
    from torch_rpa.aot import graph
    from torch_rpa.hf.api.gate import gate_of
    from torch_rpa.hf.engine.batch import BatchLayout
    from torch_rpa.hf.engine.step import run_step
    from torch_rpa.hf.model.cache import PagedKVCache

    mesh, kv_dtype = _mesh(num_chips), getattr(torch, kv_dtype)
    settings = {"page_size": page_size, "num_pages": num_pages, "max_num_seqs": max_seqs, "kv_dtype": kv_dtype}
    with torch.no_grad(), graph.traced_for(chip), graph.without_memory() as shardings:
        model = torch_rpa.hf.patch(_without_memory(config), mesh=mesh, **settings)
        with sharding.using(gate_of(model).config.heads):
            kv_cache = PagedKVCache(model, num_pages, page_size, kv_dtype)
            layout = BatchLayout(max_tokens, max_seqs, pages_per_seq)
            tokens = run_step(model, layout, kv_cache, graph.placeholder((sum(layout.sizes),), torch.int32))
        program = graph.traced_program([*kv_cache.layers, *tokens], kv_cache.layers, shardings)
    return program, sum(pages.nbytes for pages in kv_cache.layers)


def _described(collective) -> str:
    """Sums are expected, of rows of the step; what else crosses chips is named with its shape."""
    return collective.kind if collective.kind == "all-reduce" else f"{collective.kind} of {collective.shape}"


def _mesh(num_chips: int):
    """Of all chips; None for one."""
    if num_chips == 1:
        return None
    import numpy as np
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr

    xr.use_spmd()
    return xs.Mesh(np.arange(num_chips), (num_chips,), ("model",))


def _without_memory(config: dict):
    """The model on the XLA device, all its tensors placeholders."""
    from torch.nn import Parameter
    from transformers import AutoConfig

    from torch_rpa.aot.graph import placeholder
    from torch_rpa.aot.models import meta_model

    @cache  # so that modules that share a weight still do
    def weight(meta):
        return Parameter(placeholder(meta.shape, meta.dtype), requires_grad=False)

    model = meta_model(AutoConfig.for_model(**config))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, weight(parameter))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, placeholder(buffer.shape, buffer.dtype), persistent=False)
    return model


if __name__ == "__main__":
    print(json.dumps(report(**json.loads(sys.argv[1]))._asdict()))
