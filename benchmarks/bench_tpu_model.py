"""Modelled time of the TPU kernel on workloads of Llama-3-8B, without a TPU: libtpu's bundles, executed by tpusim.

    python -m benchmarks.bench_tpu_model --chip v6e --page-size 128

Needs ../shared/tools/tpusim beside the project. The figures compare variants of a kernel; they are no measurements.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

HEADS = NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
NUM_TOKENS, MAX_NUM_SEQS, CONTEXT = 512, 64, 8192
PEAK = {"v6e": (1640e9, 920e12), "v5e": (819e9, 197e12)}  # HBM bytes/s, bfloat16 FLOP/s
SEED = 0


def workloads():
    """Name -> [(q_len, kv_len), ...]."""
    import numpy as np

    random_lens = np.random.default_rng(SEED).integers(20, 601, 64)
    return {
        **{f"decode 64 x {n}": [(1, n)] * 64 for n in (128, 512, 2048, 8192)},
        "decode 64 x 20-600": [(1, int(n)) for n in random_lens],
        **{f"prefill 512 at {n}": [(512, n)] for n in (512, 2048, 8192)},
        "32 x 1000 + 448 at 2048": [(1, 1000)] * 32 + [(448, 2048)],
    }


def metadata(batch, page_size):
    """kv_lens, page_indices, cu_q_lens and num_seqs, as the kernel's scalar operands."""
    import numpy as np

    kv_lens, cu_q_lens = np.zeros(MAX_NUM_SEQS, np.int32), np.zeros(MAX_NUM_SEQS + 1, np.int32)
    kv_lens[: len(batch)] = [kv_len for _, kv_len in batch]
    cu_q_lens[1 : len(batch) + 1] = np.cumsum([q_len for q_len, _ in batch])
    cu_q_lens[len(batch) + 1 :] = cu_q_lens[len(batch)]
    pages = np.arange(MAX_NUM_SEQS * CONTEXT // page_size, dtype=np.int32)
    return [kv_lens, pages, cu_q_lens, np.array([len(batch)], np.int32)]


def dump(chip, page_size, folder):
    """Compile the read-only op for the chip, and return the file of its kernel's bundles."""
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import aot

    os.environ.update(aot.ENVIRONMENT, LIBTPU_INIT_ARGS=flags)
    aot.compile_between_projections(chip, HEADS, page_size, sm_scale=HEAD_DIM**-0.5)
    # Of all kernels of the program, the projections included, ours has by far the longest listing.
    files = [f for f in Path(folder).glob("*-final_bundles.txt") if not {"TLP", "schedule"} & set(f.name.split("-"))]
    return max(files, key=lambda f: f.stat().st_size)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=PEAK, default="v6e")
    parser.add_argument("--page-size", type=int, default=128)
    tools = Path(__file__).parents[1].parent / "shared" / "tools"
    parser.add_argument("--tools", type=Path, default=tools, help="the folder that holds tpusim")
    args = parser.parse_args()
    tools = args.tools
    if not (tools / "tpusim").is_dir():
        print(f"skipped: no tpusim in {tools}")
        return
    sys.path.insert(0, str(tools))
    import tpusim

    bandwidth, flops_per_s = PEAK[args.chip]
    with tempfile.TemporaryDirectory() as folder:
        kernel = tpusim.Kernel(str(dump(args.chip, args.page_size, folder)), args.chip)
        print(f"{args.chip}, page size {args.page_size}: modelled us, share of bandwidth, share of peak FLOP/s")
        for name, batch in workloads().items():
            seconds = kernel.run(metadata(batch, args.page_size)).microseconds * 1e-6
            row_bytes = 2 * NUM_Q_HEADS * HEAD_DIM * 2
            useful_bytes = sum(kv * 4 * NUM_KV_HEADS * HEAD_DIM + q * row_bytes for q, kv in batch)
            flops = sum(4 * NUM_Q_HEADS * HEAD_DIM * (q * kv - q * (q - 1) // 2) for q, kv in batch)
            shares = useful_bytes / seconds / bandwidth, flops / seconds / flops_per_s
            print(f"{name:24} {seconds * 1e6:8.1f} {shares[0]:6.2f} {shares[1]:6.3f}", flush=True)


if __name__ == "__main__":
    main()
