"""What installing and importing the package does, each claim tried in a fresh process."""

import json
import re
import shutil
from pathlib import Path

import pytest

import torch_rpa
from tests.processes import REPO, project, requirements, run, run_python


def pins(requirements):
    """{normalised name: version} of the requirements that are pinned with ==."""
    matches = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in requirements)
    return {match[1].replace("_", "-").lower(): match[2] for match in matches if match}


def locked_requirements(file):
    lines = (REPO / file).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


# ---- Import ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules_after_import():
    """The names of all modules that a fresh process has loaded after `import torch_rpa`."""
    return set(json.loads(run_python("import json, sys, torch_rpa; print(json.dumps(list(sys.modules)))").stdout))


@pytest.mark.parametrize("heavy", ["jax", "jaxlib", "torch_xla", "torchax", "transformers"])
def test_import_leaves_heavy_packages_alone(modules_after_import, heavy):
    assert "torch_rpa" in modules_after_import
    assert heavy not in modules_after_import


def test_import_does_not_load_the_native_extension(modules_after_import):
    assert "torch_rpa._C" not in modules_after_import


def test_missing_extension_is_said_once_at_first_use_and_not_at_import():
    code = """
import sys, threading, warnings
sys.modules["torch_rpa._C"] = None  # its import fails as if it had not been built
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch_rpa
    from torch_rpa import native
    at_import = [w for w in caught if "torch_rpa" in str(w.message)]
    assert not at_import, at_import
    callers = [threading.Thread(target=native.is_available) for _ in range(8)]
    for caller in callers: caller.start()
    for caller in callers: caller.join()
    assert native.is_available() is False
    messages = [str(w.message) for w in caught if "torch_rpa" in str(w.message)]
    assert len(messages) == 1, messages
    assert "pure Python" in messages[0] and "C++ compiler" in messages[0], messages
"""
    run_python(code, env={"TORCH_RPA_NATIVE": "1"})


def test_turning_native_off_silences_the_message():
    code = """
import sys, warnings
from torch_rpa import native
sys.modules["torch_rpa._C"] = None
warnings.simplefilter("error")
assert native.is_available() is False
"""
    run_python(code, env={"TORCH_RPA_NATIVE": "0"})


# ---- Metadata ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-torchtpu.txt"])
def test_every_locked_requirement_is_pinned(file):
    unpinned = [line for line in locked_requirements(file) if not re.fullmatch(r"[a-zA-Z0-9._-]+==[^\s;*]+", line)]
    assert not unpinned


def test_pins_of_the_extras_agree_with_the_lock():
    locked = pins(locked_requirements("requirements.txt"))
    of_extras = pins(map(str, requirements(*project()["optional-dependencies"].keys() - {"tpu"})))
    assert {"torch", "torch-xla", "jax", "jaxlib", "libtpu"} <= set(of_extras)
    assert of_extras == {name: locked.get(name) for name in of_extras}


def test_pins_of_the_extra_for_torchtpu_agree_with_its_lock():
    locked = pins(locked_requirements("requirements-torchtpu.txt"))
    of_extras = pins(map(str, requirements("tpu")))
    assert {"torch-tpu", "jax", "jaxlib", "libtpu"} <= set(of_extras)
    assert of_extras == {name: locked.get(name) for name in of_extras}


def test_build_requirements_leave_torch_out():
    requires = re.search(r"^requires = \[(.*?)\]", (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    assert "setuptools" in requires[1]
    assert "torch" not in requires[1]


def test_type_marker_stands_in_the_package():
    assert Path(torch_rpa.__file__).with_name("py.typed").exists()


def test_make_help_lists_every_target():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    targets = re.search(r"^\.PHONY: (.*)$", (REPO / "Makefile").read_text(), re.MULTILINE)[1].split()
    printed = run("make", "help").stdout
    assert [target for target in targets if f"make {target} " not in printed] == []
