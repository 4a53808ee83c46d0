"""Compile what a plan needs, and say in plain words what came of it."""

import re
from dataclasses import dataclass, field

from tqdm import tqdm

from torch_rpa.aot.op import Report, compile_report
from torch_rpa.aot.plan import Plan, PlannedOp

# What libtpu and XLA say of a program that does not compile, and what would help.
_ADVICE = {
    r"space=smem": "SMEM: lower --max-context or --max-seqs, or raise --page-size",
    r"memory space hbm": "HBM: raise --num-chips, or lower --max-context or --max-tokens",
    r"(?i)vmem": "VMEM: lower --page-size",
    r"Invalid TPU external name": "the installed libtpu does not know this --chip, a newer one may",
}


@dataclass(frozen=True)
class OpAnswer:
    """One compiled op."""

    op: PlannedOp
    report: Report

    @property
    def problem(self) -> str | None:
        """Why it does not compile, or what is wrong with the program, in one line."""
        if self.report.error:
            return explain(self.report.error)
        if self.report.copies:
            return f"copies of {', '.join(self.report.copies)}"
        if self.op.case.update and self.report.alias_bytes != self.report.page_bytes:
            return "the pages are copied, not updated in place"
        return None


@dataclass(frozen=True)
class Answer:
    """What is known of a plan: ``problems`` is empty where it works and fits."""

    plan: Plan
    ops: list[OpAnswer] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        hbm = self.plan.hbm_problem() if self.ops else None
        of_ops = [f"{answer.op.name}: {answer.problem}" for answer in self.ops if answer.problem]
        return [*self.plan.problems(), *([hbm] if hbm else []), *of_ops]


def answer(plan: Plan) -> Answer:
    """Compile every op of a plan, with a progress bar on stderr; nothing if it is known not to work."""
    if plan.problems():
        return Answer(plan)
    ops = tqdm(plan.ops(), desc=f"compiling for {plan.chip}", unit="op")
    return Answer(plan, [OpAnswer(op, compile_report(op.case)) for op in ops])


def explain(error: str) -> str:
    """The error of a compile, after the option that would help where it is known."""
    advice = next((advice for pattern, advice in _ADVICE.items() if re.search(pattern, error)), None)
    return f"{advice} ({error})" if advice else error
