"""Which models fit on which chips, and how fast they will be: `python -m torch_rpa.aot` for all of them.

    make aot-matrix                            writes the table to README.md; goes on where it stopped
    make aot-matrix ARGS="--chip v6e"          compiles for one chip only

Each model gets the fewest chips that hold it. Results are appended to aot_matrix.jsonl beside this file; those of other
sources than today's are not used again.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from benchmarks import compile_matrix
from benchmarks.readme import README, with_table
from torch_rpa import workloads
from torch_rpa.aot import models, table
from torch_rpa.aot.answer import answer
from torch_rpa.aot.plan import DEFAULT_CONTEXT, Plan

RESULTS = Path(__file__).with_name("aot_matrix.jsonl")
CHIPS = ("v4", "v5e", "v5p", "v6e")
SOURCES = (*compile_matrix.TIMED_SOURCES, "aot/plan.py")
NUM_CHIPS = (1, 2, 4, 8, 16)


def smallest_plan(name: str, chip: str) -> Plan:
    """A model on the fewest chips that hold it."""
    model = models.of_name(name)
    plan = Plan(chip, model, max_context=min(DEFAULT_CONTEXT, model.longest))
    plans = [replace(plan, num_chips=n) for n in NUM_CHIPS]
    return next((p for p in plans if not p.problems() and not p.hbm_problem()), plans[-1])


def read_results() -> dict[tuple[str, str], dict]:
    """(model, chip) -> what today's sources gave."""
    if not RESULTS.exists():
        return {}
    results, source = map(json.loads, RESULTS.read_text().splitlines()), compile_matrix.source_hash(SOURCES)
    return {(r["model"], r["chip"]): r for r in results if r["source"] == source}


def compile_missing(chips) -> None:
    done, source = read_results(), compile_matrix.source_hash(SOURCES)
    points = [(name, chip) for chip in chips for name in workloads.MODELS]
    with RESULTS.open("a") as file, tqdm(points, unit="model", position=1) as bar:
        for name, chip in bar:
            if (name, chip) in done:
                continue
            bar.set_description(f"{name} on {chip}")
            found = json.loads(table.as_json(answer(smallest_plan(name, chip), reading=False)))
            file.write(json.dumps({"source": source, **found}) + "\n")
            file.flush()


def markdown(results: dict) -> str:
    """One row for each model, one column for each chip, as far as there are results."""
    chips = [chip for chip in CHIPS if any(chip == of for _, of in results)]
    lines = [f"| | {' | '.join(chips)} |", f"|---|{'---|' * len(chips)}"]
    for name in [name for name in workloads.MODELS if any(name == of for of, _ in results)]:
        cells = [_cell(results.get((name, chip))) for chip in chips]
        lines.append(f"| {name.removesuffix('-on-8-chips')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(result: dict | None) -> str:
    if result is None:
        return "-"
    if result["problems"]:
        return result["problems"][0].partition(" (")[0]  # without what libtpu said
    chips, tokens = result["num_chips"], result["memory"]["cache_tokens"]
    steps = " / ".join(f"{1e3 * sum(step.values()):.1f}" for step in result["steps"].values())
    return f"{chips} chip{'s' * (chips > 1)}, {tokens / 1000:.0f}k tokens" + (f", {steps} ms" if steps else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=CHIPS, help="compile for these only")
    compile_missing(parser.parse_args().chip)
    README.write_text(with_table("fits", markdown(read_results())))


if __name__ == "__main__":
    main()
