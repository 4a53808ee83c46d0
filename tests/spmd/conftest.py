"""Tests of several chips: PyTorch/XLA with four virtual CPU devices and SPMD on, which is for a whole process.

``tests/test_sharding.py`` runs this folder in a process of its own.
"""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "hf"))  # its tiny models
os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4")

import numpy as np
import pytest
import torch
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr

import torch_rpa


@pytest.fixture(scope="session", autouse=True)
def spmd():
    xr.use_spmd()
    assert xr.global_runtime_device_count() == 4


@pytest.fixture
def mesh():
    """Four chips along the axis "model", which heads are sharded over until the test ends."""
    mesh = xs.Mesh(np.arange(4), (4,), ("model",))
    torch_rpa.sharding.use_mesh(mesh, "model")
    yield mesh
    torch_rpa.sharding.use_mesh(None)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
