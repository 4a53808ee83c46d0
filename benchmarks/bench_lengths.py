"""The cost of a call on PJRT CPU follows the lengths in the batch, not the size of the page table.

    python -m benchmarks.bench_lengths

Two tables, SmolLM2 heads, float32, 8 sequences, page size 16: lengths grow with the table fixed; the table (and the
pool of pages) grows with the lengths fixed. Each cell is one compiled call through torch.ops.rpa, the best of several.
"""

import argparse
import os
import time

os.environ.setdefault("PJRT_DEVICE", "CPU")

import torch
import torch_xla

import torch_rpa
from torch_rpa import workloads

HEADS = workloads.MODELS["smollm2-135m"].heads
SEQS, PAGE_SIZE = 8, 16


def time_batch(q_len, kv_len, pages_per_seq, repeats):
    """Milliseconds of one call for 8 sequences with these lengths."""
    device = torch_xla.device()
    num_q_heads, num_kv_heads, head_dim = HEADS
    q = torch.randn(128, num_q_heads, head_dim).to(device)
    pages = torch_rpa.empty_kv_pages(
        SEQS * pages_per_seq, PAGE_SIZE, num_kv_heads, head_dim, dtype=torch.float32, device=device
    )
    metadata = [
        torch.full((SEQS,), kv_len, dtype=torch.int32).to(device),
        torch.randperm(SEQS * pages_per_seq, dtype=torch.int32).view(SEQS, pages_per_seq).to(device),
        (torch.arange(SEQS + 1, dtype=torch.int32) * q_len).to(device),
        torch.tensor([SEQS], dtype=torch.int32).to(device),
    ]
    best = float("inf")
    for _ in range(repeats + 1):  # the first call compiles
        torch_xla.sync(wait=True)
        start = time.perf_counter()
        out = torch.ops.rpa.ragged_paged_attention(q, pages, *metadata, sm_scale=head_dim**-0.5)
        out.cpu()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_grad_enabled(False)
    for title, q_len in (("decode, 8 sequences of 1 row", 1), ("prefill, 8 sequences of 16 rows", 16)):
        print(f"\n{title}: page table of 512 pages a sequence (8192 tokens)\n\n| kv_len | ms |\n|---:|---:|")
        for kv_len in (16, 128, 512, 2048, 8192):
            print(f"| {kv_len} | {time_batch(q_len, kv_len, 512, repeats):.2f} |", flush=True)
        print(f"\n{title}: kv_len 128\n\n| pages a sequence | ms |\n|---:|---:|")
        for pages_per_seq in (8, 64, 512, 2048):
            print(f"| {pages_per_seq} | {time_batch(q_len, 128, pages_per_seq, repeats):.2f} |", flush=True)


if __name__ == "__main__":
    main()
