"""Test-wide settings: the PJRT device, fast compiles, and the devices that a test runs on.

Without a TPU the XLA device is PJRT CPU; ``PJRT_DEVICE=TPU pytest`` runs the same tests on a TPU VM. The tests in
``without_torch/`` share this file, so only the fixtures import torch.

Tests on the XLA device have the marker ``xla``. Where torch_xla is not installed they are skipped, and files that need
JAX or transformers are not collected: with any torch that the package works with, what is left passes.
"""

import os
from importlib.util import find_spec

from devices import BRIDGED
from torchtpu import testbed

os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ["PJRT_DEVICE"] == "CPU":
    # Compiles about 8 times faster; the tests' arrays are small.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    # Each compiled program takes a few hundred memory maps; Linux gives a process 65530, and XLA crashes without.
    os.environ.setdefault("XLA_COMPILATION_CACHE_SIZE", "128")

if testbed.is_installed():
    testbed.prepare()

import pytest

_FILES_THAT_NEED = {
    "jax": ["without_torch/*", "test_aot.py", "test_kernels.py", "test_pallas.py", "test_tuning.py"],
    "transformers": ["hf/*", "test_aot_cli.py", "test_compilation_cache.py"],
}
collect_ignore_glob = [file for name, files in _FILES_THAT_NEED.items() if find_spec(name) is None for file in files]


def pytest_collection_modifyitems(items):
    for item in items:
        if "xla" in getattr(item, "fixturenames", ()):
            item.add_marker("xla")
        if item.get_closest_marker("xla") and find_spec("torch_xla") is None:
            item.add_marker(pytest.mark.skip(reason="torch_xla is not installed"))


@pytest.fixture(params=["cpu", *BRIDGED])
def device(request):
    """Each device that the ops run on, a ``torch.device``."""
    import torch

    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue(request.param)


@pytest.fixture
def xla():
    """The XLA device: PJRT CPU, or a TPU where there is one."""
    import torch
    import torch_xla  # noqa: F401  registers the device

    return torch.device("xla")


@pytest.fixture(scope="session")
def tpu():
    """TorchTPU's device, on the test bed a CPU."""
    return testbed.start()


@pytest.fixture
def no_grad():
    """Run the test as users run the ops: without grad mode."""
    import torch

    with torch.no_grad():
        yield
