"""The README's tables that a program writes: each between comments that say which, and by what it is written.

<!-- NAME: `make TARGET` writes this -->
| ... |
<!-- NAME end -->
"""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def with_table(name: str, table: str) -> str:
    """The README's text with this table, whose lines end in a newline; ValueError if it has no such comments."""
    between = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- {name} end -->\n)"
    text, count = re.subn(between, lambda match: match[1] + table + match[2], README.read_text(), flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{README} has {count} places for the table {name!r}, expected one")
    return text
