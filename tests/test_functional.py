"""The typed functions are the ops: same names, arguments and order, and their examples run."""

import doctest
import inspect

import pytest
import torch

import torch_rpa
from tests.batches import forget_new_tokens, make_batch
from torch_rpa import functional

OPS = [name for name in functional.__all__ if name != "Options"]
PYTHON_TYPES = {
    "Tensor": "Tensor",
    "Optional[Tensor]": "Tensor | None",
    "float": "float",
    "Optional[float]": "float | None",
    "bool": "bool",
    "int": "int",
    "Optional[int]": "int | None",
}


def schema_of(name):
    return getattr(torch.ops.rpa, name).default._schema


def test_every_public_op_has_a_function_of_its_name():
    registered = [name.removeprefix("rpa::") for name in torch._C._dispatch_get_all_op_names() if name[:5] == "rpa::"]
    assert set(OPS) == {name for name in registered if "." not in name and not name.startswith("_")}
    assert all(name in torch_rpa.__all__ for name in OPS)


@pytest.mark.parametrize("name", OPS)
def test_a_function_takes_what_its_op_takes_in_the_same_order(name):
    arguments = schema_of(name).arguments
    (*tensors, options) = inspect.signature(getattr(torch_rpa, name)).parameters.values()
    assert [tensor.name for tensor in tensors] == [a.name for a in arguments if not a.kwarg_only]
    assert options.kind is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize("name", OPS)
def test_the_options_have_the_names_and_types_of_every_op(name):
    options = {a.name: PYTHON_TYPES[str(a.type)] for a in schema_of(name).arguments if a.kwarg_only}
    given = functional.Options.__annotations__
    assert list(given) == list(options)
    for option, annotation in given.items():
        named = getattr(annotation, "__name__", None) if isinstance(annotation, type) else str(annotation)
        assert named.replace("torch.", "") == options[option], option


@pytest.mark.parametrize("name", OPS)
def test_the_example_in_each_docstring_runs_as_printed(name):
    function = getattr(torch_rpa, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert example.examples
    failures, _ = doctest.DocTestRunner(verbose=False).run(example)
    assert failures == 0


@pytest.mark.parametrize("name", OPS)
def test_each_docstring_says_what_comes_back(name):
    assert "Returns:" in getattr(torch_rpa, name).__doc__


@pytest.mark.parametrize("name", OPS)
def test_a_function_gives_what_its_op_gives_and_compiles_to_it_whole(no_grad, name):
    function, op = getattr(torch_rpa, name), getattr(torch.ops.rpa, name)
    call = forget_new_tokens(make_batch()).update if "update" in name else make_batch().read
    options = {"sm_scale": 0.125, "sliding_window": 7}
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = call(op, **options)
    torch.testing.assert_close(call(function, **options), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(call(compiled, **options), expected, rtol=0, atol=0, equal_nan=True)


def test_an_option_that_does_not_exist_is_refused_by_name():
    with pytest.raises(RuntimeError, match="scale_of_scores"):
        make_batch().read(torch_rpa.ragged_paged_attention, scale_of_scores=1.0)


def test_use_kernel_of_the_older_op_is_refused_with_a_hint():
    with pytest.raises(TypeError, match="TORCH_RPA_XLA_KERNEL"):
        make_batch().read(torch_rpa.ragged_paged_attention, use_kernel=True)
