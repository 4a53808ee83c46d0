"""The host's cost of one traced call on an XLA tensor, without sync, side by side in one run.

    python -m benchmarks.bench_bridge

Compares torch.ops.rpa with a plain call_jax of the same JAX function and with torch_xla's own op. The latter lowers its
Pallas kernel in every call; off TPU it refuses to, so that here its lowering is told to be for "tpu", as it is there.
Shapes: Llama-3-8B heads, bfloat16, 64 tokens, 16 sequences.
"""

import argparse
import functools
import os
import statistics
import time
from unittest import mock

os.environ.setdefault("PJRT_DEVICE", "CPU")

import jax
import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.experimental.custom_kernel
import torch_xla.experimental.pallas_kernels.ragged_paged_attention_v2

import torch_rpa
from torch_rpa import kernels, workloads

TOKENS, SEQS, PAGES_PER_SEQ, PAGES, PAGE_SIZE = 64, 16, 32, 512, 16
HEADS = workloads.MODELS["llama-3-8b"].heads
TARGET_US = 60

real_jit = jax.jit


def make_inputs(device):
    """q, k, v, kv_pages and metadata of a decode batch on the device."""
    num_q_heads, num_kv_heads, head_dim = HEADS
    q = torch.zeros(TOKENS, num_q_heads, head_dim, dtype=torch.bfloat16).to(device)
    k = torch.zeros(TOKENS, num_kv_heads, head_dim, dtype=torch.bfloat16).to(device)
    pages = torch_rpa.empty_kv_pages(PAGES, PAGE_SIZE, num_kv_heads, head_dim, dtype=torch.bfloat16, device=device)
    metadata = (
        torch.full((SEQS,), 100, dtype=torch.int32),
        torch.arange(SEQS * PAGES_PER_SEQ, dtype=torch.int32).view(SEQS, PAGES_PER_SEQ),
        torch.arange(SEQS + 1, dtype=torch.int32),
        torch.tensor([SEQS], dtype=torch.int32),
    )
    return q, k, pages, tuple(x.to(device) for x in metadata)


def time_calls(call, repeats, rounds):
    """Median over rounds of the mean microseconds of one call; what was traced is thrown away between rounds."""
    call()
    means = []
    for _ in range(rounds):
        results = []
        start = time.perf_counter()
        for _ in range(repeats):
            results.append(call())
        means.append((time.perf_counter() - start) / repeats * 1e6)
        results.clear()
        torch_xla._XLAC._clear_pending_irs(str(torch_xla.device()))
    return statistics.median(means)


class JitForTpu:
    """``jax.jit`` whose ``lower`` is for "tpu", so that torch_xla's op traces off TPU."""

    def __init__(self, *args, **kwargs):
        self.jitted = real_jit(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        return self.jitted(*args, **kwargs)

    def lower(self, *args, **kwargs):
        return self.jitted.trace(*args, **kwargs).lower(lowering_platforms=("tpu",))


def call_own_op(q, pages, metadata, scale):
    with mock.patch.object(jax, "jit", JitForTpu):
        return torch.ops.xla.ragged_paged_attention(
            q, pages, *metadata, sm_scale=scale, num_kv_pages_per_block=8, num_queries_per_block=32
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50, help="calls in a round")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()

    torch.set_grad_enabled(False)
    device = torch_xla.device()
    q, k, pages, metadata = make_inputs(device)
    scale = HEADS[2] ** -0.5
    jax_function = functools.partial(kernels.ragged_paged_attention, sm_scale=scale)
    ops = torch.ops.rpa
    calls = {
        "torch.ops.rpa.ragged_paged_attention": lambda: ops.ragged_paged_attention(q, pages, *metadata, sm_scale=scale),
        "torch.ops.rpa.ragged_paged_attention_with_lse": lambda: ops.ragged_paged_attention_with_lse(
            q, pages, *metadata, sm_scale=scale
        ),
        "torch.ops.rpa.ragged_paged_attention_update": lambda: ops.ragged_paged_attention_update(
            q, k, k, pages, *metadata, sm_scale=scale
        ),
        "torch.ops.rpa.ragged_paged_attention_update_": lambda: ops.ragged_paged_attention_update_(
            q, k, k, pages, *metadata, sm_scale=scale
        ),
        "plain call_jax of the same function": lambda: xb.call_jax(jax_function, (q, pages, *metadata)),
        "torch_xla's own op": lambda: call_own_op(q, pages, metadata, scale),
    }
    print(f"One traced call, without sync; target {TARGET_US} us\n\n| call | us |\n|---|---:|")
    for name, call in calls.items():
        repeats, rounds = (10, 3) if name.startswith("torch_xla") else (options.repeats, options.rounds)
        print(f"| {name} | {time_calls(call, repeats, rounds):.1f} |", flush=True)


if __name__ == "__main__":
    main()
