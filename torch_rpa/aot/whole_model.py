"""One step of a whole patched model, compiled by libtpu for one chip without a TPU and without the model's weights.

Weights, cache and inputs are PyTorch/XLA's placeholders: tensors with a shape and no memory, which become parameters of
the traced program. So it is the program that the engine would run, of all layers, and an 8B model takes 2 GB to trace.
"""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from typing import NamedTuple
from unittest import mock

from torch_rpa.aot.op import child_environment, failure, hbm_copies
from torch_rpa.aot.plan import Plan
from torch_rpa.kernels import chips


class ModelReport(NamedTuple):
    """What the compiled step is like; of a compile that failed only ``error`` and ``seconds`` say something.

    Attributes:
        error: why it does not compile, in one line; None if it does.
        seconds: tracing and compiling.
        kernels: calls of the Pallas kernel, one for each layer.
        argument_bytes: of weights, cache and inputs.
        temp_bytes: of HBM for intermediate results.
        code_bytes: of the program.
        updated_bytes: of the cache that is updated in place, and cache_bytes: of all of it.
        copies: how often an array of which shape is copied or transposed.
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


def model_report(plan: Plan) -> ModelReport:
    """Compile a step of ``max_tokens`` rows in a process of its own; errors, crashes included, are in the report.

    The cache has as many pages as fit beside the weights.
    """
    start = time.perf_counter()
    sizes = {name: getattr(plan, name) for name in ("chip", "page_size", "max_tokens", "max_seqs", "kv_dtype")}
    sizes |= {"pages_per_seq": plan.pages_per_seq, "num_pages": plan.cache_tokens // plan.page_size}
    config = plan.model.config.to_json_string(use_diff=False)
    command = [sys.executable, "-m", __name__, json.dumps({"config": json.loads(config), **sizes})]
    environment = child_environment() | {"PJRT_DEVICE": "CPU"}
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode == 0:
        return ModelReport(**json.loads(result.stdout.splitlines()[-1]))
    return ModelReport(failure(result), round(time.perf_counter() - start, 1))


def report(config: dict, chip: str, num_pages: int, **sizes) -> ModelReport:
    """``model_report`` in this process, which needs the environment of ``torch_rpa.aot``; raises what goes wrong."""
    from torch_rpa import aot_graph

    start = time.perf_counter()
    program, cache = _traced_step(config, chip, num_pages, **sizes)
    compiled = aot_graph.compile_program(program, chips.named(chip).topology, num_chips=1)
    text, memory = compiled.hlo_modules()[0].to_string(), compiled.get_compiled_memory_stats()
    return ModelReport(
        error=None,
        seconds=round(time.perf_counter() - start, 1),
        kernels=len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        updated_bytes=memory.alias_size_in_bytes,
        cache_bytes=sum(pages.numel() * pages.element_size() for pages in cache.layers),
        copies=dict(Counter(hbm_copies(text))),
    )


def _traced_step(config: dict, chip: str, num_pages: int, *, page_size, max_tokens, max_seqs, kv_dtype, pages_per_seq):
    """The program of a step without sampling, and the cache that it updates."""
    import torch

    import torch_rpa.hf
    from torch_rpa import aot_graph, bridge
    from torch_rpa.hf.batch import BatchLayout
    from torch_rpa.hf.cache import PagedKVCache
    from torch_rpa.hf.step import run_step

    model = _without_memory(config)
    kv_dtype = getattr(torch, kv_dtype)
    torch_rpa.hf.patch(model, page_size=page_size, num_pages=num_pages, max_num_seqs=max_seqs, kv_dtype=kv_dtype)
    layout = BatchLayout(max_tokens, max_seqs, pages_per_seq)
    zeros = mock.patch.object(bridge, "zeros_pages", lambda shape, dtype, device: _placeholder(shape, dtype))
    with torch.no_grad(), aot_graph.traced_for(chip), zeros:
        cache = PagedKVCache(model, num_pages, page_size, kv_dtype)
        tokens = run_step(model, layout, cache, _placeholder((sum(layout.sizes),), torch.int32))
        return aot_graph.traced_program([*cache.layers, *tokens], updated=cache.layers), cache


def _without_memory(config: dict):
    """The model on the XLA device, all its tensors placeholders."""
    import torch
    from transformers import AutoConfig

    from torch_rpa.aot.models import meta_model

    model = meta_model(AutoConfig.for_model(**config))
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            weight = _placeholder(tensor.shape, tensor.dtype)
            module.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
        for name, tensor in module.named_buffers(recurse=False):
            module.register_buffer(name, _placeholder(tensor.shape, tensor.dtype), persistent=False)
    return model


def _placeholder(shape, dtype):
    from torch_xla.core.xla_builder import create_placeholder_tensor

    return create_placeholder_tensor(tuple(shape), dtype)


if __name__ == "__main__":
    print(json.dumps(report(**json.loads(sys.argv[1]))._asdict()))
