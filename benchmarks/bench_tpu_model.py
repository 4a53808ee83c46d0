"""Modelled time of the TPU kernel on workloads of Llama-3-8B, without a TPU: libtpu's bundles, executed by tpusim.

    python -m benchmarks.bench_tpu_model --chip v6e --page-size 128 [--update] [--workload "decode 64 x 128"]

Needs ../shared/tools/tpusim beside the project. The figures compare variants of a kernel; they are no measurements.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from torch_rpa import workloads
from torch_rpa.aot import OpCase, compile_report
from torch_rpa.kernels.chips import CHIPS

MODEL = workloads.MODELS["llama-3-8b"]


def kernel_bundles(case: OpCase, folder: str) -> str:
    """Compile the case, and return the file of its kernel's bundles among libtpu's dumps."""
    report = compile_report(case, dump_to=folder)
    if report.error:
        raise SystemExit(f"{case} does not compile: {report.error}")
    # Of all kernels of the program, the projections included, ours has by far the longest listing.
    files = [f for f in Path(folder).glob("*-final_bundles.txt") if not {"TLP", "schedule"} & set(f.name.split("-"))]
    return str(max(files, key=lambda f: f.stat().st_size))


def scalars(case: OpCase, batch) -> list:
    """The kernel's scalar operands; the page table goes in as one dimension, with numbers of pages that there are."""
    kv_lens, table, *others = workloads.metadata(batch, case.page_size, case.max_num_seqs, case.context)
    return [kv_lens, table.reshape(-1) % case.num_pages, *others]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=("v6e", "v5e"), default="v6e")
    parser.add_argument("--page-size", type=int, default=128)
    parser.add_argument("--kv-dtype", help="of the pages, and print how much faster it is; bfloat16 if left out")
    parser.add_argument("--form", choices=("flat", "heads"), default="flat", help="of the pages")
    parser.add_argument(
        "--update", action="store_true", help="the op that writes new tokens, beside the one that only reads"
    )
    parser.add_argument("--workload", choices=workloads.batches(), help="this one only")
    parser.add_argument("--alone", action="store_true", help="without projections around it: q and out in HBM")
    tools = Path(__file__).parents[1].parent / "shared" / "tools"
    parser.add_argument("--tools", type=Path, default=tools, help="the folder that holds tpusim")
    args = parser.parse_args()
    if not (args.tools / "tpusim").is_dir():
        print(f"skipped: no tpusim in {args.tools}")
        return
    sys.path.insert(0, str(args.tools))
    import tpusim

    chip = CHIPS[args.chip]
    scales = {"k_scale": 0.1, "v_scale": 0.1} if args.kv_dtype == "int8" else {}
    case = OpCase(
        args.chip, MODEL.heads, args.page_size, kv_dtype=args.kv_dtype, form=args.form, update=args.update,
        projections=not args.alone, options=scales,
    )  # fmt: skip
    kv_itemsize = 1 if args.kv_dtype in ("int8", "float8_e4m3fn", "float8_e5m2") else 2
    reference_case, ratio_name = replace(case, kv_dtype=None, options={}), ", bfloat16 us / us"
    if args.update:
        reference_case, ratio_name = replace(case, update=False), ", us / read-only us"
    compares = args.update or args.kv_dtype
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other_folder:
        kernel = tpusim.Kernel(kernel_bundles(case, folder), args.chip)
        reference = tpusim.Kernel(kernel_bundles(reference_case, other_folder), args.chip) if compares else None
        columns = "modelled us, share of bandwidth, share of peak FLOP/s" + ratio_name * bool(compares)
        print(f"{args.chip}, page size {args.page_size}, pages in {args.form} form: {columns}")
        batches = workloads.batches()
        for name, batch in batches.items() if args.workload is None else [(args.workload, batches[args.workload])]:
            seconds = kernel.run(scalars(case, batch)).microseconds * 1e-6
            ratio = ""
            if reference:
                reference_seconds = reference.run(scalars(case, batch)).microseconds * 1e-6
                ratio = f"{seconds / reference_seconds if args.update else reference_seconds / seconds:6.3f}"
            of_bandwidth = workloads.useful_bytes(batch, MODEL.heads, kv_itemsize) / seconds / chip.hbm_bytes_per_s
            of_peak = workloads.useful_flops(batch, MODEL.heads) / seconds / chip.flops_per_s
            print(f"{name:24} {seconds * 1e6:8.1f} {of_bandwidth:6.2f} {of_peak:6.3f} {ratio}", flush=True)


if __name__ == "__main__":
    main()
