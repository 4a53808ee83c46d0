"""Python in processes and environments of their own, for tests of what a user types."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPO = Path(__file__).resolve().parent.parent


def run(*command, env=None, cwd=REPO, exit_code=0):
    """Run a command and return its completed process; if it exits otherwise, fail the test with all that it printed."""
    result = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if result.returncode != exit_code:
        pytest.fail(f"{command} exited with {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def run_python(code, **kwargs):
    return run(sys.executable, "-c", code, **kwargs)


def project() -> dict:
    """The table "project" of pyproject.toml."""
    return tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def requirements(*extras) -> list[Requirement]:
    """What torch_rpa asks for with these extras, those that they name in turn included."""
    found = [Requirement(line) for line in project()["dependencies"]]
    for extra in extras:
        for requirement in map(Requirement, project()["optional-dependencies"][extra]):
            found += requirements(*requirement.extras) if requirement.name == "torch_rpa" else [requirement]
    return found


def environment_beside_the_pinned_packages(folder: Path) -> Path:
    """The Python of a new virtual environment that has the packages of this one, but not its torch_rpa."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # Of a folder that a path entry names no .pth file is read, and so none of an editable installation.
    (site_packages / "pinned.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def site_of_extras(folder: Path, *extras: str) -> Path:
    """A folder of links to the installed packages that torch_rpa brings with these extras, and to no others.

    For ``python -S`` with this folder in PYTHONPATH: what a user has who has nothing else.
    """
    folder.mkdir()
    waiting, seen = requirements(*extras), set()
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of use on a GPU only: see requirements.txt
            continue
        _link(distribution, folder)
        waiting += [Requirement(line) for line in distribution.requires or ()]
    return folder


def _link(distribution: metadata.Distribution, folder: Path) -> None:
    for top in {file.parts[0] for file in distribution.files if file.parts[0] != ".."}:
        if not (folder / top).exists():
            (folder / top).symlink_to(distribution.locate_file(top))
