"""What installing and importing the package does, each claim tried in a fresh process."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import torch_rpa

REPO = Path(__file__).resolve().parent.parent


def run(*command, env=None, cwd=REPO):
    """Run a command and return its completed process; on failure, fail the test with all that it printed."""
    result = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        pytest.fail(f"{command} exited with {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def run_python(code, **kwargs):
    return run(sys.executable, "-c", code, **kwargs)


def pins(requirements):
    """{normalised name: version} of the requirements that are pinned with ==."""
    matches = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in requirements)
    return {match[1].replace("_", "-").lower(): match[2] for match in matches if match}


def locked_requirements():
    lines = (REPO / "requirements.txt").read_text().splitlines()
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


def test_every_locked_requirement_is_pinned():
    unpinned = [line for line in locked_requirements() if not re.fullmatch(r"[a-zA-Z0-9._-]+==[^\s;*]+", line)]
    assert not unpinned


def test_pins_of_the_extras_agree_with_the_lock():
    locked = pins(locked_requirements())
    of_extras = pins(importlib.metadata.requires("torch_rpa"))
    assert {"torch", "torch-xla", "jax", "jaxlib", "libtpu"} <= set(of_extras)
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


# ---- Installation ------------------------------------------------------------------------------------------


@pytest.fixture
def source_tree(tmp_path):
    """A copy of what the package is built from, without what earlier builds left."""
    tree = tmp_path / "source"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(REPO / name, tree)
    for name in ("torch_rpa", "csrc_stub"):
        shutil.copytree(REPO / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tree


NO_COMPILER = {"CC": "/nonexistent", "CXX": "/nonexistent", "TORCH_RPA_REQUIRE_NATIVE": "0"}


def pip_install(tree, target, env):
    """`pip install .` of the tree into a folder, without network; all that it and the build printed."""
    options = ["-v", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), "."]
    result = run(*command, env=env, cwd=tree)
    return result.stdout + result.stderr


@pytest.mark.slow
def test_install_without_a_compiler_is_pure_python_and_says_so_once(source_tree, tmp_path):
    target = tmp_path / "site"
    output = pip_install(source_tree, target, env=NO_COMPILER)
    assert output.count("building WITHOUT the native extension") == 1, output
    assert not list((target / "torch_rpa").glob("_C*"))
    assert (target / "torch_rpa" / "py.typed").exists()
    code = f"""
import sys, warnings
# An editable installation in the same environment would lend its own extension.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch_rpa
from torch_rpa import native
assert torch_rpa.__file__.startswith({str(target)!r}), torch_rpa.__file__
warnings.simplefilter("ignore")
assert not native.is_available()
"""
    run_python(code, env={"PYTHONPATH": str(target)}, cwd=tmp_path)


@pytest.mark.slow
def test_failed_build_takes_an_earlier_library_away(source_tree, tmp_path):
    earlier = tmp_path / "lib" / "torch_rpa" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    run(*command, env=NO_COMPILER, cwd=source_tree)
    assert not earlier.exists()


@pytest.mark.slow
def test_required_extension_makes_a_failed_build_an_error(source_tree):
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=source_tree,
        env=os.environ | NO_COMPILER | {"TORCH_RPA_REQUIRE_NATIVE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "the native extension of torch_rpa cannot be built" in result.stderr, result.stderr


@pytest.mark.slow
def test_a_wheel_holds_the_extension_with_a_kernel_for_each_vector_unit(source_tree, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tmp_path), str(source_tree)]
    run(*command, env={"TORCH_RPA_REQUIRE_NATIVE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    (wheel,) = tmp_path.glob("torch_rpa-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (library,) = [name for name in archive.namelist() if name.startswith("torch_rpa/_C.")]
        assert b"AVX512" in archive.read(library) or platform.machine() != "x86_64"
