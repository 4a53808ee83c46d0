"""What is installed, what it runs on, and what to type for whatever is missing: ``python -m torch_rpa.info``."""

import importlib
import logging
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch_rpa
from torch_rpa.extras import install_command

INSTALL_TORCH = "pip install torch==2.9.0 --index-url https://download.pytorch.org/whl/cpu"
# What is imported -> what it is for, and the command that installs it.
PACKAGES = {
    "torch": ("everything but torch_rpa.kernels", INSTALL_TORCH),
    "torch_xla": ('device "xla"', install_command("xla")),
    "jax": ('device "xla"', install_command("xla")),
    "libtpu": ("TPUs, and torch_rpa.aot", install_command("xla")),
    "transformers": ("torch_rpa.hf", install_command("hf")),
}
SETTINGS = ("PJRT_DEVICE", "TORCH_RPA_CHECK", "TORCH_RPA_NATIVE", "TORCH_RPA_XLA_KERNEL")


class Finding(NamedTuple):
    """One line of the answer, and what mends it where something is missing."""

    name: str
    state: str
    mend: str | None = None


def main() -> int:
    """Print everything; the exit code is 1 where not even CPU tensors work."""
    logging.disable(logging.WARNING)  # torch_xla's, about the device that it picks, which is printed here
    settings = [Finding(name, os.environ[name]) for name in SETTINGS if name in os.environ]  # torch_xla adds its own
    packages = [package(name) for name in PACKAGES]
    devices = [device("CPU tensors", cpu_tensors), device("XLA tensors", xla_tensors)]
    print(f"torch_rpa {torch_rpa.__version__} in {Path(torch_rpa.__file__).parent}")
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print_section("packages", packages)
    print_section("devices", devices)
    print_section("settings", settings)
    print_mends([finding for finding in packages + devices if finding.mend])
    return 1 if packages[0].mend else 0


def package(name: str) -> Finding:
    """The version of a package, or why it cannot be imported."""
    needed_for, command = PACKAGES[name]
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Finding(name, f"missing, needed for {needed_for}", command)
    try:
        module = importlib.import_module(name)
    except Exception as error:  # built for another torch, a library that is not there, ...
        return Finding(name, f"{installed}, but its import fails: {first_line(error)}", command)
    return Finding(name, getattr(module, "__version__", installed))  # torch's own names its build, such as +cpu


def device(name: str, ask: Callable[[], tuple[str, str | None]]) -> Finding:
    """What a device computes with; a device without its packages, which are listed already, has nothing of its own."""
    try:
        return Finding(name, *ask())
    except ImportError:
        return Finding(name, "not without the packages that are missing")
    except Exception as error:
        return Finding(name, f"not usable: {first_line(error)}")


def cpu_tensors() -> tuple[str, str | None]:
    """What computes on CPU tensors, and what would mend it."""
    import torch

    from torch_rpa import native

    reason = native.why_missing()
    if reason is not None:
        return f"pure Python, slower: {reason}", native.HOW_TO_BUILD
    if os.environ.get("TORCH_RPA_NATIVE") == "0":
        return "pure Python: TORCH_RPA_NATIVE=0 turns the native extension off", None
    return f"native extension, {torch.backends.cpu.get_cpu_capability()}", None


def xla_tensors() -> tuple[str, None]:
    """What stands behind device "xla", and what computes there."""
    from torch_rpa import bridges

    bridge = bridges.of("xla")
    if bridge.device_kind() == "tpu":
        return f"TPU {bridge.chip_name() or 'of a kind not known here'}, Pallas kernel", None
    return "PJRT CPU, plain XLA ops", None


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def print_section(title: str, findings: list[Finding]) -> None:
    if not findings:
        return
    width = max(len(finding.name) for finding in findings)
    print(f"\n{title}")
    for finding in findings:
        print(f"  {finding.name.ljust(width)}  {finding.state}")


def print_mends(findings: list[Finding]) -> None:
    """Each command once, after the names of what it mends."""
    commands: dict[str, list[str]] = {}
    for finding in findings:
        commands.setdefault(finding.mend, []).append(finding.name)
    print("\nto mend" if commands else "\nNothing is missing.")
    for command, names in commands.items():
        print(f"  {', '.join(names)}:\n    {command}")


if __name__ == "__main__":
    sys.exit(main())
