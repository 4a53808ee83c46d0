"""Names that a caller wrote: which of them do not exist, and what was probably meant."""

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches


def unknown_names(names: Iterable[str], known: Collection[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """The names that are not known, each with its nearest known one, as a text; empty if all are known.

    elsewhere: names that others use -> what to say here.
    """
    elsewhere = elsewhere or {}
    return ", ".join(_described(name, known, elsewhere) for name in names if name not in known)


def _described(name: str, known: Collection[str], elsewhere: Mapping[str, str]) -> str:
    if name in elsewhere:
        return f"{name} ({elsewhere[name]})"
    nearest = get_close_matches(name, known, n=1)
    return f"{name} (did you mean {nearest[0]}?)" if nearest else name
