"""Compile what a plan needs, and say in plain words what came of it."""

import re
import tempfile
from dataclasses import dataclass, field

from tqdm import tqdm

from torch_rpa.aot import times
from torch_rpa.aot.op import Report, compile_report
from torch_rpa.aot.plan import Plan, PlannedOp
from torch_rpa.aot.times import OpTime, StepTime
from torch_rpa.aot.whole_model import ModelReport, model_report

# What libtpu and XLA say of a program that does not compile, and what would help.
_ADVICE = {
    r"space=smem": "SMEM: lower --max-context or --max-seqs, or raise --page-size",
    r"memory space hbm": "HBM: raise --num-chips, or lower --max-context or --max-tokens",
    r"(?i)vmem": "VMEM: lower --page-size",
    r"Invalid TPU external name": "the installed libtpu does not know this --chip, a newer one may",
}


@dataclass(frozen=True)
class OpAnswer:
    """One compiled op.

    modelled: times of ``torch_rpa.aot.times.batches``; empty where ``untimed`` says why they cannot be modelled.
    """

    op: PlannedOp
    report: Report
    modelled: dict[str, OpTime] = field(default_factory=dict)
    untimed: str | None = None

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
    """What is known of a plan: ``problems`` is empty where it works and fits.

    Attributes:
        ops: the compiled ops; model: the compiled step of the whole model. Of these what was asked for.
    """

    plan: Plan
    ops: list[OpAnswer] = field(default_factory=list)
    model: ModelReport | None = None

    @property
    def steps(self) -> dict[str, StepTime]:
        """Of each of ``torch_rpa.aot.times.batches`` on the whole model; empty where times or weights are not known."""
        if self.plan.weight_bytes is None or not self.ops or not all(answer.modelled for answer in self.ops):
            return {}
        batches = times.batches(self.ops[0].op.case)
        return {name: self._step(name, batch) for name, batch in batches.items()}

    def _step(self, name: str, batch) -> StepTime:
        attention = sum(answer.op.num_layers * answer.modelled[name].microseconds for answer in self.ops) * 1e-6
        return StepTime(times.least_seconds_of_weights(self.plan.chip, self.plan.weight_bytes, batch), attention)

    @property
    def problems(self) -> list[str]:
        of_plan = self.plan.problems() or [self.plan.hbm_problem()]
        of_ops = [f"{answer.op.name}: {answer.problem}" for answer in self.ops if answer.problem]
        return [problem for problem in (*of_plan, *of_ops, self._model_problem()) if problem]

    def _model_problem(self) -> str | None:
        if self.model is None:
            return None
        if self.model.error:
            return f"the whole model: {explain(self.model.error)}"
        if self.model.updated_bytes < self.model.cache_bytes:
            return "the whole model: the cache is copied, not updated in place"
        if self.model.gathered:
            return f"the whole model: every chip gathers {', '.join(self.model.gathered)}: try another --num-chips"
        return None


def answer(plan: Plan, reading: bool = True) -> Answer:
    """Compile every op of a plan, with a progress bar on stderr; nothing if it is known not to work.

    Args:
        reading: see ``Plan.ops``.
    """
    if plan.problems():
        return Answer(plan)
    ops = tqdm(plan.ops(reading), desc=f"compiling for {plan.chip}", unit="op")
    return Answer(plan, [op_answer(op) for op in ops])


def whole_model_answer(plan: Plan) -> Answer:
    """Compile a step of the whole model; nothing if the plan is known not to work."""
    if plan.problems() or plan.hbm_problem():
        return Answer(plan)
    with tqdm(total=1, desc=f"compiling {plan.model.name} for {plan.chip}, a few minutes", unit="step") as bar:
        report = model_report(plan)
        bar.update()
    return Answer(plan, model=report)


def op_answer(op: PlannedOp) -> OpAnswer:
    """Compile one op, and model its times from libtpu's dumps."""
    with tempfile.TemporaryDirectory(prefix="torch_rpa_") as dump:
        report = compile_report(op.case, dump)
        if report.error:
            return OpAnswer(op, report)
        try:
            return OpAnswer(op, report, times.modelled_times(op.case, dump))
        except (NotImplementedError, RuntimeError) as error:
            return OpAnswer(op, report, untimed=str(error))


def explain(error: str) -> str:
    """The error of a compile, after the option that would help where it is known."""
    advice = next((advice for pattern, advice in _ADVICE.items() if re.search(pattern, error)), None)
    return f"{advice} ({error})" if advice else error
