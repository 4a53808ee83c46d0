"""The README's table of models: what each family's attention layers ask for, recorded from its tiny model.

`make family-table` writes it between the markers in README.md.
"""

from functools import cache

from tiny_models import FAMILIES, make_model

from benchmarks.readme import README, with_table
from torch_rpa.hf.model import layers
from torch_rpa.hf.model.heads import kv_source_layers
from torch_rpa.hf.model.layers import AttentionCall


@cache
def attention_calls(family: str) -> list[AttentionCall]:
    """One for each layer of the family's tiny model."""
    return layers.attention_calls(make_model(family))


def options_that_matter(family: str) -> list[str]:
    """The attention's options that differ from a plain layer's, by the keyword that carries them."""
    calls = attention_calls(family)
    has = {
        "sliding_window": any(call.sliding_window is not None for call in calls),
        "softcap": any(call.softcap is not None for call in calls),
        "s_aux": any(call.sinks for call in calls),
        "scaling": any(call.has_own_scaling for call in calls),
    }
    return [name for name, is_there in has.items() if is_there]


def table() -> str:
    header = "| model | class in transformers | heads | window | and |\n|---|---|---|---|---|\n"
    return header + "".join(_row(family) for family in FAMILIES)


def _row(family: str) -> str:
    one = FAMILIES[family]
    cells = [one.title, f"`{one.model_class}`", _heads(family), _windows(family), ", ".join(_extras(family))]
    return "| " + " | ".join(cells) + " |\n"


def _heads(family: str) -> str:
    call = attention_calls(family)[0]
    if call.num_kv_heads == call.num_q_heads:
        return "multi-head"
    return "multi-query" if call.num_kv_heads == 1 else "grouped"


def _windows(family: str) -> str:
    windowed = [call.sliding_window is not None for call in attention_calls(family)]
    if all(windowed):
        return "all layers"
    return f"{sum(windowed)} of {len(windowed)} layers" if any(windowed) else ""


def _extras(family: str) -> list[str]:
    names = {"softcap": "soft cap", "s_aux": "sinks", "scaling": "own scaling"}
    extras = [names[option] for option in options_that_matter(family) if option in names]
    config = FAMILIES[family].config()
    if kv_source_layers(config) != list(range(config.num_hidden_layers)):
        extras.append("layers that share keys and values")
    if FAMILIES[family].model_type._can_set_experts_implementation():
        extras.append("experts")
    return extras


if __name__ == "__main__":
    README.write_text(with_table("families", table()))
