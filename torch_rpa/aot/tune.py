"""Other block sizes than the kernel's rule would choose, by modelled time."""

import itertools
import math
from dataclasses import replace
from statistics import geometric_mean
from typing import NamedTuple

from tqdm import tqdm

from torch_rpa.aot.answer import Answer, OpAnswer, op_answer

_FEWEST_ROWS = 16  # a tile of the narrowest q dtype


class Blocks(NamedTuple):
    """``num_kv_pages_per_block`` and ``num_queries_per_block``."""

    pages: int
    rows: int


class Tried(NamedTuple):
    """What blocks came to: the op with them, and its time over that with the rule's blocks, None if there is none.

    The ratio is the geometric mean over the steps of ``torch_rpa.aot.times.batches``.
    """

    blocks: Blocks
    answer: OpAnswer
    ratio: float | None
    is_rule: bool = False


def tune_most_called(found: Answer) -> list[Tried]:
    """``tune`` of the op that the most layers call; nothing where its time is not known."""
    timed = [answer for answer in found.ops if answer.modelled and not answer.problem]
    return tune(max(timed, key=lambda answer: answer.op.num_layers)) if timed else []


def tune(rule: OpAnswer) -> list[Tried]:
    """Compile an op with half, the same and twice the rule's pages and rows, with a progress bar; the fastest first.

    Args:
        rule: the op with the blocks that the rule chose; its time must be known.
    """
    chosen = Blocks(rule.report.block_keys // rule.op.case.page_size, rule.report.block_rows)
    others = [blocks for blocks in _around(chosen, rule.op.case.num_tokens) if blocks != chosen]
    tried = [Tried(chosen, rule, 1.0, is_rule=True)]
    for blocks in tqdm(others, desc="trying blocks", unit="compile"):
        answer = _with_blocks(rule, blocks)
        tried.append(Tried(blocks, answer, _ratio(answer, rule)))
    return sorted(tried, key=lambda one: math.inf if one.ratio is None else one.ratio)


def _around(blocks: Blocks, num_tokens: int) -> list[Blocks]:
    pages = [n for n in (blocks.pages // 2, blocks.pages, 2 * blocks.pages) if n >= 1]
    rows = [
        n for n in (blocks.rows // 2, blocks.rows, 2 * blocks.rows) if _FEWEST_ROWS <= n <= max(num_tokens, blocks.rows)
    ]
    return [Blocks(*sizes) for sizes in itertools.product(pages, rows)]


def _with_blocks(rule: OpAnswer, blocks: Blocks) -> OpAnswer:
    options = {"num_kv_pages_per_block": blocks.pages, "num_queries_per_block": blocks.rows}
    case = replace(rule.op.case, options=rule.op.case.options | options)
    return op_answer(replace(rule.op, case=case))


def _ratio(answer: OpAnswer, rule: OpAnswer) -> float | None:
    if answer.problem or not answer.modelled:
        return None
    ratios = [time.microseconds / rule.modelled[name].microseconds for name, time in answer.modelled.items()]
    return geometric_mean(ratios)
