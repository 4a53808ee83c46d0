"""Packages that only some parts of torch_rpa need: an import of one that is missing says what to type."""

from collections.abc import Iterator
from contextlib import contextmanager


def install_command(extra: str) -> str:
    """What to type for the packages of an extra of pyproject.toml."""
    return f'pip install "torch_rpa[{extra}]"'


@contextmanager
def from_extra(extra: str, needed_for: str) -> Iterator[None]:
    """Around imports of packages that come with an extra.

    Raises:
        ModuleNotFoundError: one is missing; the message has its name, and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{needed_for} needs {error.name}, which is not installed: {install_command(extra)}"
        raise ModuleNotFoundError(message, name=error.name) from error
