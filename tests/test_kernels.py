"""The pure JAX entry, and what XLA's CPU compiler makes of it."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from batches import assert_matches_oracle, bytes_of, forget_new_tokens, make_batch

import torch_rpa
from torch_rpa import kernels

NAMES = ("q", "k", "v", "kv_pages", "kv_lens", "page_indices", "cu_q_lens", "num_seqs")


def to_jax(x: torch.Tensor) -> jax.Array:
    """bfloat16 and fp8, which NumPy does not know, go over as bits."""
    dtype = jnp.dtype(str(x.dtype).removeprefix("torch."))
    return jnp.asarray(x.view(torch.uint8).numpy().view(dtype))


def to_torch(x: jax.Array) -> torch.Tensor:
    bits = np.array(x).view(np.uint8)
    return torch.from_numpy(bits).view(getattr(torch, x.dtype.name))


def arrays(batch, *, update):
    return {name: to_jax(getattr(batch, name)) for name in NAMES if update or name not in ("k", "v")}


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_jax_functions_equal_the_oracle(dtype, kv_dtype):
    batch = make_batch(dtype=dtype, kv_dtype=kv_dtype)
    out, lse = kernels.ragged_paged_attention_with_lse(**arrays(batch, update=False), sm_scale=0.1, **batch.scales)
    assert_matches_oracle(batch, to_torch(out), to_torch(lse), sm_scale=0.1)
    only_out = kernels.ragged_paged_attention(**arrays(batch, update=False), sm_scale=0.1, **batch.scales)
    assert jnp.array_equal(out, only_out)
    batch = forget_new_tokens(batch)
    out, pages = kernels.ragged_paged_attention_update(**arrays(batch, update=True), sm_scale=0.1, **batch.scales)
    assert_matches_oracle(batch, to_torch(out), update=True, sm_scale=0.1)
    assert torch.equal(bytes_of(to_torch(pages)), bytes_of(batch.expected(update=True)[2]))


def test_the_jax_functions_check_their_arguments():
    args = arrays(make_batch(), update=False)
    with pytest.raises(ValueError, match="sliding_window must be at least 1, got 0"):
        kernels.ragged_paged_attention(**args, sliding_window=0)
    with pytest.raises(TypeError, match="kv_lens must be int32, got float32"):
        kernels.ragged_paged_attention(**args | {"kv_lens": args["kv_lens"].astype(jnp.float32)})
    with pytest.raises(TypeError, match="windw"):
        kernels.ragged_paged_attention(**args, windw=3)
    with pytest.raises(TypeError, match="kv_lens must be an array, got list"):
        kernels.ragged_paged_attention(**args | {"kv_lens": [5, 9]})
    with pytest.raises(ValueError, match="backend must be 'auto' or 'xla', got 'fast'"):
        kernels.ragged_paged_attention(**args, backend="fast")


def test_the_jax_functions_take_numpy_arrays():
    batch = make_batch()
    out = kernels.ragged_paged_attention(**{name: np.asarray(x) for name, x in arrays(batch, update=False).items()})
    assert_matches_oracle(batch, to_torch(out))


def compiled_update(kv_dtype, form, num_tokens, q_dtype=jnp.float32, num_pages=4096):
    """The update op compiled for 4096 pages of 16 tokens, with the pages donated."""
    shape = (num_pages, 16, 4, 64) if form == "heads" else (num_pages, 16, 256)
    int32, rows = jnp.int32, jax.ShapeDtypeStruct((num_tokens, 2, 64), q_dtype)
    specs = {
        "q": jax.ShapeDtypeStruct((num_tokens, 4, 64), q_dtype),
        "k": rows,
        "v": rows,
        "kv_pages": jax.ShapeDtypeStruct(shape, kv_dtype),
        "kv_lens": jax.ShapeDtypeStruct((4,), int32),
        "page_indices": jax.ShapeDtypeStruct((4, 8), int32),
        "cu_q_lens": jax.ShapeDtypeStruct((5,), int32),
        "num_seqs": jax.ShapeDtypeStruct((1,), int32),
    }
    scales = {"k_scale": 0.1, "v_scale": 0.1}

    def step(kv_pages, rest):
        return kernels.ragged_paged_attention_update(kv_pages=kv_pages, **rest, **scales)

    pages = specs.pop("kv_pages")
    return jax.jit(step, donate_argnums=0).lower(pages, specs).compile(), pages


@pytest.mark.parametrize("num_tokens", [1, 8])
@pytest.mark.parametrize("form", ["heads", "flat"])
@pytest.mark.parametrize("kv_dtype", [jnp.float32, jnp.int8], ids=["float32", "int8"])
def test_an_update_makes_no_second_copy_of_the_cache(kv_dtype, form, num_tokens):
    compiled, pages = compiled_update(kv_dtype, form, num_tokens)
    cache_bytes = pages.size * pages.dtype.itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4


def test_reading_narrow_pages_widens_one_block_at_a_time():
    """XLA's CPU compiler has no bfloat16 arithmetic; left alone it would widen the whole cache first."""
    num_pages = 4096
    specs = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((8, 4, 64), jnp.bfloat16),
            ((num_pages, 16, 4, 64), jnp.bfloat16),
            ((4,), jnp.int32),
            ((4, 8), jnp.int32),
            ((5,), jnp.int32),
            ((1,), jnp.int32),
        )
    ]
    memory = jax.jit(kernels.ragged_paged_attention).lower(*specs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < num_pages * 16 * 4 * 64 * 2 / 4


def run_python(code, **env):
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_kernels_run_without_torch():
    run_python(
        "import sys; sys.modules['torch'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        "import jax.numpy as jnp\n"
        "from torch_rpa import kernels\n"
        "i = lambda *x: jnp.array(x, jnp.int32)\n"
        "out = kernels.ragged_paged_attention(\n"
        "    jnp.ones((2, 4, 64)), jnp.ones((3, 16, 4, 64)), i(5, 0), jnp.zeros((2, 1), jnp.int32), i(0, 1, 1), i(1))\n"
        "assert (out[0] == 1).all() and (out[1] == 0).all()\n",
        JAX_PLATFORMS="cpu",
    )


def test_the_ops_run_on_cpu_without_jax():
    tests = str(Path(__file__).parent)
    run_python(
        f"import sys; sys.path.insert(0, {tests!r})\n"
        "for name in ('jax', 'jaxlib', 'torch_xla', 'transformers'): sys.modules[name] = None\n"
        "import torch, torch_rpa\n"
        "from batches import make_batch, assert_matches_oracle\n"
        "batch = make_batch()\n"
        "assert_matches_oracle(batch, *batch.read())\n"
    )


def test_xla_tensors_without_jax_say_what_to_install():
    tests = str(Path(__file__).parent)
    run_python(
        f"import sys; sys.path.insert(0, {tests!r}); sys.modules['jax'] = None\n"
        "import torch, torch_xla, torch_rpa\n"
        "from batches import make_batch\n"
        "try: make_batch().to('xla').read()\n"
        "except ImportError as error: assert 'pip install' in str(error), error\n"
        "else: raise AssertionError('no error')\n"
    )


def test_the_kernels_never_import_torch():
    for path in Path(inspect.getfile(kernels)).parent.glob("**/*.py"):
        assert "import torch\n" not in path.read_text()
        assert "torch_xla" not in path.read_text()
    assert torch_rpa.__version__
