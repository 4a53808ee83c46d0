"""Private names of other packages: each stands in one table, and a release that lacks one is named."""

import ast
import re
from pathlib import Path

import pytest

import torch_rpa
from torch_rpa.private_names import PrivateNames

PACKAGE = Path(torch_rpa.__file__).parent
TABLES = [
    PACKAGE / file
    for file in ("jax_names.py", "bridges/torch_xla/names.py", "bridges/torch_tpu/names.py", "hf/_transformers.py")
]


def test_the_installed_torch_xla_has_every_private_name():
    pytest.importorskip("torch_xla")
    from torch_rpa.bridges.torch_xla.names import xla
    from torch_rpa.jax_names import hlo_names

    assert xla.missing() == []
    assert hlo_names.missing() == []  # of the jax that goes with it


def test_the_installed_jax_has_every_private_name():
    pytest.importorskip("jax")
    from torch_rpa.jax_names import jax_names

    assert jax_names.missing() == []


def test_the_installed_transformers_has_every_private_name():
    pytest.importorskip("transformers")
    from torch_rpa.hf._transformers import names

    assert names.missing() == []


def test_the_installed_torch_tpu_has_every_private_name():
    pytest.importorskip("torch_tpu")
    from torch_rpa.bridges.torch_tpu.names import tpu

    assert tpu.missing() == []


def test_names_that_a_release_has_taken_away_are_named():
    names = PrivateNames("pytest", "1.0", {"kept": "pytest:raises", "gone": "pytest:_gone.deeper", "moved": "pytst:x"})
    assert names.missing() == ["pytest:_gone.deeper", "pytst:x"]
    assert names.kept is pytest.raises
    with pytest.raises(ImportError, match=r"torch_rpa needs pytest:_gone\.deeper, which pytest .* version 1\.0 has it"):
        _ = names.gone
    with pytest.raises(AttributeError, match="other"):
        _ = names.other


def code_of(path):
    """The source without docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


PRIVATE = re.compile(
    r"_XLAC|torch_xla\._|torch_tpu\._|jax\._src|jaxlib\._|xla_client|unittest.mock|\bmock\b"
    r"|transformers\.(?:generation|integrations|modeling)|\._(?:attn|experts|can_set|prepare)_"
)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_stand_in_their_tables_only_and_nothing_is_patched(path):
    found = PRIVATE.findall(code_of(path))
    assert not found or path in TABLES


def test_the_tables_are_where_private_names_are():
    """Without this the test above could pass for ever."""
    assert all(PRIVATE.search(code_of(path)) for path in TABLES)
