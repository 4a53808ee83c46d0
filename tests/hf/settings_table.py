"""docs/generation_settings.md: how each setting of transformers is taken, from torch_rpa/hf/api/settings.py.

`make settings-table` writes it.
"""

from collections.abc import Mapping
from pathlib import Path

from torch_rpa.hf.api.settings import BATCHING, GENERATE_KEYWORDS, GENERATION, Setting

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "generation_settings.md"

INTRODUCTION = """\
# How the settings of transformers are taken

`make settings-table` writes this from `torch_rpa/hf/api/settings.py`, which is also what checks them; a test goes
through every field of the installed transformers.

- *honoured*: the engine does what it says.
- *changes nothing*: it may have any value, and the answer is the same.
- *refused*: a `NotImplementedError` that names it, but for None and what asks for nothing.
- *when sampling*: without `do_sample=True` it says nothing to a request; a caller who sets it is warned.
"""

SECTIONS = {
    "Fields of GenerationConfig, and keywords of `generate`, `generate_batch` and `add_request`": GENERATION,
    "Further keywords of `generate`": GENERATE_KEYWORDS,
    "Fields of ContinuousBatchingConfig (their own defaults ask for nothing)": BATCHING,
}


def document() -> str:
    return "\n".join([INTRODUCTION, *(_section(title, table) for title, table in SECTIONS.items())])


def _section(title: str, table: Mapping[str, Setting]) -> str:
    header = f"## {title}\n\n| setting | here | asks for nothing | note |\n|---|---|---|---|\n"
    return header + "".join(_row(name, setting) for name, setting in table.items())


def _row(name: str, setting: Setting) -> str:
    here = setting.kind.value + (", when sampling" if setting.only_sampling else "")
    off = [f"`{value!r}`" for value in setting.off] + (["what `patch` has set"] if setting.patch else [])
    return f"| `{name}` | {here} | {', '.join(off)} | {setting.note} |\n"


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document())
