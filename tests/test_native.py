"""The native page write against an expectation worked out here with plain torch, element by element."""

import shlex
import shutil
import sys
import sysconfig
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils import cpp_extension

from torch_rpa import native

NATIVE_BUILT = bool(list(Path(native.__file__).parent.glob("_C.*")))
needs_native = pytest.mark.skipif(
    not NATIVE_BUILT, reason="the native extension is not built (no C++ compiler at installation)"
)

INPUT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
QUANTISED_DTYPES = [*FLOAT8_LARGEST, torch.int8]
DTYPE_PAIRS = [(d, d) for d in INPUT_DTYPES] + [(d, page) for d in INPUT_DTYPES for page in QUANTISED_DTYPES]
FORMS = ["heads", "flat"]

NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM = 5, 8, 3, 24
NUM_SLOTS = NUM_PAGES * PAGE_SIZE


@pytest.fixture(autouse=True)
def native_loaded(monkeypatch):
    monkeypatch.delenv("TORCH_RPA_NATIVE", raising=False)
    if NATIVE_BUILT:
        assert native.is_available()


# ---- The expectation ---------------------------------------------------------------------------------------


def representable_values(dtype):
    """Every finite value of an 8-bit page dtype in rising order, float64, and the byte of each."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    values = codes.view(dtype).float().double()
    finite = values.isfinite() & ~((values == 0) & (codes == 0x80))  # one zero is enough here
    values, order = values[finite].sort()
    return values, codes[finite][order]


def nearest_even_float8(x, dtype):
    """The bytes of the finite values nearest to x (float64, 1-d, no NaN), ties to the even code."""
    values, codes = representable_values(dtype)
    x = x.clamp(values[0], values[-1])
    above = torch.searchsorted(values, x).clamp(0, len(values) - 1)
    below = (above - 1).clamp(min=0)
    gap_above, gap_below = (values[above] - x).abs(), (x - values[below]).abs()
    take_below = (gap_below < gap_above) | ((gap_below == gap_above) & (codes[below] % 2 == 0))
    bytes_ = torch.where(take_below, codes[below], codes[above])
    negative_zero = (values[torch.where(take_below, below, above)] == 0) & x.signbit()
    return torch.where(negative_zero, torch.tensor(0x80, dtype=torch.uint8), bytes_)


def expected_elements(x, page_dtype, scale):
    """x / scale as page_dtype by the contract's rule."""
    if x.dtype == page_dtype and scale == 1.0:
        return x.clone()
    scaled = x.float() / torch.tensor(scale, dtype=torch.float32)
    if page_dtype == torch.int8:
        return scaled.double().nan_to_num(0.0, torch.inf, -torch.inf).round().clamp(-128, 127).to(torch.int8)
    if page_dtype in FLOAT8_LARGEST:
        flat = scaled.double().flatten()
        bytes_ = nearest_even_float8(flat.nan_to_num(0.0, torch.inf, -torch.inf), page_dtype)
        bytes_[flat.isnan()] = torch.tensor([torch.nan]).to(page_dtype).view(torch.uint8)
        return bytes_.view(page_dtype).view(x.shape)
    return scaled.to(page_dtype)


def as_bytes(x):
    return x.contiguous().view(torch.uint8)


def expected_pages(kv_pages, k, v, slots, k_scale, v_scale):
    """A copy of kv_pages with the rows written one by one."""
    num_kv_heads, head_dim = k.shape[1:]
    row_shape = (-1, num_kv_heads, 2, head_dim * kv_pages.element_size())
    result = as_bytes(kv_pages).clone()
    rows = result.view(row_shape)
    new_k = as_bytes(expected_elements(k, kv_pages.dtype, k_scale)).view(len(k), num_kv_heads, -1)
    new_v = as_bytes(expected_elements(v, kv_pages.dtype, v_scale)).view(len(v), num_kv_heads, -1)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            rows[slot, :, 0] = new_k[token]
            rows[slot, :, 1] = new_v[token]
    return result


# ---- The inputs --------------------------------------------------------------------------------------------


