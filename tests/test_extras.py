"""A package that is missing is named, with the command that installs it."""

import importlib
import re
import sys

import pytest
import torch

import torch_rpa
from tests.processes import REPO, project, run
from torch_rpa import extras, workloads


@pytest.fixture
def missing(monkeypatch):
    """Makes a package look as if it were not installed, and what has imported it as if it had not."""

    def hide(name, *importers):
        monkeypatch.setattr("torch_rpa.bridges._bridges", {})  # of the tests before
        monkeypatch.setitem(sys.modules, name, None)
        for importer in importers:
            monkeypatch.delitem(sys.modules, importer, raising=False)

    return hide


def says(extra, *words):
    """For ``pytest.raises``: the words, and the command of the extra at the end."""
    return ".*".join(map(re.escape, (*words, f'pip install "torch_rpa[{extra}]"'))) + "$"


def test_the_xla_device_without_torch_xla(missing):
    missing("torch_xla", "torch_rpa.bridges.torch_xla.bridge")
    with pytest.raises(ModuleNotFoundError, match=says("xla", 'device "xla"', "torch_xla")):
        torch_rpa.empty_kv_pages(2, 16, 2, 64, dtype=torch.float32, device="xla")


def test_the_demo_on_the_xla_device_without_torch_xla(missing, capsys):
    pytest.importorskip("tqdm")
    from torch_rpa import demo

    missing("torch_xla", "torch_rpa.bridges.torch_xla.bridge")
    assert demo.main([]) == 1
    assert re.search(says("xla", "torch_xla"), capsys.readouterr().err.strip())


def test_the_demo_without_tqdm(missing):
    missing("tqdm", "torch_rpa.demo")
    with pytest.raises(ModuleNotFoundError, match=says("demo", "torch_rpa.demo", "tqdm")):
        importlib.import_module("torch_rpa.demo")


def test_the_models_without_transformers(missing):
    missing("transformers", "torch_rpa.hf")
    with pytest.raises(ModuleNotFoundError, match=says("hf", "torch_rpa.hf", "transformers")):
        importlib.import_module("torch_rpa.hf")


def test_the_batches_of_benchmarks_without_numpy(missing):
    missing("numpy")
    with pytest.raises(ModuleNotFoundError, match=says("aot", "numpy")):
        workloads.metadata([(1, 1)], 16, 1, 16)


@pytest.mark.parametrize("package", ["numpy", "tqdm", "jax", "libtpu"])
def test_the_aot_command_without_a_package_ends_with_its_name_in_one_line(package):
    pytest.importorskip("libtpu")
    code = f"""
import sys
sys.modules["torch"] = sys.modules["{package}"] = None
from torch_rpa.aot import __main__
sys.exit(__main__.main(["--chip", "v6e", "--heads", "32/8/128"]))
"""
    error = run(sys.executable, "-c", code, exit_code=1).stderr
    assert re.fullmatch("error: .*" + says("aot", package), error.strip())


def test_every_extra_that_a_message_names_exists():
    sources = "".join(file.read_text() for file in (REPO / "torch_rpa").rglob("*.py"))
    named = set(re.findall(r'(?:from_extra|install_command)\("(\w+)"|extra="(\w+)"', sources))
    assert {a or b for a, b in named} >= {"aot", "demo", "xla"}
    assert {a or b for a, b in named} <= set(project()["optional-dependencies"])


def test_an_error_of_a_package_that_is_there_stays_as_it_is():
    with pytest.raises(OSError, match="no space"), extras.from_extra("xla", "this"):
        raise OSError("no space")
