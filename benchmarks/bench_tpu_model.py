"""Modelled time of the TPU kernel on workloads of Llama-3-8B, without a TPU: libtpu's bundles, executed.

    python -m benchmarks.bench_tpu_model --chip v6e                        ours, in about a minute
    python -m benchmarks.bench_tpu_model --kv-dtype bfloat16 int8          a column for each
    python -m benchmarks.bench_tpu_model --update                          the update beside it, and the ratio
    make bench-tpu                                                         v6e, v5e and 7x, beside both peers

Prints Markdown: us, and in brackets the share of HBM bandwidth that useful bytes get (decode), or the share of peak
FLOP/s that useful FLOPs get (/.xx, the others). Kernels alone, without the layout copies that XLA adds to the peers'
(ours needs none). 7x, which the pinned libtpu does not know, and v3 are compiled by the newer one of `make venv-next`.

Ours are timed by ``torch_rpa.tpu_time``, and by tpusim too where it stands in ../shared/tools beside the project: both
must agree. The peers need tpusim. The figures compare kernels; nothing here is a measurement.
"""

import argparse
import importlib
import itertools
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from benchmarks import peers
from torch_rpa import tpu_time, workloads
from torch_rpa.aot import OpCase, compile_report
from torch_rpa.aot.times import scalars
from torch_rpa.chips import CHIPS

REPO = Path(__file__).parents[1]
MODELLED = REPO / "torch_rpa" / "modelled.json"
CHOICES = ("v6e", "v5e", "7x")
KERNELS = ("ours", "v2", "v3")
UPDATE = ", update"
AGREEMENT = 0.01  # 7x: of two published bandwidths


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", nargs="+", choices=CHOICES, default=["v6e"])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["ours"])
    parser.add_argument("--page-size", type=int, default=128, help="of our pages; the peers' have 128 tokens")
    parser.add_argument("--kv-dtype", nargs="+", default=["bfloat16"], help="of our pages")
    parser.add_argument("--form", choices=("flat", "heads"), default="flat", help="of our pages")
    parser.add_argument("--update", action="store_true", help="ours: also the op that writes new tokens")
    parser.add_argument("--projections", action="store_true", help="ours between projections, with q and out in VMEM")
    parser.add_argument(
        "--save", action="store_true", help=f"write our times, of bfloat16 pages, to {MODELLED.relative_to(REPO)}"
    )
    parser.add_argument("--tools", type=Path, default=REPO.parent / "shared" / "tools", help="where tpusim is")
    return parser.parse_args()


def cases(kernel: str, chip: str, args) -> dict[str, OpCase]:
    """What to compile of a kernel for a chip, by the name of its column."""
    peer = OpCase(chip, workloads.MODELS["llama-3-8b"].heads)
    if kernel != "ours":
        return {f"{chip} {kernel}": peer}
    variant = {"page_size": args.page_size, "form": args.form, "projections": args.projections}
    variant["num_pages"] = peer.max_num_seqs * peer.context // args.page_size
    columns = {}
    for dtype, update in itertools.product(args.kv_dtype, (False, True) if args.update else (False,)):
        name = f"{chip} ours" + f", {dtype}" * (dtype != "bfloat16") + UPDATE * update
        columns[name] = replace(peer, kv_dtype=dtype, update=update, options=workloads.scales(dtype), **variant)
    return columns


def compile_ours(case: OpCase, dump_to: str) -> float:
    """Compile the op with libtpu's dumps; returns seconds."""
    python = str(peers.NEXT_PYTHON) if case.chip == "7x" else sys.executable
    report = compile_report(case, dump_to, python)
    if report.error:
        raise SystemExit(f"{case} does not compile: {report.error}")
    return report.seconds


def bundles_file(folder: str, name: str) -> str:
    """The bundles of a kernel whose name contains ``name``: of all in the dump, a kernel has the longest listing."""
    files = [f for f in Path(folder).glob("*-final_bundles.txt") if not {"TLP", "schedule"} & set(f.name.split("-"))]
    return str(max((f for f in files if name in f.name), key=lambda f: f.stat().st_size))


def modelled(kernel: str, case: OpCase, tpusim) -> tuple[float, dict[str, float]]:
    """Seconds of compiling, and modelled us of each workload."""
    with tempfile.TemporaryDirectory() as folder:
        if kernel == "ours":
            return compile_ours(case, folder), our_times(case, folder, tpusim)
        seconds = peers.compile_peer(kernel, case, folder)
        launches = [tpusim.Kernel(bundles_file(folder, name), case.chip) for name in peers.LAUNCHES[kernel]]
        return seconds, {
            name: sum(launch.run(peers.scalars(kernel, case, batch)).microseconds for launch in launches)
            for name, batch in workloads.batches().items()
        }


def our_times(case: OpCase, folder: str, tpusim) -> dict[str, float]:
    """Modelled us of each workload; where tpusim is there it must say the same within AGREEMENT."""
    kernel, times = tpu_time.Kernel(folder, case.chip), {}
    simulated = tpusim and tpusim.Kernel(bundles_file(folder, ""), case.chip)
    for name, batch in workloads.batches().items():
        operands = scalars(case, batch)
        times[name] = kernel.run(operands).microseconds
        if simulated and abs(simulated.run(operands).microseconds / times[name] - 1) > AGREEMENT:
            raise SystemExit(f"{case}, {name}: tpusim does not agree with {times[name]:.1f} us")
    return times


def cell(case: OpCase, batch, microseconds: float) -> str:
    kv_itemsize = workloads.itemsize(case.kv_dtype or case.dtype)
    share = workloads.share_of_peak(batch, case.heads, microseconds * 1e-6, CHIPS[case.chip], kv_itemsize)
    if workloads.decodes_only(batch):
        return f"{microseconds:.0f} ({share:.2f})"
    return f"{microseconds:.1f} (/{share:.2f})"


def ratio(columns, column: str, batch_name: str) -> str:
    """How much longer the update takes than the op that only reads."""
    if not column.endswith(UPDATE):
        return ""
    with_update, without = (columns[name][2][batch_name] for name in (column, column.removesuffix(UPDATE)))
    return f" x {with_update / without:.3f}"


def import_tpusim(tools: Path):
    """The module, or None where it is not."""
    if not (tools / "tpusim").is_dir():
        return None
    sys.path.insert(0, str(tools))
    return importlib.import_module("tpusim")


def main():
    args = parse_args()
    tpusim = import_tpusim(args.tools)
    if tpusim is None and args.kernels != ["ours"]:
        print(f"left out: the peers, which need tpusim; it is not in {args.tools}", file=sys.stderr)
        args.kernels = [kernel for kernel in args.kernels if kernel == "ours"]
    if not args.kernels:
        return
    columns = {}
    for chip, kernel in tqdm(list(itertools.product(args.chip, args.kernels)), unit="kernel"):
        for name, case in cases(kernel, chip, args).items():
            columns[name] = case, *modelled(kernel, case, tpusim)
    print(f"| us, modelled | {' | '.join(columns)} |")
    print(f"|---|{'---:|' * len(columns)}")
    for name, batch in workloads.batches().items():
        cells = [
            cell(case, batch, times[name]) + ratio(columns, column, name)
            for column, (case, _, times) in columns.items()
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| compile, s | {' | '.join(f'{seconds:.0f}' for _, seconds, _ in columns.values())} |")
    if args.save:
        ours = {chip: columns[f"{chip} ours"][2] for chip in args.chip}
        MODELLED.write_text(
            json.dumps({c: {n: round(t, 1) for n, t in ts.items()} for c, ts in ours.items()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
