"""Leaving the process while a manager serves: the exit code is the program's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys, threading, time
sys.path[:0] = [{tests!r}]
from tiny_models import make_model
from torch_rpa import hf

model = hf.patch(make_model().to({device!r}), page_size=8, num_pages=64, max_num_seqs=4, token_buckets=(4, 32))
manager = model.init_continuous_batching()
manager.start()
manager.add_requests([[1, 2, 3]] * 8, max_new_tokens=200)
while manager.stats.num_steps < 5:
    time.sleep(0.001)
{leave}
"""
WAYS = {
    "return": ("", 0),
    "exception": ("raise KeyError('left')", 1),
    "sys.exit": ("sys.exit(3)", 3),
    "in a pause": ("manager.pause().__enter__(); sys.exit(4)", 4),
    "with a reader": ("threading.Thread(target=manager.get_result, daemon=True).start()", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize(("device", "way"), [("cpu", "return"), ("cpu", "in a pause"), *[("xla", way) for way in WAYS]])
def test_the_exit_code_is_the_programs_own(device, way):
    leave, code = WAYS[way]
    program = PROGRAM.format(tests=str(Path(__file__).parent), device=device, leave=leave)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == code, process.stderr
    assert "Aborted" not in process.stderr
