"""Compile the kernel for every chip, op, page size, model and dtype of pages, with libtpu and without a TPU.

    make compile-matrix                        all 672 cases, 1.5 to 2 hours on two cores; goes on where it stopped
    make compile-matrix ARGS="--chip v4"       one chip
    make compile-matrix ARGS="--table"         print the table of the results that are there

Results are appended to compile_matrix.csv beside this file; those of other kernel sources than today's are dropped.
The table is printed as Markdown.
"""

import argparse
import csv
import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

import torch_rpa
from torch_rpa.aot import OpCase, Report, compile_report
from torch_rpa.workloads import MODELS, scales

RESULTS = Path(__file__).with_name("compile_matrix.csv")
FACTORS = {
    "chip": ("v4", "v5e", "v5p", "v6e"),
    "op": ("read", "update"),
    "page_size": (16, 32, 64, 128),
    "model": tuple(MODELS),
    "kv_dtype": ("bfloat16", "float8_e4m3fn", "int8"),
}
COLUMNS = ("source", *FACTORS, "error", "seconds", "vmem_mib", "copies", "in_place")
# What decides how a case compiles.
SOURCES = ("kernels/*.py", "chips.py", "aot/op.py", "mask.py", "options.py", "validation.py", "workloads.py")
# And what its modelled time comes from.
TIMED_SOURCES = (*SOURCES, "aot/times.py", "tpu_time/*.py")


def all_points() -> list[dict]:
    """Every combination of the factors, as {factor: level}."""
    return [dict(zip(FACTORS, levels, strict=True)) for levels in itertools.product(*FACTORS.values())]


def pairwise(count: int) -> list[dict]:
    """``count`` points that cover as many pairs of levels of different factors as a greedy choice finds.

    Every pair would take as many points as the two largest factors have pairs: 28.
    """
    points, chosen, covered = all_points(), [], set()
    for _ in range(count):
        best = max(points, key=lambda point: len(pairs_of(point) - covered))
        chosen.append(best)
        covered |= pairs_of(best)
    return chosen


def pairs_of(point: dict) -> set:
    """The pairs of (factor, level) in a point."""
    return set(itertools.combinations(point.items(), 2))


def case_of(point: dict) -> OpCase:
    """What to compile for a point."""
    model = MODELS[point["model"]]
    return OpCase(
        chip=point["chip"],
        heads=model.heads,
        page_size=point["page_size"],
        kv_dtype=point["kv_dtype"],
        update=point["op"] == "update",
        sinks=model.sinks,
        options=model.options | scales(point["kv_dtype"]),
    )


def source_hash(sources=SOURCES) -> str:
    """Of the kernel's sources."""
    package = Path(torch_rpa.__file__).parent
    files = sorted(file for pattern in sources for file in package.glob(pattern))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def row_of(point: dict, report: Report, source: str) -> dict:
    """One line of the results."""
    return point | {
        "source": source,
        "error": report.error or "",
        "seconds": report.seconds,
        "vmem_mib": round(report.vmem_bytes / 2**20, 1),
        "copies": " ".join(report.copies),
        "in_place": "" if point["op"] == "read" or report.error else report.alias_bytes == report.page_bytes,
    }


def key_of(row: dict) -> tuple:
    return tuple(str(row[factor]) for factor in FACTORS)


def read_results(source: str) -> list[dict]:
    """The lines of the results that these sources gave."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["source"] == source]


def compile_points(points: list[dict], processes: int) -> None:
    """Compile those points that the results do not have yet."""
    source = source_hash()
    rows = read_results(source)
    done = {key_of(row) for row in rows}
    missing = [point for point in points if key_of(point) not in done]
    with RESULTS.open("w", newline="") as file, ThreadPoolExecutor(processes) as pool:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        compiles = {pool.submit(compile_report, case_of(point)): point for point in missing}
        try:
            for compile_ in tqdm(
                as_completed(compiles), total=len(points), initial=len(points) - len(missing), unit="case"
            ):
                writer.writerow(row_of(compiles[compile_], compile_.result(), source))
                file.flush()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def table(rows: list[dict]) -> str:
    """Markdown: for each model and chip how many cases compile, in how many seconds, with how much VMEM."""
    lines = [f"| | {' | '.join(FACTORS['chip'])} |", f"|---|{'---|' * len(FACTORS['chip'])}"]
    for model in MODELS:
        cells = [[row for row in rows if (row["model"], row["chip"]) == (model, chip)] for chip in FACTORS["chip"]]
        lines.append(f"| {model} | {' | '.join(map(_cell, cells))} |")
    bad = [row for row in rows if row["error"] or row["copies"] or row["in_place"] == "False"]
    lines += ["", f"{len(rows)} compiled; failed, with a copy, or not in place: {len(bad)}"]
    return "\n".join(
        lines + [f"- {', '.join(key_of(row))}: {row['error'] or row['copies'] or 'copied'}" for row in bad]
    )


def _cell(rows: list[dict]) -> str:
    good = [row for row in rows if not row["error"]]
    if not good:
        return f"0 of {len(rows)}"
    seconds, vmem = ([float(row[name]) for row in good] for name in ("seconds", "vmem_mib"))
    return f"{len(good)} of {len(rows)}: {min(seconds):.0f}-{max(seconds):.0f} s, {max(vmem):.0f} MiB"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=FACTORS["chip"], help="only this chip")
    parser.add_argument("--limit", type=int, help="only so many cases, those of the pairwise subset")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="compiles at a time")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    args = parser.parse_args()
    if not args.table:
        points = pairwise(args.limit) if args.limit else all_points()
        compile_points([point for point in points if args.chip in (None, point["chip"])], args.processes)
    print(table(read_results(source_hash())))


if __name__ == "__main__":
    main()
