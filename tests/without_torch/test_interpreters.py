"""The Pallas kernel in jax's two interpreters against a NumPy oracle, for any jax that it supports; no torch.

The TPU interpreter runs DMAs as late as their semaphores allow, fills scratch with NaN, and finds data races: a read of
what a DMA may still be writing, which no other interpreter and no comparison of numbers shows.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from ragged import assert_matches, assert_same_pages, make_batch, without_new_tokens

from torch_rpa import kernels

SMALL_BLOCKS = {"num_queries_per_block": 16, "num_kv_pages_per_block": 2}
CASES = {
    "small_blocks": ({}, SMALL_BLOCKS),
    "least_blocks": ({}, {"vmem_limit_bytes": 1}),  # what ``tuning.fit`` comes down to where VMEM is short
    # v6e writes tiles of 8 tokens, an unnamed chip, as in the other cases, of 16.
    "window": ({}, {"sliding_window": 20, "num_kv_pages_per_block": 1, "chip": "v6e"}),
    "not_causal": ({}, {"causal": False, "num_kv_pages_per_block": 2}),
    "bfloat16": ({"dtype": "bfloat16", "heads": (7, 1, 128), "page_size": 32}, {}),
    "int8": ({"dtype": "bfloat16", "kv_dtype": "int8", "page_size": 32}, {"num_kv_pages_per_block": 1}),
    "fp8_e5m2": ({"dtype": "bfloat16", "kv_dtype": "float8_e5m2", "page_size": 32}, {}),
}
INTERPRETERS = {"hlo": True, "tpu": pltpu.InterpretParams(detect_races=True)}


@pytest.fixture(params=INTERPRETERS)
def interpret(request, capfd):
    """Each interpreter; fails if it reports a race."""
    yield INTERPRETERS[request.param]
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(("shapes", "options"), CASES.values(), ids=CASES)
def test_reading_equals_the_oracle(shapes, options, interpret):
    batch = make_batch(**shapes)
    out, lse = kernels.ragged_paged_attention_with_lse(
        **batch.reads(), sm_scale=0.1, interpret=interpret, **options, **batch.scales
    )
    assert_matches(batch, out, lse, sm_scale=0.1, **_of_oracle(options))


@pytest.mark.parametrize(("shapes", "options"), CASES.values(), ids=CASES)
def test_the_update_equals_the_oracle(shapes, options, interpret):
    batch = make_batch(**shapes)
    out, pages = kernels.ragged_paged_attention_update(
        **without_new_tokens(batch).args, sm_scale=0.1, interpret=interpret, **options, **batch.scales
    )
    assert_same_pages(pages, batch.args["kv_pages"])
    assert_matches(batch, out, sm_scale=0.1, **_of_oracle(options))


def test_soft_cap_and_sinks_equal_the_oracle(interpret):
    batch, sinks = make_batch(), jnp.array([0.3, -jnp.inf, 4.0, 30.0])
    out = kernels.ragged_paged_attention(**batch.reads(), sinks=sinks, soft_cap=5.0, sm_scale=-0.3, interpret=interpret)
    assert_matches(batch, out, sinks=sinks, soft_cap=5.0, sm_scale=-0.3)


def test_float8_e4m3fn_pages_equal_the_oracle():
    """In the HLO interpreter only: these are loaded by ``ref.bitcast``, which no TPU interpreter knows yet."""
    batch = make_batch(dtype="bfloat16", kv_dtype="float8_e4m3fn", page_size=32)
    out = kernels.ragged_paged_attention(**batch.reads(), sm_scale=0.1, interpret=True)
    assert_matches(batch, out, sm_scale=0.1)
    out, pages = kernels.ragged_paged_attention_update(**without_new_tokens(batch).args, sm_scale=0.1, interpret=True)
    assert_same_pages(pages, batch.args["kv_pages"])
    assert_matches(batch, out, sm_scale=0.1)


def test_the_interpreter_reports_a_race_where_there_is_one(capfd):
    def read_too_early(x_hbm, out, buffer, sem):
        copy = pltpu.make_async_copy(x_hbm, buffer, sem)
        copy.start()
        out[...] = buffer[...]
        copy.wait()

    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    call = pl.pallas_call(
        read_too_early,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=shape,
        scratch_shapes=[pltpu.VMEM(shape.shape, shape.dtype), pltpu.SemaphoreType.DMA],
        interpret=INTERPRETERS["tpu"],
    )
    jax.block_until_ready(call(jnp.ones(shape.shape)))
    assert "RACE DETECTED" in capfd.readouterr().out


def _of_oracle(options):
    return {name: value for name, value in options.items() if name in ("sliding_window", "causal")}
