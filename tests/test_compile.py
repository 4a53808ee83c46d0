"""torch.compile, torch.export, fake tensors, opcheck, and the refusal of derivatives."""

import shutil
from dataclasses import replace

import pytest
import torch
from batches import assert_matches_oracle, bytes_of, forget_new_tokens, make_batch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import cpp_extension

READ = torch.ops.rpa.ragged_paged_attention
UPDATE_ = torch.ops.rpa.ragged_paged_attention_update_
OPS = ("ragged_paged_attention", "ragged_paged_attention_with_lse", "ragged_paged_attention_update", UPDATE_.__name__)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def arguments(batch, name):
    new_tokens = (batch.k, batch.v) if "update" in name else ()
    return batch.q, *new_tokens, batch.kv_pages, *batch.metadata


def finite(batch):
    """The batch without its NaN, which opcheck would not find equal to itself."""
    return replace(batch, **{name: getattr(batch, name).nan_to_num() for name in ("q", "k", "v", "kv_pages")})


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("form", ["heads", "flat"])
def test_opcheck_passes(name, form):
    args = arguments(finite(make_batch(form=form)), name)
    options = {"sm_scale": 0.1, "sliding_window": 8, "sinks": torch.zeros(4)}
    torch.library.opcheck(getattr(torch.ops.rpa, name).default, args, options)


def fake(batch, mode):
    return replace(batch, **{n: mode.from_tensor(t) for n, t in vars(batch).items() if isinstance(t, torch.Tensor)})


@pytest.mark.parametrize("where", ["fake", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_and_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(where, dtype):
    batch = make_batch(dtype=dtype, kv_dtype=torch.float8_e4m3fn)
    mode = FakeTensorMode()
    abstract = fake(batch, mode) if where == "fake" else batch.to("meta")
    with torch.no_grad():
        real = *batch.read(), *batch.update(), batch.update(UPDATE_)
        results = *abstract.read(), *abstract.update(), abstract.update(UPDATE_)
    assert [r.shape for r in results] == [r.shape for r in real]
    assert [r.dtype for r in results] == [r.dtype for r in real]


@pytest.mark.skipif(shutil.which(cpp_extension.get_cxx_compiler()) is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_an_update_step_on_cpu():
    batch = forget_new_tokens(make_batch())

    @torch.compile(backend="inductor", fullgraph=True)
    def step(q, k, v, kv_pages, *metadata):
        return UPDATE_(q * 2.0, k, v, kv_pages, *metadata, sm_scale=0.5) + 1.0

    address = batch.kv_pages.data_ptr()
    before = replace(batch, kv_pages=batch.kv_pages.clone())
    with torch.no_grad():
        out = step(*arguments(batch, "update"))
    assert_matches_oracle(before, (out - 1.0).nan_to_num(), update=True, sm_scale=1.0)
    assert batch.kv_pages.data_ptr() == address
    assert torch.equal(bytes_of(batch.kv_pages), bytes_of(before.expected(update=True)[2]))


def test_openxla_compiles_a_read_only_step(xla):
    batch = make_batch()

    @torch.compile(backend="openxla")
    def step(q, kv_pages, *metadata):
        return READ(q * 2.0, kv_pages, *metadata, sm_scale=0.5)

    with torch.no_grad():
        assert_matches_oracle(batch, step(*arguments(batch.to(xla), "read")))


def test_export_keeps_the_op_and_a_dynamic_number_of_tokens():
    class Step(torch.nn.Module):
        def forward(self, q, k, v, kv_pages, *metadata):
            return UPDATE_(q, k, v, kv_pages, *metadata, sliding_window=5)

    tokens = torch.export.Dim("num_tokens", min=2)
    rows = {0: tokens}
    batch = finite(make_batch())
    with torch.no_grad():
        program = torch.export.export(
            Step(),
            arguments(batch, "update"),
            dynamic_shapes={"q": rows, "k": rows, "v": rows, "kv_pages": None, "metadata": (None,) * 4},
        )
        assert any("ragged_paged_attention_update" in str(node.target) for node in program.graph.nodes)
        other = forget_new_tokens(finite(make_batch(spare_rows=9)))
        expected = replace(other, kv_pages=other.kv_pages.clone())
        out = program.module()(*arguments(other, "update"))
    assert_matches_oracle(expected, out, update=True, sliding_window=5)


@pytest.mark.parametrize("name", OPS)
def test_an_input_that_requires_grad_is_refused_at_the_call(name, device):
    batch = make_batch().to(device)
    args = arguments(replace(batch, q=batch.q.clone().requires_grad_()), name)
    with pytest.raises(RuntimeError, match=r"is for inference and has no derivative.* q requires grad; call it under"):
        getattr(torch.ops.rpa, name)(*args)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", OPS)
def test_without_grad_mode_an_input_may_require_grad(name, context, device):
    batch = make_batch().to(device)
    args = arguments(replace(batch, q=batch.q.clone().requires_grad_()), name)
    with context():
        results = getattr(torch.ops.rpa, name)(*args)
    assert not any(t.requires_grad for t in (results if isinstance(results, tuple) else (results,)))


def test_with_grad_mode_inputs_that_need_no_grad_are_fine(device):
    batch = make_batch().to(device)
    assert not batch.read()[0].requires_grad


def test_an_input_that_requires_grad_is_refused_under_fake_tensors_too():
    batch = make_batch()
    batch = fake(replace(batch, q=batch.q.clone().requires_grad_()), FakeTensorMode())
    with pytest.raises(RuntimeError, match=r"is for inference"):
        batch.read()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    "grad_mode", [True, False], ids=["grad", "no_grad"]
)  # torch.no_grad() is for reverse mode only
def test_forward_mode_differentiation_is_refused_at_the_call(name, grad_mode, device):
    batch = make_batch().to(device)

    def call(q):
        return getattr(torch.ops.rpa, name)(*arguments(replace(batch, q=q), name))

    with (
        torch.set_grad_enabled(grad_mode),
        pytest.raises(RuntimeError, match=r"has no derivative, but q has a tangent"),
    ):
        torch.func.jvp(call, (batch.q,), (torch.ones_like(batch.q),))


def test_a_tangent_of_the_pages_or_the_sinks_is_refused_by_name(device):
    batch = make_batch().to(device)
    for name, tensor, call in (
        ("kv_pages", batch.kv_pages, lambda pages: replace(batch, kv_pages=pages).read()),
        ("v", batch.v, lambda v: replace(batch, v=v).update()),
        ("sinks", torch.zeros(4, device=device), lambda sinks: batch.read(sinks=sinks)),
    ):
        with pytest.raises(RuntimeError, match=f"but {name} has a tangent"):
            torch.func.jvp(call, (tensor,), (torch.ones_like(tensor),))
