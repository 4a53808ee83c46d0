"""The text of libtpu's dumps: bundles of operations, and where the kernel's memory stands.

    0x1f   : > { %s827_s11 = sshll.u32 %s230_s10, 7  ;;  %310 = sst [smem:[#allocation12 + $0x3]] (!%p78_p5), %s95_s18 }

A bundle's operations stand between braces, apart by ``;;``. ``%s827_s11`` is a value in scalar register 11, ``%p78_p5``
one in predicate register 5. ``(!%p78_p5)`` is a guard: the operation happens where the predicate is false.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2} *)*: *(?:> *)*\{", re.MULTILINE)
_LABEL = re.compile(r"/\*(\w+)=\*/")
_COMMENT = re.compile(r"/\*(?:(?!/\*).)*?\*/", re.DOTALL)  # one without another one in it
# libtpu 0.0.42 for 7x: which memories such a DMA is between stands in a comment only.
_GENERAL_DMA = re.compile(r"dma\.general\b([^;{}]*)/\* (\w+)-to-(\w+) \*/")
_OPERATION = re.compile(r"(?:(%\w+) = )?([a-z][\w.]*)\s*(.*)", re.DOTALL)
_HINT = re.compile(r"\[(?:thread|resolvable):\$\w+\]\s*,?")
_GUARD = re.compile(r"\((!?%p\w+)(?:, (%\w+))?\)\s*,?")
# Top-level commas separate operands, and so does the end of a memory reference.
_OPERAND = re.compile(r"(?:\w+=)?\[(?:[^\[\]]|\[[^\[\]]*\])*\]|[^,\s\[][^,]*")
_ALLOCATION = re.compile(
    r"^\s*#(allocation\w+) \[shape = .*?, space=(\w+), size = \w+, offset = (\w+)(.*)", re.MULTILINE
)
_DIVISION = re.compile(r"= s(div|rem)\.u32\.pop (%\w+), (%\w+)")
_DIVREM = re.compile(r"(%\w+) = sdivrem\.u32 (%\w+), (%\w+)")
# Of the vector slot, what controls the program. All else there computes on vectors.
_VECTOR_CONTROL = ("vsync", "vwait", "vdelay", "vdma", "vhalt", "vshalt", "vpop.sfrf")


@dataclass(frozen=True)
class Operation:
    """One operation that the scalar program consists of.

    Attributes:
        result: "%s827_s11"; "%310" where it stands in no register; "" for none.
        operands: texts; a labelled one has its label, as "size_in_granules=16384".
        guard: a predicate, with "!" if it must be false; None if the operation always happens.
        otherwise: of a guarded move, the value that is moved where the guard does not hold.
    """

    result: str
    code: str
    operands: tuple[str, ...]
    guard: str | None = None
    otherwise: str | None = None


@dataclass(frozen=True)
class Allocation:
    """Memory in a space ("smem", "sflag", "vmem"), at so many bytes from the kernel's first, or from the chip's."""

    space: str
    offset: int
    is_absolute: bool


def bundles(path: Path) -> list[list[Operation]]:
    """The scalar program's operations of each bundle, of a ``*-packed-bundles-post-ra.txt``.

    Raises ValueError for a text that is not such a listing.
    """
    text = path.read_text(errors="replace")
    starts = list(_BUNDLE.finditer(text))
    if not starts or [int(m[1], 16) for m in starts] != list(range(len(starts))):
        raise ValueError(f"{path}: its bundles are not numbered from 0 without a gap")
    ends = [m.start() for m in starts[1:]] + [len(text)]
    return [_operations(text[m.end() : end]) for m, end in zip(starts, ends, strict=True)]


def allocations(path: Path) -> dict[str, Allocation]:
    """A kernel's memory by name, of a ``*-post-delay-converter.txt``."""
    found = _ALLOCATION.findall(path.read_text(errors="replace"))
    return {
        name: Allocation(space, int(offset, 0), "constant byte address" in rest or "fixed_abs" in rest)
        for name, space, offset, rest in found
    }


def divisions(before: Path, after: Path) -> dict[str, str]:
    """Whether each ``sdivrem`` gives a quotient, "div", or a rest, "rem", by its result; those left out may give both.

    Args:
        before, after: the dumps before and after the stage that makes one operation of the two, for bundles do not say.
    """
    kinds = defaultdict(set)
    for kind, *operands in _DIVISION.findall(before.read_text(errors="replace")):
        kinds[tuple(operands)].add(kind)
    found = {result: kinds[a, b] for result, a, b in _DIVREM.findall(after.read_text(errors="replace"))}
    return {result: min(names) for result, names in found.items() if len(names) == 1}


def _operations(bundle: str) -> list[Operation]:
    parts = (part.strip(" }\n") for part in _without_comments(bundle).split(";;"))
    found = [_operation(part) for part in parts if part]
    return [operation for operation in found if operation is not None]


def _without_comments(text: str) -> str:
    text, count = _LABEL.sub(r"\1=", _GENERAL_DMA.sub(r"dma.\2_to_\3\1", text)), 1
    while count:
        text, count = _COMMENT.subn("", text)
    return text


def _operation(text: str) -> Operation | None:
    """None for one that concerns vectors only."""
    match = _OPERATION.match(text)
    if match is None:
        raise ValueError(f"no operation of a bundle: {text[:100]!r}")
    result, code, rest = match[1] or "", match[2], _HINT.sub("", match[3])
    if code.startswith("v") and not code.startswith(_VECTOR_CONTROL) and not re.search(r"_[sp]\d+$", result):
        return None
    guard = _GUARD.search(rest)
    operands = tuple(operand.strip() for operand in _OPERAND.findall(_GUARD.sub("", rest, count=1)))
    return Operation(result, code, operands, *(guard.groups() if guard else (None, None)))
