"""The ops on TorchTPU's tensors: eager and compiled, in place, without recompiling, with our messages.

That results are right for every option, dtype and shape is shown where it is for the other devices (tests/test_*.py,
which run on "tpu" here too).
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import testbed
import torch
from batches import assert_matches_oracle, bytes_of, forget_new_tokens, make_batch, random_batch
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_rpa
from torch_rpa import bridges
from torch_rpa.bridges.target import Target, using
from torch_rpa.bridges.torch_tpu import lowering

pytestmark = pytest.mark.usefixtures("no_grad")

UPDATE = torch.ops.rpa.ragged_paged_attention_update
UPDATE_ = torch.ops.rpa.ragged_paged_attention_update_


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True)


def update_(q, k, v, kv_pages, *metadata):
    return UPDATE_(q * 2.0, k, v, kv_pages, *metadata, sm_scale=0.5)


def arguments(batch):
    return batch.q, batch.k, batch.v, batch.kv_pages, *batch.metadata


def run_python(code):
    """In a process of its own, which finds what this one imports."""
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"]
    result = subprocess.run(command, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("first", ["torch_tpu", "torch_rpa"])
def test_importing_torch_rpa_is_enough_before_torch_tpu_or_after(first):
    second = {"torch_tpu": "torch_rpa", "torch_rpa": "torch_tpu"}[first]
    code = (
        f"import torch, {first}\nimport {second}, testbed\n"
        "from batches import make_batch, assert_matches_oracle\n"
        "batch = make_batch()\n"
        "assert_matches_oracle(batch, *batch.to(testbed.start()).read())\n"
    )
    run_python(code)


@pytest.mark.parametrize("form", ["heads", "flat"])
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_the_in_place_op_updates_the_pages_and_what_views_them(mode, form, tpu):
    batch = forget_new_tokens(make_batch(form=form))
    on_tpu = batch.to(tpu)
    view = on_tpu.kv_pages[1:]
    step = compiled(update_) if mode == "compiled" else update_
    for _ in range(3):
        out = step(*arguments(on_tpu))
    assert_matches_oracle(batch, out, update=True)
    expected = batch.expected(update=True)[2]
    assert torch.equal(bytes_of(on_tpu.kv_pages), bytes_of(expected))
    assert torch.equal(bytes_of(view), bytes_of(expected[1:]))


@pytest.mark.parametrize("copied", [torch.clone, lambda x: torch.empty_like(x).copy_(x)], ids=["clone", "copy_"])
@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e5m2], ids=str)
def test_in_eager_mode_a_copy_of_the_pages_stays_readable_after_an_update(copied, kv_dtype, tpu):
    compiled(lambda x: x + 1)(torch.ones(3, device=tpu))  # a process that has compiled shares buffers more
    batch = forget_new_tokens(make_batch(kv_dtype=kv_dtype))
    on_tpu = batch.to(tpu)
    before, copy = bytes_of(batch.kv_pages), copied(on_tpu.kv_pages)
    on_tpu.update(UPDATE_)
    assert torch.equal(bytes_of(copy), before)
    UPDATE_(*arguments(replace(on_tpu, kv_pages=copy)), **on_tpu.scales)
    assert torch.equal(bytes_of(on_tpu.kv_pages), bytes_of(batch.expected(update=True)[2]))
    assert torch.equal(bytes_of(copy), bytes_of(batch.expected(update=True)[2]))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_the_functional_ops_leave_their_input_valid(mode, tpu):
    batch = forget_new_tokens(make_batch())
    on_tpu = batch.to(tpu)
    step = compiled(lambda *args: UPDATE(*args)) if mode == "compiled" else UPDATE
    for _ in range(2):
        out, new_pages = step(*arguments(on_tpu))
        assert_matches_oracle(batch, out, update=True)
        assert torch.equal(bytes_of(new_pages), bytes_of(batch.expected(update=True)[2]))
        assert torch.equal(bytes_of(on_tpu.kv_pages), bytes_of(batch.kv_pages))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_forty_random_batches_of_one_shape_compile_once(mode, tpu):
    step = compiled(update_) if mode == "compiled" else update_
    for seed in (0, 1):  # eager copies what was uploaded, which is shared, the first time only
        step(*arguments(random_batch(seed).to(tpu))).cpu()
    before = len(testbed.programs()), bridges.of(tpu).compilations()[0]
    for seed in range(2, 42):
        batch = forget_new_tokens(random_batch(seed))
        assert_matches_oracle(batch, step(*arguments(batch.to(tpu))), update=True)
    assert (len(testbed.programs()), bridges.of(tpu).compilations()[0]) == before


def test_another_option_compiles_again(tpu):
    """The counter counts: without this the test above could pass for ever."""
    on_tpu = random_batch(0).to(tpu)
    on_tpu.read(sm_scale=0.25)[0].cpu()
    before = len(testbed.programs()), bridges.of(tpu).compilations()[0]
    on_tpu.read(sm_scale=0.26)[0].cpu()
    assert (len(testbed.programs()), bridges.of(tpu).compilations()[0]) == (before[0] + 1, before[1] + 1)


def test_a_repeated_call_is_looked_up(tpu):
    on_tpu = make_batch().to(tpu)
    on_tpu.read(sm_scale=0.375)
    before = lowering._kernel.cache_info()
    on_tpu.read(sm_scale=0.375)
    after = lowering._kernel.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)
    assert after.maxsize == bridges.interface.MAX_LOWERED_CALLS


def test_the_pallas_kernel_runs_in_the_interpreter(tpu, monkeypatch):
    monkeypatch.setenv("TORCH_RPA_XLA_KERNEL", "interpret")
    batch = forget_new_tokens(make_batch(((1, 21),), heads=(2, 1, 64)))
    out, new_pages = batch.to(tpu).update(sm_scale=0.125)
    assert_matches_oracle(batch, out, update=True, sm_scale=0.125)
    assert torch.equal(bytes_of(new_pages), bytes_of(batch.expected(update=True)[2]))


def test_an_unknown_kernel_choice_is_refused(tpu, monkeypatch):
    monkeypatch.setenv("TORCH_RPA_XLA_KERNEL", "fast")
    with pytest.raises(ValueError, match="TORCH_RPA_XLA_KERNEL must be one of auto, xla, interpret, got 'fast'"):
        make_batch().to(tpu).read()


def fake(batch):
    mode = FakeTensorMode()
    return replace(
        batch, **{name: mode.from_tensor(t) for name, t in vars(batch).items() if isinstance(t, torch.Tensor)}
    )


def test_fake_tensors_have_the_shapes_and_the_messages(tpu):
    batch = make_batch().to(tpu)
    out, lse = fake(batch).read()
    assert (out.shape, lse.shape, out.device) == (batch.q.shape, batch.q.shape[:2], batch.q.device)
    out, new_pages = fake(batch).update()
    assert (out.shape, new_pages.shape) == (batch.q.shape, batch.kv_pages.shape)
    assert fake(batch).update(UPDATE_).shape == batch.q.shape
    with pytest.raises(TypeError, match=r"kv_lens must be int32, got int64; write kv_lens.to\(torch.int32\)"):
        fake(replace(batch, kv_lens=batch.kv_lens.long())).read()


def test_int64_metadata_gets_our_message_under_torch_compile(tpu):
    batch = make_batch().to(tpu)
    with pytest.raises(Exception, match=r"page_indices must be int32, got int64; write page_indices.to\(torch.int32\)"):
        compiled(update_)(*arguments(replace(batch, page_indices=batch.page_indices.long())))


def test_empty_kv_pages_are_flat_on_a_tpu(tpu):
    sizes = {"dtype": torch.bfloat16, "device": tpu}
    with using(Target("tpu", "v6e")):
        pages = torch_rpa.empty_kv_pages(4, 16, 8, 128, **sizes)
        assert pages.shape == (4, 16, 2 * 8 * 128)
        assert torch_rpa.empty_kv_pages(4, 16, 1, 40, **sizes).shape == (4, 16, 2, 40)
    assert torch_rpa.empty_kv_pages(4, 16, 8, 128, **sizes).shape == (4, 16, 16, 128)
    assert not pages.cpu().any()


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("num_kv_heads", [4, 8])
def test_heads_form_that_the_update_kernel_cannot_address_is_refused_by_name(num_kv_heads, kv_dtype, tpu):
    batch = make_batch(heads=(8, num_kv_heads, 128), dtype=torch.bfloat16, kv_dtype=kv_dtype).to(tpu)
    with using(Target("tpu", "v6e")):
        for op in (UPDATE, UPDATE_):
            with pytest.raises(
                NotImplementedError, match=r"pages in heads form .* make them with torch_rpa.empty_kv_pages"
            ):
                batch.update(op)


NO_CLIENT = """
import testbed, torch
tpu = testbed.start()
from jax._src import xla_bridge
def started(*args, **kwargs):
    raise AssertionError("JAX's backends were started")
xla_bridge.backends = xla_bridge.get_backend = started
from batches import make_batch
from torch_rpa.bridges.target import Target, using
from torch_rpa.bridges.torch_tpu import lowering
from torch_rpa.bridges.configuration import Configuration
from torch_rpa import jax_names
torch.set_grad_enabled(False)
batch = make_batch(form="flat").to(tpu)
batch.read()
args = {n: getattr(batch, n) for n in ("q", "k", "v", "kv_pages", "kv_lens", "page_indices", "cu_q_lens", "num_seqs")}
configuration = Configuration.of_call("ragged_paged_attention_update", args, {})
function, shapes = configuration.for_target(lambda: Target("tpu", "v6e")).as_function()
assert "tpu_custom_call" in jax_names.lower(function, shapes, "tpu").as_text()
"""


def test_lowering_starts_no_client_of_jax():
    run_python(NO_CLIENT)
