"""The commands read what was typed before they load what takes seconds."""

import re
import resource
import subprocess
import sys

import pytest

import torch_rpa

TYPED = [
    ["torch_rpa.aot", "--help"],
    ["torch_rpa.aot", "--chip", "v6"],
    ["torch_rpa.aot", "--chip", "v6e", "--model", "lama-3-8b"],
    ["torch_rpa.bench", "--help"],
    ["torch_rpa.demo", "--max-new-tokens", "0"],
    ["torch_rpa.info", "--help"],
]


@pytest.mark.parametrize("typed", TYPED, ids=" ".join)
def test_help_and_typos_take_less_than_a_second_of_cpu_and_load_no_large_package(typed):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", *typed]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", result.stderr, flags=re.MULTILINE))
    assert "torch_rpa" in imported
    assert imported.isdisjoint({"torch", "jax", "numpy", "transformers"})
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_every_command_starts_without_torch():
    assert {module for module, *_ in TYPED} == set(torch_rpa._COMMANDS)
