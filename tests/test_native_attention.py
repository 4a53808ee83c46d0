"""The native attention kernel: what its schedule and its memory accesses must hold to, beyond the grids of the op.

tests/test_attention.py, test_update.py and test_random_batches.py run on it, too, wherever it is built.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batches import assert_matches_oracle, bytes_of, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import needs_native

from torch_rpa import cpu, native, reference
from torch_rpa.options import AttentionOptions

pytestmark = [needs_native, pytest.mark.usefixtures("no_grad")]

REPO = Path(__file__).resolve().parent.parent

# Lengths around the kernel's blocks (64 keys), pieces (512 keys) and tiles (192 rows of a matrix).
EDGES = ((1, 63), (1, 64), (1, 65), (1, 511), (1, 512), (1, 513), (1, 1500), (95, 95), (97, 300), (193, 700))


@pytest.fixture
def threads():
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def read_with_threads(batch, count, **options):
    torch.set_num_threads(count)
    return batch.read(**options)


@pytest.mark.parametrize("page_size", [8, 16, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lengths_around_blocks_items_and_tiles_equal_the_oracle(dtype, page_size):
    batch = make_batch(EDGES, dtype=dtype, page_size=page_size)
    out, lse = batch.read(sm_scale=0.125)
    assert_matches_oracle(batch, out, lse, sm_scale=0.125)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 40, 72, 80, 136, 256])
def test_every_width_of_a_row_of_bytes_equals_the_oracle(head_dim, kv_dtype):
    batch = make_batch(((1, 70), (9, 33)), heads=(3, 1, head_dim), kv_dtype=kv_dtype)
    out, lse = batch.read(sm_scale=head_dim**-0.5)
    assert_matches_oracle(batch, out, lse, sm_scale=head_dim**-0.5)


@pytest.mark.parametrize("page_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.float16], ids=str)
def test_every_code_of_a_page_dtype_is_read_as_its_value(page_dtype):
    """One key, so that out is its value: all codes, subnormals and infinities among them."""
    codes = torch.arange(2**8) if page_dtype.itemsize == 1 else torch.arange(2**16)
    codes = codes.to(torch.uint8 if page_dtype.itemsize == 1 else torch.uint16).view(page_dtype)
    values = codes.view(-1, 1, 64)
    q = torch.zeros(len(values), 1, 64, dtype=torch.float16 if page_dtype == torch.float16 else torch.float32)
    pages = torch.zeros(len(values), 8, 2, 64).to(page_dtype)
    pages.view(torch.uint8)[:, 0, 1] = values.view(torch.uint8)[:, 0]
    count = len(values)
    out = torch.ops.rpa.ragged_paged_attention(
        q,
        pages,
        torch.ones(count, dtype=torch.int32),
        torch.arange(count, dtype=torch.int32)[:, None].contiguous(),
        torch.arange(count + 1, dtype=torch.int32),
        torch.tensor([count], dtype=torch.int32),
        k_scale=1.0,
        v_scale=1.0,
    )
    torch.testing.assert_close(out.float(), values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("heads", [(4, 2, 64), (1, 1, 16), (71, 1, 64)], ids=str)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 300}, {"sinks": True, "soft_cap": 9.0}], ids=str)
def test_results_are_the_same_bits_with_any_number_of_threads(options, heads, threads):
    batch = make_batch(EDGES, heads=heads)
    if "sinks" in options:
        options = {**options, "sinks": torch.linspace(-1, 1, heads[0])}
    one = read_with_threads(batch, 1, **options)
    for count in (2, 3, 7):
        for single, several in zip(one, read_with_threads(batch, count, **options), strict=True):
            assert torch.equal(bytes_of(single), bytes_of(several))


@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 128, 136, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_alone_has_the_bits_that_it_has_among_many(dtype, head_dim):
    """As when all tokens of a prompt but the last stand in shared pages: decode reads bfloat16 in a way of its own."""
    batch = make_batch(((300, 300),), heads=(4, 2, head_dim), dtype=dtype, spare_rows=0, spare_seqs=0)
    among_many = batch.read(sm_scale=head_dim**-0.5)
    alone = torch.ops.rpa.ragged_paged_attention_with_lse(
        batch.q[299:],
        batch.kv_pages,
        batch.kv_lens,
        batch.page_indices,
        torch.tensor([0, 1], dtype=torch.int32),
        batch.num_seqs,
        sm_scale=head_dim**-0.5,
    )
    assert_matches_oracle(batch, *among_many, sm_scale=head_dim**-0.5)
    for one, many in zip(alone, among_many, strict=True):
        assert torch.equal(one[0], many[299])


@pytest.mark.parametrize("kv_len", [600, 3000])
@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 20}, {"sliding_window": 128}, {"sliding_window": 700}, {"sinks": True, "soft_cap": 9.0}],
    ids=str,
)
@pytest.mark.parametrize("heads", [(8, 2, 64), (9, 3, 64)], ids=str)
def test_a_row_has_the_same_bits_however_many_rows_of_its_prompt_are_read_with_it(heads, options, kv_len):
    """As with a prompt of which some pages are shared, or with chunks of another size."""
    batch = make_batch(((kv_len, kv_len),), heads=heads, spare_rows=0, spare_seqs=0)
    if "sinks" in options:
        options = {**options, "sinks": torch.linspace(-1, 1, heads[0])}

    def read(first, end):
        """Out and lse of these rows, in a call of their own."""
        kv_lens, q_lens = torch.tensor([end], dtype=torch.int32), torch.tensor([0, end - first], dtype=torch.int32)
        metadata = kv_lens, batch.page_indices, q_lens, batch.num_seqs
        q = batch.q[first:end]
        return torch.ops.rpa.ragged_paged_attention_with_lse(q, batch.kv_pages, *metadata, sm_scale=0.125, **options)

    whole = read(0, kv_len)
    for first, end in [(row, row + 1) for row in range(kv_len - 16, kv_len)] + [(kv_len - 8, kv_len), (300, 556)]:
        for part, rows in zip(read(first, end), whole, strict=True):
            assert torch.equal(part, rows[first:end])


@pytest.mark.parametrize("kv_len", [16384, 20000, 40000])
def test_pieces_of_a_long_context_equal_the_oracle(kv_len):
    """Beyond 16384 keys pieces are longer, and grow with each power of two."""
    batch = make_batch(((1, kv_len), (3, 16385)), heads=(2, 1, 16), page_size=256)
    out, lse = batch.read(sm_scale=0.25)
    assert_matches_oracle(batch, out, lse, sm_scale=0.25)


def test_more_partial_results_than_fit_at_once_are_merged_in_waves():
    """40 sequences in 8 pieces each, of 128 rows of 256 floats, pass the limit of 32 MiB."""
    alone = make_batch(((1, 4096),), heads=(128, 8, 256), page_size=256, dtype=torch.bfloat16)
    one = alone.read(sm_scale=1 / 16)
    assert_matches_oracle(alone, *one, sm_scale=1 / 16)
    count = 40
    out, lse = torch.ops.rpa.ragged_paged_attention_with_lse(
        alone.q[:1].repeat(count, 1, 1),
        alone.kv_pages,
        alone.kv_lens[:1].repeat(count),
        alone.page_indices[:1].repeat(count, 1),
        torch.arange(count + 1, dtype=torch.int32),
        torch.tensor([count], dtype=torch.int32),
        sm_scale=1 / 16,
    )
    for row in range(count):
        assert torch.equal(out[row], one[0][0])
        assert torch.equal(lse[row], one[1][0])


def test_equals_the_python_path_on_views_of_larger_buffers():
    """q between other heads, pages of one layer among several, and a table with room to spare."""
    batch = make_batch()
    wide = torch.full((len(batch.q), 9, 64), torch.nan)
    wide[:, 3:7] = batch.q
    layers = torch.full((batch.kv_pages.shape[0], 3, *batch.kv_pages.shape[1:]), torch.nan)
    layers[:, 1] = batch.kv_pages
    call = {"q": wide[:, 3:7], "kv_pages": layers[:, 1]}
    call |= dict(zip(("kv_lens", "page_indices", "cu_q_lens", "num_seqs"), batch.metadata, strict=True))
    options = AttentionOptions(sm_scale=0.125)
    for ours, theirs in zip(native.attend(**call, options=options), cpu.attend(**call, options=options), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_key_of_a_sequence_makes_nan_of_the_rows_that_see_it_and_of_no_others(bad):
    batch = make_batch(((4, 40), (1, 30)))
    page = batch.page_indices[0, 38 // 16]
    batch.kv_pages[page, 38 % 16, 0] = bad  # K of KV head 0 at position 38: the rows at 38 and 39 see it
    batch.q[:4] = batch.q[:4].abs()
    out, _ = batch.read()
    assert out[2:4, :2].isnan().all()
    assert out[:2].isfinite().all()
    assert out[4:5].isfinite().all()


def test_the_python_path_takes_over_when_native_is_turned_off(monkeypatch):
    batch = make_batch()
    monkeypatch.setenv("TORCH_RPA_NATIVE", "0")
    monkeypatch.setattr(native, "attend", None)
    assert_matches_oracle(batch, *batch.read())


# ---- Any metadata ------------------------------------------------------------------------------------------

ANY_INT32 = st.one_of(st.integers(-3, 70), st.sampled_from([-(2**31), 2**31 - 1, 2**20]))


@settings(max_examples=150, deadline=None)
@given(
    kv_lens=st.lists(ANY_INT32, min_size=4, max_size=4),
    table=st.lists(ANY_INT32, min_size=12, max_size=12),
    starts=st.lists(ANY_INT32, min_size=5, max_size=5),
    num_seqs=ANY_INT32,
    causal=st.booleans(),
    window=st.none() | st.integers(1, 2**40),
)
def test_no_metadata_crashes_or_touches_what_is_not_its_own(kv_lens, table, starts, num_seqs, causal, window):
    """Inputs stand between guards that must keep their bytes; with value checks on, a call works or is refused."""
    with torch.no_grad():
        pages = torch.randn(7, 8, 4, 16)
        guarded, q = pages[1:6], torch.randn(20, 4, 16)
        k, v = torch.randn(2, 20, 2, 16)
        metadata = [torch.tensor(x, dtype=torch.int32) for x in (kv_lens, table, starts, [num_seqs])]
        metadata[1] = metadata[1].view(4, 3)
        options = {"causal": causal, "sliding_window": window}
        before = bytes_of(pages)
        out, lse = torch.ops.rpa.ragged_paged_attention_with_lse(q, guarded, *metadata, **options)
        assert out.isfinite().all()
        assert not lse.isnan().any()
        assert torch.equal(bytes_of(pages), before)
        torch.ops.rpa.ragged_paged_attention_update_(q, k, v, guarded, *metadata, **options)
        after = bytes_of(pages).view(7, -1)
        assert torch.equal(after[[0, 6]], before.view(7, -1)[[0, 6]])


@settings(max_examples=100, deadline=None)
@given(
    kv_lens=st.lists(st.integers(-1, 26), min_size=3, max_size=3),
    table=st.lists(st.integers(-1, 5), min_size=9, max_size=9),
    q_lens=st.lists(st.integers(-1, 9), min_size=3, max_size=3),
    num_seqs=st.integers(-1, 4),
)
def test_with_value_checks_metadata_is_refused_or_gives_the_oracles_result(kv_lens, table, q_lens, num_seqs):
    starts = [0, q_lens[0], q_lens[0] + q_lens[1], sum(q_lens)]
    metadata = [torch.tensor(x, dtype=torch.int32) for x in (kv_lens, table, starts, [num_seqs])]
    metadata[1] = metadata[1].view(3, 3)
    batch = make_batch(((4, 20), (9, 16)), page_size=8, spare_rows=14)
    q, pages = batch.q.nan_to_num(0.5), batch.kv_pages.nan_to_num(0.5)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_RPA_CHECK", "1")
        try:
            out = torch.ops.rpa.ragged_paged_attention(q, pages, *metadata, sm_scale=0.125)
        except ValueError:
            return
        expected, _, _ = reference.ragged_paged_attention(q, pages, *metadata, sm_scale=0.125)
        torch.testing.assert_close(out.double(), expected, atol=3e-5, rtol=3e-5)


# ---- Each vector unit, and the sanitizer: in processes of their own -----------------------------------------

GRIDS = ["tests/test_attention.py", "tests/test_update.py", "tests/test_native_attention.py"]
SMALL = "cpu and not xla and (page_size or every_dtype or every_kind_of_head_dim or every_option or every_mix)"


def run_tests(*arguments, **env):
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(
        command, cwd=REPO, env=os.environ | env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_kernels_for_other_vector_units_pass_the_grids(capability):
    run_tests(*GRIDS[:2], "-k", SMALL, ATEN_CPU_CAPABILITY=capability)
    run_tests(GRIDS[2], "-k", "same_bits or has_the_bits", ATEN_CPU_CAPABILITY=capability)


@pytest.fixture(scope="module")
def sanitized_tree(tmp_path_factory):
    """A copy of the package whose extension is built with AddressSanitizer."""
    tree = tmp_path_factory.mktemp("sanitized")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(REPO / name, tree)
    for name in ("torch_rpa", "csrc_stub", "tests"):
        shutil.copytree(REPO / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    flags = "-fsanitize=address -fno-omit-frame-pointer -O1"
    env = os.environ | {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": "-fsanitize=address"}
    env["TORCH_RPA_REQUIRE_NATIVE"] = "1"
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tree, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (library,) = (tree / "torch_rpa").glob("_C.*.so")
    assert b"__asan_report_load" in library.read_bytes(), "the library was built without the sanitizer"
    return tree


def sanitizer_env(tree):
    # The C++ library too: the sanitizer looks for its exceptions when it is loaded, which is before torch.
    names = "libasan.so", "libstdc++.so.6"
    found = [subprocess.run(["gcc", f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names]
    return {
        "LD_PRELOAD": " ".join(path.strip() for path in found),
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0:verify_asan_link_order=0",
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "2",
    }


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="AddressSanitizer is that of gcc here")
def test_no_memory_error_under_address_sanitizer(sanitized_tree):
    env = sanitizer_env(sanitized_tree)
    where = "import torch_rpa, torch_rpa._C as c; print(c.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], env=os.environ | env, capture_output=True, text=True, cwd=sanitized_tree
    )
    assert str(sanitized_tree) in found.stdout, found.stdout + found.stderr
    tests = [str(sanitized_tree / name) for name in GRIDS[:2]]
    run_tests(*tests, "--rootdir", str(sanitized_tree), "-k", SMALL, **env)
    fuzz = str(sanitized_tree / GRIDS[2])
    run_tests(fuzz, "--rootdir", str(sanitized_tree), "-k", "no_metadata or around_blocks or every_width", **env)
    linear = str(sanitized_tree / "tests/test_native_linear.py")
    run_tests(linear, "--rootdir", str(sanitized_tree), "-m", "not slow", **env)
