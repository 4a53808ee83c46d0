"""A short soak: `make soak` runs the long one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "xla"])
def test_a_soak_loses_nothing_and_compiles_nothing_after_the_warm_up(device):
    """In a process of its own, with cancels, preemptions, streaming and sampling from several threads."""
    command = [sys.executable, "-m", "benchmarks.soak", "--device", device, "--requests", "400", "--clients", "4"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "nothing lost, nothing wrong, nothing compiled" in process.stdout
