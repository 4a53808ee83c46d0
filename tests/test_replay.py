"""A program of PyTorch/XLA that is traced once: what it does when it is dropped, and how programs are counted."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from torch_rpa import bridges
from torch_rpa.bridges import Programs

EVICTED = """
import torch, torch_xla
from torch_rpa import bridges
from torch_rpa.bridges.torch_xla.replay import Replay

torch.set_grad_enabled(False)
bridge, device, programs = bridges.of("xla"), torch.device("xla"), bridges.Programs()
cache, weight, x = (bridge.upload(torch.full((4,), value), device) for value in (0.0, 2.0, 3.0))

def trace():
    cache.add_(x)
    return [cache * weight]

def replay():
    return Replay(trace, [x], [cache], [weight], programs)

def run(step, value):
    (out,) = step.run([bridge.upload(torch.full((4,), value), device)])
    return out.cpu().tolist()

step = replay()
assert run(step, 1.0) == [2.0] * 4
assert programs.count == 1
for size in range(5, 10):  # other programs, more than the cache has room for
    bridge.run_pending([torch.ones(size, device=device) + x[0]])
try:
    run(step, 5.0)
except bridges.ProgramEvicted as error:
    assert "XLA_COMPILATION_CACHE_SIZE" in str(error)
else:
    raise AssertionError("not evicted")
assert cache.cpu().tolist() == [1.0] * 4  # nothing has run, nothing is lost
step = replay()
assert run(step, 5.0) == [12.0] * 4
assert run(step, 1.0) == [14.0] * 4
assert cache.cpu().tolist() == [7.0] * 4
assert programs.count == 2
"""


def test_an_evicted_program_says_so_and_nothing_is_lost():
    environment = os.environ | {"XLA_COMPILATION_CACHE_SIZE": "2"}
    result = subprocess.run([sys.executable, "-c", EVICTED], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_programs_are_counted_by_hash_and_only_so_many_are_kept():
    programs = Programs(max_programs=2)
    for program_hash in (b"a", b"b", b"a", b"c", b"a"):
        programs.add(program_hash)
    assert programs.count == 3
    programs.add(b"b")  # dropped as the oldest
    assert programs.count == 4
    programs.forget(b"a")
    programs.forget(b"never seen")
    programs.add(b"a")
    assert programs.count == 5
    assert len(programs._hashes) == 2


def test_programs_of_others_are_not_counted(xla):
    bridge, programs = bridges.of(xla), Programs()
    x = bridge.upload(torch.ones(3), xla)
    for _ in range(2):
        bridge.run_pending([x + 1], programs)
        bridge.run_pending([x + 2])
    assert programs.count == 1


@pytest.mark.parametrize("data", [np.arange(6, dtype=np.int32).reshape(2, 3), torch.ones(2, 3).bfloat16()], ids=type)
def test_uploaded_data_hangs_on_no_program_of_another_thread(data, xla):
    import torch_xla
    import torch_xla.core.xla_model as xm

    torch_xla.sync()
    uploaded = bridges.of(xla).upload(data, xla)
    xm.wait_device_ops()
    assert torch_xla._XLAC._unsafe_buffer_pointer(uploaded)  # without a sync
    other = threading.Thread(target=torch_xla.sync)
    other.start()
    other.join()
    assert uploaded.device == torch_xla.device()
    assert torch.equal(uploaded.cpu(), torch.as_tensor(data))


def test_cpu_and_meta_need_no_bridge():
    assert bridges.of("cpu") is None
    assert bridges.of(torch.device("meta")) is None


@pytest.fixture
def replayed(xla):
    """What a Replay takes, and a place for what happens in the middle of its trace."""
    bridge = bridges.of(xla)
    cache, weight, x = (bridge.upload(torch.full((4,), value), xla) for value in (0.0, 2.0, 3.0))
    happens = []

    def trace():
        hidden = x * weight
        for one in happens:
            one()
        cache.add_(hidden)
        return [cache * weight]

    return trace, [x], [cache], [weight], happens


def sync():
    import torch_xla

    torch_xla.sync()


@pytest.mark.xla
def test_a_trace_that_another_threads_sync_cuts_in_two_is_no_program(replayed, no_grad):
    from torch_rpa.bridges.torch_xla.replay import Replay

    *arguments, happens = replayed
    happens.append(sync)  # what was hidden is data now, with the values of this x
    with pytest.raises(bridges.TraceInterrupted):
        Replay(*arguments)
    happens.clear()
    step = Replay(*arguments)
    (x,), (cache,) = arguments[1:3]
    before = cache.cpu()[0].item()
    (out,) = step.run([bridges.of("xla").upload(torch.full((4,), 5.0), x.device)])
    assert out.cpu().tolist() == [2 * (before + 10)] * 4


@pytest.mark.xla
def test_a_program_with_an_array_of_its_own_is_known_by_its_second_trace(replayed, no_grad):
    from torch_rpa.bridges.torch_xla.replay import Replay

    trace, inputs, updated, constants, _ = replayed
    own = bridges.of("xla").upload(torch.full((4,), 7.0), inputs[0].device)

    def trace_with_its_own():
        (out,) = trace()
        return [out + own]

    with pytest.raises(bridges.TraceInterrupted) as error:
        Replay(trace_with_its_own, inputs, updated, constants)
    step = Replay(trace_with_its_own, inputs, updated, constants, former_hash=error.value.program_hash)
    before = updated[0].cpu()[0].item()
    (out,) = step.run(inputs)
    assert out.cpu().tolist() == [2 * (before + 6) + 7] * 4
