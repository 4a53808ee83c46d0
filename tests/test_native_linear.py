"""The native product of float32 rows with a weight."""

import pytest
import torch
from test_native import needs_native
from test_native_attention import run_tests

from torch_rpa import native

pytestmark = [needs_native, pytest.mark.usefixtures("no_grad")]

# Around the kernel's tiles (4 rows, up to 4 columns), blocks (64 rows, 768 elements) and vectors (8 or 16 lanes).
ROWS = (1, 2, 3, 4, 5, 8, 63, 64, 65, 131)
COLUMNS = (1, 3, 4, 33, 130)
DEPTHS = (1, 7, 16, 100, 768, 769, 1700)


@pytest.fixture(autouse=True)
def native_loaded():
    assert native.is_available()


def make(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def assert_is_product(out, x, weight, bias=None) -> None:
    """Against float64; what rounding may do is in proportion to the sum of the products' magnitudes."""
    x, weight = x.double(), weight.double()
    expected, magnitude = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        expected, magnitude = expected + bias, magnitude + bias.abs()
    assert out.shape == expected.shape
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    assert ((out - expected).abs() <= 4 * torch.finfo(torch.float32).eps * magnitude).all()


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_size_equals_the_product_in_float64(depth):
    for num_rows in ROWS:
        for num_columns in COLUMNS:
            x, weight, bias = make(num_rows, depth), make(num_columns, depth), make(num_columns)
            assert_is_product(native.linear(x, weight), x, weight)
            assert_is_product(native.linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_rows_bits_do_not_depend_on_other_rows_or_threads(depth):
    x, weight, bias = make(131, depth), make(130, depth), make(130)
    out = native.linear(x, weight, bias)
    for start, end in ((0, 1), (130, 131), (3, 8), (60, 70), (1, 131)):
        assert torch.equal(native.linear(x[start:end], weight, bias), out[start:end])
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(native.linear(x, weight, bias), out)
    torch.set_num_threads(threads)


def test_any_leading_sizes_and_strides():
    weight, bias = make(20, 30), make(20)
    x = make(2, 3, 30)
    assert_is_product(native.linear(x, weight, bias), x, weight, bias)
    assert_is_product(native.linear(x[0, 0], weight, bias), x[0, 0], weight, bias)
    assert_is_product(native.linear(x.transpose(0, 1), weight), x.transpose(0, 1), weight)
    for other in (make(30, 20).T, make(20, 64)[:, 7:37], make(40, 30)[::2], make(1, 30).expand(20, 30)):
        assert_is_product(native.linear(x, other, make(40)[::2]), x, other, make(40)[::2])


def test_nothing_to_do():
    assert native.linear(make(0, 5), make(3, 5)).shape == (0, 3)
    assert native.linear(make(2, 5), make(0, 5)).shape == (2, 0)
    assert torch.equal(native.linear(make(2, 0), make(3, 0), make(3)), make(3).expand(2, 3))


def test_what_is_not_finite_stays_in_its_rows_and_columns():
    x, weight = make(9, 40), make(21, 40)
    expected = native.linear(x, weight)
    x[4, 39], weight[20, 0] = torch.nan, torch.inf
    out = native.linear(x, weight)
    assert out[4].isnan().all()
    assert not out[:, 20].isfinite().any()
    rows, columns = torch.arange(9) != 4, torch.arange(21) != 20
    assert torch.equal(out[rows][:, columns], expected[rows][:, columns])


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "message"),
    [
        (make(2, 5).double(), make(3, 5), None, TypeError, "must be float32, got Double"),
        (make(2, 5), make(3, 5), make(3).half(), TypeError, "must be float32, got Half"),
        (make(2, 5), make(3, 4), None, ValueError, r"\[num_columns, depth\], got \[2, 5\] and \[3, 4\]"),
        (make(2, 5), make(5), None, ValueError, r"got \[2, 5\] and \[5\]"),
        (torch.tensor(1.0), make(3, 1), None, ValueError, r"got \[\] and \[3, 1\]"),
        (make(2, 5), make(3, 5), make(5), ValueError, r"bias must be \[3\], got \[5\]"),
    ],
)
def test_what_is_no_product_is_refused(x, weight, bias, error, message):
    with pytest.raises(error, match=message):
        native.linear(x, weight, bias)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_kernels_for_other_vector_units(capability):
    run_tests(__file__, "-m", "not slow", ATEN_CPU_CAPABILITY=capability)
