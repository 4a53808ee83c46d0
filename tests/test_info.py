"""`python -m torch_rpa.info` says what is there, and for what is missing the command that mends it."""

import importlib

import pytest

from tests.processes import project, run_python
from torch_rpa import info, native

MISSING = "no_such_package_anywhere"


def test_it_names_every_package_and_device_and_ends_with_0(capsys, monkeypatch):
    monkeypatch.setenv("TORCH_RPA_CHECK", "1")
    monkeypatch.setattr(info, "xla_tensors", lambda: ("PJRT CPU, plain XLA ops", None))
    assert info.main() == 0
    printed = capsys.readouterr().out
    assert "torch_rpa " in printed.splitlines()[0]
    assert all(f"\n  {name}" in printed for name in (*info.PACKAGES, "CPU tensors", "XLA tensors"))
    assert "TORCH_RPA_CHECK" in printed


def test_a_missing_package_comes_with_the_command_of_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(info.PACKAGES, MISSING, ("tests", info.install_command("hf")))
    found = info.package(MISSING)
    assert found == (MISSING, "missing, needed for tests", 'pip install "torch_rpa[hf]"')
    info.print_mends([found])
    assert capsys.readouterr().out == f'\nto mend\n  {MISSING}:\n    pip install "torch_rpa[hf]"\n'


def test_a_package_that_cannot_be_imported_says_why(monkeypatch):
    def fail(name):
        raise OSError("libtorch.so: undefined symbol\nand more")

    monkeypatch.setattr(importlib, "import_module", fail)
    found = info.package("torch")
    assert found.state.endswith("but its import fails: libtorch.so: undefined symbol")
    assert found.mend == info.INSTALL_TORCH


def test_a_missing_extension_comes_with_its_reason_and_how_to_build_it(monkeypatch):
    monkeypatch.setattr(native, "why_missing", lambda: "there is no C++ compiler")
    state, mend = info.cpu_tensors()
    assert "there is no C++ compiler" in state
    assert "pip install --no-build-isolation ." in mend


def test_an_extension_that_is_turned_off_is_not_missing(monkeypatch):
    monkeypatch.setattr(native, "why_missing", lambda: None)
    monkeypatch.setenv("TORCH_RPA_NATIVE", "0")
    state, mend = info.cpu_tensors()
    assert "TORCH_RPA_NATIVE=0" in state
    assert mend is None


def test_a_device_that_cannot_be_used_says_why_in_one_line():
    def fail():
        raise RuntimeError("no TPU\nstack trace")

    assert info.device("XLA tensors", fail).state == "not usable: no TPU"


@pytest.mark.parametrize("command", [command for _, command in info.PACKAGES.values() if "torch_rpa[" in command])
def test_every_command_names_an_extra_that_exists(command):
    assert command.partition("[")[2].partition("]")[0] in project()["optional-dependencies"]


def test_without_torch_it_says_how_to_install_it_and_ends_with_1():
    code = "import sys; sys.modules['torch'] = None; from torch_rpa import info; sys.exit(info.main())"
    printed = run_python(code, exit_code=1).stdout
    assert info.INSTALL_TORCH in printed
    assert "CPU tensors  not without the packages that are missing" in printed
