"""The way from XLA tensors to JAX: compiled once, updated in place, thread-safe, bounded, without a JAX client."""

import base64
import re
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from unittest import mock

import pytest
import torch
from batches import assert_matches_oracle, bytes_of, forget_new_tokens, make_batch, random_batch

pytestmark = pytest.mark.usefixtures("no_grad")

UPDATE_ = torch.ops.rpa.ragged_paged_attention_update_


def buffer_of(x):
    import torch_xla

    torch_xla.sync(wait=True)
    return torch_xla._XLAC._unsafe_buffer_pointer(x)


def compilations():
    from torch_rpa import bridges

    return bridges.of("xla").compilations()[0]


def test_fifty_random_batches_of_one_shape_compile_once(xla):
    def step(batch):
        out = batch.update(UPDATE_, sm_scale=0.125)
        buffer_of(batch.kv_pages)  # one program for each step
        return out.cpu()

    step(random_batch(0).to(xla))
    before = compilations()
    for seed in range(1, 51):
        batch = forget_new_tokens(random_batch(seed))
        assert_matches_oracle(batch, step(batch.to(xla)), update=True, sm_scale=0.125)
    assert compilations() == before


def test_another_shape_or_option_compiles_again(xla):
    """The counter counts: without this the test above could pass for ever."""
    batch = random_batch(0).to(xla)
    batch.update(UPDATE_, sm_scale=0.25)
    buffer_of(batch.kv_pages)
    before = compilations()
    batch.update(UPDATE_, sm_scale=0.26)
    buffer_of(batch.kv_pages)
    assert compilations() == before + 1


@pytest.mark.parametrize("form", ["heads", "flat"])
@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
def test_lazy_mode_updates_the_same_buffer(kv_dtype, form, xla):
    batch = forget_new_tokens(make_batch(kv_dtype=kv_dtype, form=form))
    on_xla = batch.to(xla)
    before = buffer_of(on_xla.kv_pages)
    for _ in range(3):
        on_xla.update(UPDATE_)
        assert buffer_of(on_xla.kv_pages) == before
    assert torch.equal(bytes_of(on_xla.kv_pages), bytes_of(batch.expected(update=True)[2]))


def test_compiled_mode_updates_the_same_buffer(xla):
    torch._dynamo.reset()
    batch = forget_new_tokens(make_batch())
    on_xla = batch.to(xla)

    @torch.compile(backend="openxla")
    def step(q, k, v, kv_pages, *metadata):
        return UPDATE_(q * 2.0, k, v, kv_pages, *metadata, sm_scale=0.5)

    before = buffer_of(on_xla.kv_pages)
    for _ in range(3):
        out = step(on_xla.q, on_xla.k, on_xla.v, on_xla.kv_pages, *on_xla.metadata)
        assert buffer_of(on_xla.kv_pages) == before
    assert_matches_oracle(batch, out, update=True)
    assert torch.equal(bytes_of(on_xla.kv_pages), bytes_of(batch.expected(update=True)[2]))


def test_empty_kv_pages_have_a_buffer_from_the_start(xla):
    """A lazy constant instead would make the first step another program than the second."""
    import torch_xla
    import torch_xla.core.xla_model as xm

    import torch_rpa

    pages = torch_rpa.empty_kv_pages(8, 16, 2, 64, dtype=torch.float32, device=xla)
    xm.wait_device_ops()
    assert torch_xla._XLAC._unsafe_buffer_pointer(pages)


def test_many_threads_may_call_at_once(xla):
    batches = [random_batch(seed) for seed in range(8)]
    on_xla = [batch.to(xla) for batch in batches]
    results, errors = {}, []

    def work(i):
        try:
            for repeat in range(15):  # new configurations as well as known ones
                results[i] = on_xla[i].read(sm_scale=0.5 + (i + repeat) % 3 / 64)[0]
            results[i] = on_xla[i].read(sm_scale=0.5)[0]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i, batch in enumerate(batches):
        expected = batch.to(xla).read(sm_scale=0.5)[0].cpu()
        assert torch.equal(results[i].cpu(), expected)


def test_the_cache_of_computations_is_bounded(xla, monkeypatch):
    from torch_rpa.bridges.interface import MAX_LOWERED_CALLS
    from torch_rpa.bridges.torch_xla import lowering

    assert lowering._computation.cache_info().maxsize == MAX_LOWERED_CALLS
    small = lru_cache(maxsize=2)(lowering._computation.__wrapped__)
    monkeypatch.setattr(lowering, "_computation", small)
    batch = make_batch()
    on_xla = batch.to(xla)
    for scale in (1.0, 0.5, 0.25, 1.0, 1.0):
        assert_matches_oracle(batch, *on_xla.read(sm_scale=scale), sm_scale=scale)
    info = small.cache_info()
    assert (info.currsize, info.misses, info.hits) == (2, 4, 1)


def test_an_unknown_kernel_choice_is_refused(xla, monkeypatch):
    monkeypatch.setenv("TORCH_RPA_XLA_KERNEL", "fast")
    with pytest.raises(ValueError, match="TORCH_RPA_XLA_KERNEL must be one of auto, xla, interpret, got 'fast'"):
        make_batch().to(xla).read()