def make_pages(dtype, form="heads", seed=0):
    """Pages whose bytes are all random, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_PAGES, PAGE_SIZE, 2 * NUM_KV_HEADS, HEAD_DIM)
    if form == "flat":
        shape = (NUM_PAGES, PAGE_SIZE, 2 * NUM_KV_HEADS * HEAD_DIM)
    itemsize = torch.empty(0, dtype=dtype).element_size()
    random_bytes = torch.randint(0, 256, (*shape[:-1], shape[-1] * itemsize), generator=generator)
    return random_bytes.to(torch.uint8).view(dtype)


def make_kv(num_tokens, dtype, seed=1, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, num_tokens, NUM_KV_HEADS, HEAD_DIM, generator=generator) * spread
    return k.to(dtype), v.to(dtype)


def make_slots(num_tokens, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(NUM_SLOTS, generator=generator)[:num_tokens]


def assert_writes_as_expected(kv_pages, k, v, slots, k_scale=1.0, v_scale=1.0):
    expected = expected_pages(kv_pages, k, v, slots, k_scale, v_scale)
    native.write_kv_pages_(kv_pages, k, v, slots, k_scale, v_scale)
    torch.testing.assert_close(as_bytes(kv_pages), expected, rtol=0, atol=0)


def write_values(values, dtype, page_dtype, scale=1.0):
    """Write a list of values as one head of one token; the elements that stand in the pages then."""
    x = torch.tensor(values, dtype=dtype).view(1, 1, -1)
    kv_pages = torch.zeros(1, 8, 2, x.shape[-1]).to(page_dtype)
    native.write_kv_pages_(kv_pages, x, x, torch.tensor([3]), scale, scale)
    written_k, written_v = kv_pages[0, 3]
    assert torch.equal(as_bytes(written_k), as_bytes(written_v))
    return written_k


# ---- The extension itself ----------------------------------------------------------------------------------


def test_extension_is_built_where_a_compiler_is():
    compiler = shlex.split(cpp_extension.get_cxx_compiler())[0]
    has_compiler = shutil.which(compiler) is not None
    has_headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    if not (has_compiler and has_headers):
        pytest.skip(f"cannot build here: {compiler} found: {has_compiler}, Python.h found: {has_headers}")
    assert native.is_available(), "the extension is not built; `make clean venv` builds it anew"


@needs_native
def test_environment_turns_native_off_at_each_call(monkeypatch):
    assert native.is_available()
    monkeypatch.setenv("TORCH_RPA_NATIVE", "0")
    assert not native.is_available()
    monkeypatch.setenv("TORCH_RPA_NATIVE", "1")
    assert native.is_available()


def test_an_extension_built_from_older_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setitem(sys.modules, "torch_rpa._C", ModuleType("torch_rpa._C"))
    with pytest.warns(UserWarning, match=r"built from other sources: its interface is 0, not \d+.*pip install"):
        assert not native.is_available()
    assert not native.is_available()  # and says so once


@needs_native
def test_schema_declares_the_pages_as_written():
    k, v = make_kv(4, torch.float32)
    args = (make_pages(torch.int8), k, v, make_slots(4), 1.0, 1.0)
    torch.library.opcheck(torch.ops.rpa_native.write_kv_pages_.default, args, test_utils="test_schema")


# ---- What is written ---------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "page_dtype"), DTYPE_PAIRS, ids=str)
class TestEveryKind:
    def test_write_puts_k_and_v_in_their_slots_and_nowhere_else(self, dtype, page_dtype, form):
        k, v = make_kv(17, dtype)
        assert_writes_as_expected(make_pages(page_dtype, form), k, v, make_slots(17))

    def test_write_divides_by_each_scale(self, dtype, page_dtype, form):
        k, v = make_kv(17, dtype)
        assert_writes_as_expected(make_pages(page_dtype, form), k, v, make_slots(17), 0.037, 1.7)

    def test_write_takes_infinity_and_values_out_of_range(self, dtype, page_dtype, form):
        k, v = make_kv(17, dtype, spread=30000.0)
        k[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
        v[3, 2, :2] = torch.tensor([-torch.inf, torch.inf])
        assert_writes_as_expected(make_pages(page_dtype, form), k, v, make_slots(17), 0.3, 2.0)


@needs_native
@pytest.mark.parametrize("form", FORMS)
def test_write_skips_rows_with_negative_slots(form):
    kv_pages = make_pages(torch.float32, form)
    k, v = make_kv(9, torch.float32)
    slots = make_slots(9)
    skipped = [0, 4, 8]
    slots[skipped] = torch.tensor([-1, -7, torch.iinfo(torch.int64).min])
    k[skipped], v[skipped] = torch.nan, torch.nan
    assert_writes_as_expected(kv_pages, k, v, slots)


@needs_native
def test_write_of_no_rows_and_of_skipped_rows_only_changes_nothing():
    kv_pages = make_pages(torch.bfloat16)
    before = as_bytes(kv_pages).clone()
    for num_tokens in (0, 6):
        k, v = make_kv(num_tokens, torch.bfloat16)
        native.write_kv_pages_(kv_pages, k, v, torch.full((num_tokens,), -1), 1.0, 1.0)
    assert torch.equal(as_bytes(kv_pages), before)


@needs_native
@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
def test_write_without_scale_copies_every_bit_pattern(dtype):
    # All bytes random: NaN payloads and subnormals must come through unchanged.
    generator = torch.Generator().manual_seed(3)
    itemsize = torch.empty(0, dtype=dtype).element_size()
    shape = (2, 16, NUM_KV_HEADS, HEAD_DIM * itemsize)
    k, v = torch.randint(0, 256, shape, generator=generator).to(torch.uint8).view(dtype)
    assert_writes_as_expected(make_pages(dtype), k, v, make_slots(16))


@needs_native
@pytest.mark.parametrize("page_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_write_reads_strided_inputs(page_dtype):
    num_tokens = 11
    width = NUM_KV_HEADS * HEAD_DIM
    fused = torch.randn(num_tokens, 2 * width + 5, generator=torch.Generator().manual_seed(4)).bfloat16()
    of_projection = [x.unflatten(1, (-1, HEAD_DIM)) for x in (fused[:, :width], fused[:, width:-5])]
    k, v = make_kv(num_tokens, torch.bfloat16)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)]
    dim_strided = [torch.stack([x, -x], dim=-1)[..., 0] for x in (k, v)]
    one_head_for_all = [x[:, :1].expand(-1, NUM_KV_HEADS, -1) for x in (k, v)]
    for k, v in (of_projection, heads_first, dim_strided, one_head_for_all):
        assert not k.is_contiguous()
        slots = make_slots(2 * num_tokens)[::2]
        assert_writes_as_expected(make_pages(page_dtype), k, v, slots, k_scale=0.5, v_scale=0.25)


@needs_native
def test_write_to_a_layer_of_a_larger_buffer_leaves_the_other_layers():
    layers = torch.stack([make_pages(torch.float16, seed=s) for s in range(3)])
    before = as_bytes(layers).clone()
    k, v = make_kv(NUM_SLOTS, torch.float16)
    assert_writes_as_expected(layers[1], k, v, make_slots(NUM_SLOTS))
    assert torch.equal(as_bytes(layers)[[0, 2]], before[[0, 2]])


@needs_native
def test_write_gives_the_same_bytes_with_any_number_of_threads():
    num_tokens, num_kv_heads, head_dim = 2048, 4, 128  # enough for several tasks
    k, v = torch.randn(2, num_tokens, num_kv_heads, head_dim, generator=torch.Generator().manual_seed(5))
    slots = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(6))
    shape = (num_tokens // 16, 16, 2 * num_kv_heads, head_dim)
    pages = [torch.zeros(shape, dtype=torch.int8), torch.zeros(shape, dtype=torch.int8)]
    threads = torch.get_num_threads()
    try:
        for kv_pages, num_threads in zip(pages, (1, 4), strict=True):
            torch.set_num_threads(num_threads)
            native.write_kv_pages_(kv_pages, k, v, slots, 0.02, 0.03)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*pages)
    assert torch.equal(as_bytes(pages[0]), expected_pages(pages[1], k, v, slots, 0.02, 0.03))


@needs_native
def test_concurrent_writes_to_different_slots_all_arrive():
    kv_pages = make_pages(torch.float32)
    k, v = make_kv(NUM_SLOTS, torch.float32)
    slots = make_slots(NUM_SLOTS)
    expected = expected_pages(kv_pages, k, v, slots, 1.0, 1.0)

    def write(rows):
        for row in rows:
            part = slice(row, row + 1)
            native.write_kv_pages_(kv_pages, k[part], v[part], slots[part], 1.0, 1.0)

    workers = [threading.Thread(target=write, args=(range(first, NUM_SLOTS, 4),)) for first in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert torch.equal(as_bytes(kv_pages), expected)


# ---- Rounding and range ------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
def test_int8_rounds_ties_to_even_and_saturates(dtype):
    values = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 300.0, -128.5, -129.0, -300.0]
    written = write_values(values, dtype, torch.int8)
    assert written.tolist() == [0, 2, 2, 0, -2, -2, 126, 127, 127, -128, -128, -128]


@needs_native
def test_int8_takes_infinity_as_the_bounds_and_nan_as_zero():
    written = write_values([torch.inf, -torch.inf, torch.nan, -torch.nan], torch.float32, torch.int8)
    assert written.tolist() == [127, -128, 0, 0]


@needs_native
@pytest.mark.parametrize("page_dtype", FLOAT8_LARGEST, ids=str)
def test_float8_saturates_and_keeps_nan(page_dtype):
    largest = FLOAT8_LARGEST[page_dtype]
    values = [largest * 1.07, -largest * 1.07, 1e30, -1e30, torch.inf, -torch.inf, torch.nan]
    written = write_values(values, torch.float32, page_dtype).float()
    assert written[:-1].tolist() == [largest, -largest] * 3
    assert written[-1].isnan()


@needs_native
@pytest.mark.parametrize("page_dtype", FLOAT8_LARGEST, ids=str)
def test_float8_keeps_every_representable_value(page_dtype):
    values, codes = representable_values(page_dtype)
    written = write_values(values.tolist(), torch.float32, page_dtype)
    assert torch.equal(as_bytes(written), codes)


@needs_native
@pytest.mark.parametrize("page_dtype", FLOAT8_LARGEST, ids=str)
def test_float8_rounds_ties_to_even(page_dtype):
    values, codes = representable_values(page_dtype)
    midpoints = (values[:-1] + values[1:]) / 2  # exact in float32
    written = as_bytes(write_values(midpoints.tolist(), torch.float32, page_dtype))
    even = torch.where(codes[:-1] % 2 == 0, codes[:-1], codes[1:])
    same_or_signed_zero = (written == even) | ((even == 0) & (written == 0x80))
    assert same_or_signed_zero.all()


@needs_native
@pytest.mark.parametrize("page_dtype", QUANTISED_DTYPES, ids=str)
def test_quantising_rounds_once_for_every_float16(page_dtype):
    every_float16 = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    x = every_float16.where(~every_float16.isnan(), 1.0).view(-1, 1, 64)
    kv_pages = torch.zeros(len(x) // 16, 16, 2, 64).to(page_dtype)
    assert_writes_as_expected(kv_pages, x, x, torch.arange(len(x)), k_scale=1.0, v_scale=0.7)


# ---- Mistakes ----------------------------------------------------------------------------------------------


def call_arguments(**changes):
    k, v = make_kv(3, torch.float32)
    arguments = {"kv_pages": make_pages(torch.float32), "k": k, "v": v, "slots": torch.tensor([1, 2, 3])}
    return arguments | changes | {"k_scale": 1.0, "v_scale": 1.0}


@needs_native
@pytest.mark.parametrize("slot", [NUM_SLOTS, NUM_SLOTS + 1, torch.iinfo(torch.int64).max])
def test_slot_past_the_end_raises_before_anything_is_written(slot):
    arguments = call_arguments(slots=torch.tensor([1, 2, slot]))
    before = as_bytes(arguments["kv_pages"]).clone()
    with pytest.raises(IndexError, match=rf"slots\[2\] is {slot}, but kv_pages has {NUM_SLOTS} slots"):
        native.write_kv_pages_(**arguments)
    assert torch.equal(as_bytes(arguments["kv_pages"]), before)


@needs_native
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": torch.zeros(3, NUM_KV_HEADS, HEAD_DIM).double()}, TypeError, "k must be float32"),
        ({"v": torch.zeros(3, NUM_KV_HEADS, HEAD_DIM).half()}, TypeError, "v must have k's dtype"),
        ({"kv_pages": make_pages(torch.bfloat16)}, TypeError, "kv_pages must have k's dtype"),
        ({"slots": torch.tensor([1, 2, 3], dtype=torch.int32)}, TypeError, "slots must be int64"),
        ({"k": torch.zeros(3, NUM_KV_HEADS * HEAD_DIM)}, ValueError, "k must be"),
        ({"v": torch.zeros(4, NUM_KV_HEADS, HEAD_DIM)}, ValueError, "v must have k's shape"),
        ({"slots": torch.tensor([1, 2])}, ValueError, r"slots must be \[3\]"),
        ({"slots": torch.tensor([[1, 2, 3]])}, ValueError, r"slots must be \[3\]"),
        ({"kv_pages": torch.zeros(2, 8, 2 * NUM_KV_HEADS + 2, HEAD_DIM)}, ValueError, "kv_pages must be"),
        ({"kv_pages": torch.zeros(2, 8, 2 * NUM_KV_HEADS * HEAD_DIM + 1)}, ValueError, "kv_pages must be"),
        ({"kv_pages": torch.zeros(8, 2 * NUM_KV_HEADS * HEAD_DIM)}, ValueError, "kv_pages must be"),
        (
            {"kv_pages": torch.zeros(8, 2, 2 * NUM_KV_HEADS, HEAD_DIM).transpose(0, 1)},
            ValueError,
            "kv_pages must be contiguous",
        ),
    ],
)
def test_mistakes_are_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        native.write_kv_pages_(**call_arguments(**changes))
