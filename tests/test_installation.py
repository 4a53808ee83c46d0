"""What a user gets who installs the package: as a wheel, as an sdist, in place, with and without a compiler."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.processes import REPO, environment_beside_the_pinned_packages, run

pytestmark = pytest.mark.slow

NO_COMPILER = {"CC": "/nonexistent", "CXX": "/nonexistent", "TORCH_RPA_REQUIRE_NATIVE": "0"}
# ninja of this environment compiles files side by side.
COMPILER = {"TORCH_RPA_REQUIRE_NATIVE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
PIP_OPTIONS = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")


@pytest.fixture
def clone(tmp_path):
    """What a fresh clone holds, in a folder that is named like the package."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("this is no git repository")
    for name in filter(None, listed.stdout.split("\0")):
        target = tmp_path / "torch_rpa" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (REPO / name).exists():  # otherwise it is removed and not committed yet
            shutil.copy(REPO / name, target)
    return tmp_path / "torch_rpa"


@pytest.fixture
def python(tmp_path):
    """The Python of an environment that has the pinned packages, and torch_rpa not yet."""
    return environment_beside_the_pinned_packages(tmp_path / "environment")


def pip(python, command, *arguments, env, cwd=REPO):
    """All that pip and the build printed."""
    result = run(sys.executable, "-m", "pip", "--python", python, command, *PIP_OPTIONS, *arguments, env=env, cwd=cwd)
    return result.stdout + result.stderr


def run_installed(python, *arguments, cwd):
    """The environment's Python, run; it sees no torch_rpa but the one that is installed."""
    return run(python, *arguments, env={"PYTHONPATH": ""}, cwd=cwd)


def sdist_of(tree, folder):
    """Build an sdist as an installer does, with its hook."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=tree)
    (sdist,) = folder.glob("torch_rpa-*.tar.gz")
    return sdist


def test_a_wheel_runs_an_op_by_its_native_extension_with_a_kernel_for_each_vector_unit(clone, python, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    pip(python, "wheel", "--wheel-dir", tmp_path, clone, env=COMPILER)
    (wheel,) = tmp_path.glob("torch_rpa-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (library,) = [name for name in archive.namelist() if name.startswith("torch_rpa/_C.")]
        assert b"AVX512" in archive.read(library) or platform.machine() != "x86_64"
    pip(python, "install", wheel, env={})
    op = run_installed(python, clone / "tests" / "one_op.py", "cpu", cwd=tmp_path)
    assert str(tmp_path / "environment") in op.stdout
    assert "pure Python" not in op.stderr, op.stderr


def test_an_sdist_without_a_compiler_runs_an_op_in_python_and_says_why_at_the_build_and_afterwards(
    clone, python, tmp_path
):
    sdist = sdist_of(clone, tmp_path)
    printed = pip(python, "install", "-v", sdist, env=NO_COMPILER)
    assert printed.count("building WITHOUT the native extension") == 1, printed
    (package,) = (tmp_path / "environment").glob("lib/*/site-packages/torch_rpa")
    assert not list(package.glob("_C*"))
    assert (package / "py.typed").exists()
    op = run_installed(python, clone / "tests" / "one_op.py", "cpu", cwd=tmp_path)
    assert str(package) in op.stdout
    assert "there is no C++ compiler" in op.stderr, op.stderr
    assert "pip install --no-build-isolation ." in op.stderr, op.stderr


def test_an_sdist_holds_every_file_of_the_clone(clone, tmp_path):
    files = {str(file.relative_to(clone)) for file in clone.rglob("*") if file.is_file()}
    with tarfile.open(sdist_of(clone, tmp_path)) as archive:
        packed = {member.name.partition("/")[2] for member in archive.getmembers()}
    assert files - packed == set()


def test_an_editable_installation_wins_over_a_clone_in_the_current_folder(clone, python, tmp_path):
    pip(python, "install", "-e", clone, env=NO_COMPILER)
    assert clone.parent == tmp_path
    assert clone.name == "torch_rpa"
    code = "import torch_rpa; print(torch_rpa.ragged_paged_attention.__name__, torch_rpa.__file__)"
    printed = run_installed(python, "-c", code, cwd=clone.parent).stdout
    assert printed.split() == ["ragged_paged_attention", str(clone / "torch_rpa" / "__init__.py")]


def test_a_failed_build_takes_an_earlier_library_away_and_leaves_the_reason(clone, tmp_path):
    earlier = tmp_path / "lib" / "torch_rpa" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib"]
    run(*command, env=NO_COMPILER, cwd=clone)
    assert not earlier.exists()
    assert "C++ compiler" in earlier.with_name("no_native.txt").read_text()


def test_a_required_extension_makes_a_failed_build_an_error(clone):
    required = NO_COMPILER | {"TORCH_RPA_REQUIRE_NATIVE": "1"}
    result = run(sys.executable, "setup.py", "build_ext", env=required, cwd=clone, exit_code=1)
    assert "the native extension of torch_rpa cannot be built" in result.stderr, result.stderr