def test_the_pallas_kernel_runs_in_the_interpreter_on_the_xla_device(xla, monkeypatch):
    monkeypatch.setenv("TORCH_RPA_XLA_KERNEL", "interpret")
    batch = make_batch(((1, 21), (5, 19)), heads=(4, 2, 64))
    out, lse = batch.to(xla).read(sm_scale=0.125)
    assert_matches_oracle(batch, out, lse, sm_scale=0.125)
    batch = forget_new_tokens(batch)
    out, new_pages = batch.to(xla).update(sm_scale=0.125)
    assert_matches_oracle(batch, out, update=True, sm_scale=0.125)
    assert torch.equal(bytes_of(new_pages), bytes_of(batch.expected(update=True)[2]))


# A TPU client's version as Cloud TPU prints it: the last line holds the build time in brackets.
VERSIONS = {
    "pinned_libtpu": "PJRT C API\nTFRT TPU v6 lite\nBuilt on Aug 15 2025 09:00:00 (1755248400) cl/795000000",
    "older_libtpu": "PJRT C API\nTFRT TPU v6 lite\nBuilt on May 1 2025 09:00:00 (1746090000) cl/750000000",
    "no_build_time": "interpreter",
}


@contextmanager
def tpu_vm(version=None):
    """A TPU VM whose TPU client, once jax starts it, has this version; None makes starting one an error."""
    from jax._src import cloud_tpu_init, xla_bridge

    def no_backends():
        raise AssertionError("JAX's backends were started")

    def get_backend(client=None):
        return client or (no_backends() if version is None else mock.Mock(platform_version=version))

    with (
        mock.patch.object(cloud_tpu_init, "running_in_cloud_tpu_vm", True),
        mock.patch.object(xla_bridge, "backends", no_backends),
        mock.patch.object(xla_bridge, "get_backend", get_backend),
    ):
        yield


def mosaic_version(hlo):
    """The version of the one Mosaic module in a serialized HLO module."""
    from jax._src.lib.mlir import ir

    (body,) = re.findall(rb'"body": ?"([A-Za-z0-9+/=]+)"', hlo)
    with ir.Context() as context:
        context.allow_unregistered_dialects = True
        module = ir.Module.parse(base64.b64decode(body))
        return ir.IntegerAttr(module.operation.attributes["stable_mosaic.version"]).value


def lower_a_pallas_kernel():
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    from torch_rpa import jax_names

    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    def call(x):
        return pl.pallas_call(double, out_shape=x)(x)

    lowered = jax_names.lower(call, [jax.ShapeDtypeStruct((8, 128), jnp.float32)], "tpu")
    return lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()


@pytest.mark.parametrize("version", [None, *VERSIONS.values()], ids=["no_client", *VERSIONS])
def test_pallas_kernels_are_lowered_to_the_mosaic_version_that_the_pinned_libtpu_reads(version, xla):
    """jax left alone would emit 4, 5, 6, 7 or 8, by the version of the TPU client that it starts."""
    with tpu_vm(version):
        assert mosaic_version(lower_a_pallas_kernel()) == 7


def lower_the_update(batch, platform, kernel="auto"):
    from torch_rpa.bridges.configuration import Configuration
    from torch_rpa.bridges.target import Target
    from torch_rpa.bridges.torch_xla import lowering

    names = ("q", "k", "v", "kv_pages", "kv_lens", "page_indices", "cu_q_lens", "num_seqs")
    specs = tuple((name, getattr(batch, name).shape, getattr(batch, name).dtype, "xla:0") for name in names)
    target = Target(platform, chip=None)
    with tpu_vm():
        return lowering.hlo_of(Configuration("ragged_paged_attention_update", specs, (), kernel, target))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_lowering_the_ops_starts_no_jax_client(platform, xla):
    assert lower_the_update(make_batch(form="flat"), platform)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (make_batch(), "pages in heads form on TPU need head_dim 128 .* torch_rpa.empty_kv_pages"),
        (make_batch(heads=(2, 1, 80), form="flat"), "to be a multiple of 128, got 160; .* torch_rpa.empty_kv_pages"),
        (
            replace(make_batch(form="flat"), page_indices=torch.zeros(9, 2**16, dtype=torch.int32)),
            r"page_indices \[9, 65536\] takes 2304 KiB of a TPU's scalar memory, .* larger pages, fewer pages_per_seq",
        ),
    ],
    ids=["heads_form", "width", "table"],
)
def test_what_a_tpu_cannot_address_is_refused_when_lowered_for_one(batch, reason, xla):
    with pytest.raises(NotImplementedError, match=reason):
        lower_the_update(batch, "tpu")
    assert lower_the_update(batch, "cpu")


def test_plain_xla_ops_on_request_take_either_form_on_tpu(xla):
    assert lower_the_update(make_batch(), "tpu", kernel="xla")


@pytest.mark.parametrize(
    ("accelerator", "chip"), [("v4-8", "v4"), ("v5litepod-16", "v5e"), ("v6e-8", "v6e"), ("v9-4", None), (None, None)]
)
def test_under_spmd_the_hosts_accelerator_type_tells_the_chip(xla, monkeypatch, accelerator, chip):
    """The virtual device has no kind, and the kernel's blocks are smaller on v4."""
    import torch_xla.runtime as xr

    from torch_rpa import bridges
    from torch_rpa.bridges.torch_xla import device

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    if accelerator:
        monkeypatch.setenv("TPU_ACCELERATOR_TYPE", accelerator)
    device._accelerator.cache_clear()
    with mock.patch.object(xr, "is_spmd", return_value=True), mock.patch.object(xr, "device_type", return_value="TPU"):
        assert bridges.of("xla").chip_name() == chip
    device._accelerator.cache_clear()
    with mock.patch.object(xr, "is_spmd", return_value=True), mock.patch.object(xr, "device_type", return_value="CPU"):
        assert bridges.of("xla").chip_name() is None
