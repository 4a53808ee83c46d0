"""Memory that a mixture of experts takes on TPU besides its weights: our static form and transformers' batched_mm.

    python -m benchmarks.bench_experts

One layer's experts in bfloat16, traced by PyTorch/XLA and compiled by libtpu for v6e. Nothing runs; the program's
temporaries are its own figure.
"""

import os

TOPOLOGY = "v6e:2x2"
ROWS = (16, 256)


def layers():
    """Name -> the experts of one layer, on the meta device, and their config."""
    import torch
    from transformers import GptOssConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    qwen = Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)
    gpt_oss = GptOssConfig(hidden_size=2880, intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4)
    with torch.device("meta"):
        return {"Qwen3-30B-A3B": (Qwen3MoeExperts(qwen), qwen), "GPT-OSS-20B": (GptOssExperts(gpt_oss), gpt_oss)}


def temporaries(implementation, module, config, num_rows: int) -> str:
    """MiB of the compiled program, or that it does not fit."""
    import jax
    import torch

    from torch_rpa.aot import graph

    rows = torch.zeros(num_rows, config.hidden_size, dtype=torch.bfloat16)
    index = torch.zeros(num_rows, config.num_experts_per_tok, dtype=torch.int64)
    weights = index.to(torch.bfloat16)
    with torch.no_grad():
        out = implementation(module, rows.to("xla"), index.to("xla"), weights.to("xla"))
    try:
        compiled = graph.compile_program(graph.traced_program([out]), TOPOLOGY)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return "does not fit"
    return f"{compiled.get_compiled_memory_stats().temp_size_in_bytes / 2**20:.0f}"


def main() -> None:
    from torch_rpa import aot

    os.environ.update(aot.environment(), PJRT_DEVICE="CPU")
    import torch
    import torch_xla  # noqa: F401  registers the device
    from transformers.integrations.moe import batched_mm_experts_forward

    from torch_rpa.hf.model.experts import all_experts

    print("| MiB of temporaries, compiled for v6e | rows | every expert sees every row | batched_mm |")
    print("|---|---:|---:|---:|")
    for name, (module, config) in layers().items():
        on_xla = module.to(torch.bfloat16).to_empty(device="cpu").to("xla")
        for num_rows in ROWS:
            forms = all_experts, batched_mm_experts_forward
            cells = [temporaries(form, on_xla, config, num_rows) for form in forms]
            print(f"| {name} | {num_rows} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
