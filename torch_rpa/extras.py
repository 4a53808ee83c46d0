"""Packages that only some parts of torch_rpa need: where one is missing, what to type."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


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
        raise _missing(error.name, extra, needed_for) from error


def require(*names: str, extra: str, needed_for: str) -> None:
    """Raise what ``from_extra`` raises for the first of these packages that is not installed; imports none of them."""
    for name in names:
        if find_spec(name) is None:
            raise _missing(name, extra, needed_for)


def _missing(name: str | None, extra: str, needed_for: str) -> ModuleNotFoundError:
    message = f"{needed_for} needs {name}, which is not installed: {install_command(extra)}"
    return ModuleNotFoundError(message, name=name)
