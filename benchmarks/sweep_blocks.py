"""Are the key blocks that ``kernels/tuning.py`` picks good ones? Modelled times with them, with half and with double.

    python -m benchmarks.sweep_blocks                    compile what is missing (resumable), then print the table
    python -m benchmarks.sweep_blocks --table            print the table of benchmarks/sweep_blocks.csv

One compile of a model's attention for a chip gives the time of decode (the geometric mean over the decode batches of
``workloads.py``) and of prefill (over the others), by ``torch_rpa.tpu_time``; nothing is measured. Results of other
sources than today's are dropped.
"""

import argparse
import csv
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

from tqdm import tqdm

from benchmarks.compile_matrix import TIMED_SOURCES, source_hash
from torch_rpa import tpu_time, workloads
from torch_rpa.aot.op import OpCase, compile_report, kernel_config
from torch_rpa.aot.times import scalars

RESULTS = Path(__file__).with_suffix(".csv")
CHIPS = ("v6e", "v5e")
PAGE_SIZE = 128
RULE = "rule"
CHOICES = {RULE: 1, "half": 0.5, "double": 2}  # keys of a block, in those of the rule
COLUMNS = ("source", "chip", "model", "choice", "block_keys", "decode_us", "prefill_us", "error")


def case_of(chip: str, name: str, choice: str) -> OpCase:
    model = workloads.MODELS[name]
    case = OpCase(chip, model.heads, page_size=PAGE_SIZE, sinks=model.sinks, options=model.options, projections=False)
    if choice == RULE:
        return case
    pages = int(kernel_config(case).block_pages * CHOICES[choice])
    return replace(case, options=model.options | {"num_kv_pages_per_block": pages})


def modelled(case: OpCase) -> dict[str, float | str]:
    """Modelled us of the two kinds of batches, or why there are none."""
    if case.options.get("num_kv_pages_per_block") == 0:
        return {"error": "less than a page"}
    with tempfile.TemporaryDirectory() as folder:
        report = compile_report(case, folder)
        if report.error:
            return {"error": "does not fit VMEM" if "vmem" in report.error.lower() else report.error}
        try:
            return {"block_keys": report.block_keys} | _times(case, tpu_time.Kernel(folder, case.chip))
        except NotImplementedError as error:
            return {"block_keys": report.block_keys, "error": f"not modelled: {error}"}


def _times(case: OpCase, kernel) -> dict[str, float]:
    times = {"decode_us": [], "prefill_us": []}
    for batch in workloads.batches().values():
        kind = "decode_us" if workloads.decodes_only(batch) else "prefill_us"
        times[kind].append(kernel.run(scalars(case, batch)).microseconds)
    return {kind: round(geometric_mean(us), 1) for kind, us in times.items()}


def read_results() -> list[dict]:
    if not RESULTS.exists():
        return []
    source = source_hash(TIMED_SOURCES)
    with RESULTS.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["source"] == source]


def sweep(points) -> None:
    """Model the points that the results do not have yet; each is written at once."""
    rows, source = read_results(), source_hash(TIMED_SOURCES)
    done = {tuple(row[name] for name in COLUMNS[1:4]) for row in rows}
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        for point in tqdm([point for point in points if point not in done], unit="compile"):
            named = dict(zip(COLUMNS, (source, *point), strict=False))
            writer.writerow(named | modelled(case_of(*point)))
            file.flush()


def table(rows: list[dict]) -> str:
    """Markdown: keys of a block, us of decode / prefill, and how much longer the rule's take than the best."""
    lines = [f"| us, modelled | {' | '.join(CHOICES)} | rule / best |", f"|---|{'---|' * (len(CHOICES) + 1)}"]
    for chip, model in itertools.product(CHIPS, workloads.MODELS):
        of_shape = {row["choice"]: row for row in rows if (row["chip"], row["model"]) == (chip, model)}
        if RULE not in of_shape or of_shape[RULE]["error"]:
            continue
        cells = [_cell(of_shape.get(choice)) for choice in CHOICES]
        ratios = [_over_best(of_shape, kind) for kind in ("decode_us", "prefill_us")]
        lines.append(f"| {chip}, {model} | {' | '.join(cells)} | {ratios[0]:.2f} / {ratios[1]:.2f} |")
    return "\n".join(lines)


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    if row["error"]:
        return row["error"]
    return f"{row['block_keys']}: {float(row['decode_us']):.0f} / {float(row['prefill_us']):.0f}"


def _over_best(of_shape: dict, kind: str) -> float:
    times = {choice: float(row[kind]) for choice, row in of_shape.items() if not row["error"]}
    return times[RULE] / min(times.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=CHIPS)
    parser.add_argument("--model", nargs="+", choices=workloads.MODELS, default=list(workloads.MODELS))
    parser.add_argument("--choice", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--table", action="store_true", help="compile nothing")
    args = parser.parse_args()
    if not args.table:
        sweep(itertools.product(args.chip, args.model, args.choice))
    print(table(read_results()))


if __name__ == "__main__":
    main()
