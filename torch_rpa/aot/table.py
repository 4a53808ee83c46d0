"""An ``Answer`` as text for a terminal, and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from torch_rpa import chips
from torch_rpa.aot import times
from torch_rpa.aot.answer import Answer, OpAnswer
from torch_rpa.aot.plan import CACHE_SHARE, Plan
from torch_rpa.aot.tune import Tried
from torch_rpa.aot.whole_model import ModelReport
from torch_rpa.validation import TPU_SMEM_BYTES

_KIB, _MIB, _GIB = 2**10, 2**20, 2**30


def text(answer: Answer, tried: Sequence[Tried] = ()) -> str:
    """What a person reads: the plan, its memory, a column for each op, and what is wrong."""
    parts = [_heading(answer.plan)]
    if answer.ops or answer.model:
        parts.append(_align(_memory_rows(answer.plan)))
    if answer.ops:
        parts += [_align(_op_rows(answer.ops)), *_time_notes(answer)]
    if tried:
        parts.append(_align(_tuning_rows(tried)))
    if answer.model:
        parts.append(_align(_model_rows(answer.model)))
    if not answer.problems and answer.plan.patch_settings:
        parts.append(f"The engine that was modelled:\n{_patch_call(answer.plan)}")
    parts.append("\n".join(f"error: {problem}" for problem in answer.problems) or "It compiles and fits.")
    return "\n\n".join(parts)


def as_json(answer: Answer, tried: Sequence[Tried] = ()) -> str:
    """What a program reads: sizes in bytes, times in seconds unless their name says otherwise."""
    plan = answer.plan
    named = ("chip", "num_chips", "page_size", "max_tokens", "max_seqs", "max_context", "kv_dtype")
    known = {name: getattr(plan, name) for name in named} | {"model": plan.model.name, "problems": answer.problems}
    known["patch"] = plan.patch_settings
    if answer.ops or answer.model:
        memory = ("weight_bytes", "token_bytes", "cache_tokens")
        known["memory"] = {"hbm_bytes": chips.CHIPS[plan.chip].hbm_bytes, **{n: getattr(plan, n) for n in memory}}
        known["ops"] = [_op_fields(op) for op in answer.ops]
        known["steps"] = {name: step._asdict() for name, step in answer.steps.items()}
        known["tuning"] = [
            {**one.blocks._asdict(), "problem": one.answer.problem, "ratio": one.ratio, **_times(one.answer)}
            for one in tried
        ]
        known["whole_model"] = answer.model and answer.model._asdict()
    return json.dumps(known, indent=1)


def _op_fields(answer: OpAnswer) -> dict:
    named = {"name": answer.op.name, "layers": answer.op.num_layers, "problem": answer.problem}
    known = {"case": asdict(answer.op.case), "report": answer.report._asdict()}
    return named | known | _times(answer) | {"untimed": answer.untimed}


def _times(answer: OpAnswer) -> dict:
    return {"modelled": {name: time._asdict() for name, time in answer.modelled.items()}}


def _heading(plan: Plan) -> str:
    model, chips_ = plan.model, f"{plan.num_chips} x {plan.chip}"
    num_q_heads, num_kv_heads, head_dim = next(iter(model.layers)).heads
    layers = f"{num_q_heads} query and {num_kv_heads} KV heads of {head_dim}, {model.num_layers} layers"
    sizes = f"{plan.max_tokens} tokens a step, {plan.max_seqs} sequences of up to {plan.max_context} tokens"
    return f"{model.name} on {chips_}: {layers}\n{sizes}; pages of {plan.page_size} tokens, {plan.kv_dtype}"


def _patch_call(plan: Plan) -> str:
    """What to type for the engine of a plan."""
    settings = {name: repr(value) for name, value in (plan.patch_settings or {}).items()}
    if "kv_dtype" in settings:
        settings["kv_dtype"] = f"torch.{plan.kv_dtype}"
    if plan.num_chips > 1:
        settings["mesh"] = "mesh"
    return f"torch_rpa.hf.patch(model, {', '.join(f'{name}={value}' for name, value in settings.items())})"


def _memory_rows(plan: Plan) -> list[list[str]]:
    weights, tokens = plan.weight_bytes, plan.cache_tokens
    share = f"{CACHE_SHARE:.0%} of " + ("what the weights leave" if weights else "it: the weights are not known")
    return [
        ["HBM of a chip", f"{chips.CHIPS[plan.chip].hbm_bytes / _GIB:.0f} GiB"],
        ["weights", "-" if weights is None else f"{weights / _GIB:.2f} GiB"],
        ["cache", f"{plan.token_bytes / _KIB:g} KiB a token"],
        ["tokens that fit", f"{tokens}, {tokens / plan.max_context:.1f} full sequences, in {share}"],
    ]


def _op_rows(answers: list[OpAnswer]) -> list[list[str]]:
    always = {
        "op": lambda a: a.op.name,
        "layers": lambda a: str(a.op.num_layers or "-"),
        "compiles": lambda a: "no" if a.report.error else "yes",
        "compile time": lambda a: f"{a.report.seconds:.0f} s",
    }
    compiled = {
        "keys at a time": lambda a: str(a.report.block_keys),
        "rows at a time": lambda a: str(a.report.block_rows),
        "VMEM": lambda a: _of(a.report.vmem_bytes, chips.CHIPS[a.op.case.chip].vmem_bytes),
        "SMEM": lambda a: _of(a.report.smem_bytes, TPU_SMEM_BYTES),
        "copies": lambda a: str(len(a.report.copies) or "none"),
        "pages in place": _in_place,
    }
    names = dict.fromkeys(name for a in answers for name in times.batches(a.op.case))
    modelled = {name: lambda a, name=name: _time(a, name) for name in names}
    rows = [[title, *map(cell, answers)] for title, cell in always.items()]
    compiled = compiled | modelled
    return rows + [[title, *("-" if a.report.error else cell(a) for a in answers)] for title, cell in compiled.items()]


def _tuning_rows(tried: Sequence[Tried]) -> list[list[str]]:
    names = list(tried[0].answer.modelled)
    rows = [[f"{tried[0].answer.op.name}: pages a block", "rows a block", *names, "of the rule's time"]]
    for blocks, answer, ratio, is_rule in tried:
        times = [_time(answer, name) for name in names]
        note = answer.problem or "-" if ratio is None else f"{ratio:.3f}" + ", the rule" * is_rule
        rows.append([str(blocks.pages), str(blocks.rows), *times, note])
    return rows


def _model_rows(report: ModelReport) -> list[list[str]]:
    if report.error:
        return [["a step of the whole model compiles", "no"]]
    rows = [
        ["a step of the whole model compiles", f"yes, in {report.seconds:.0f} s"],
        ["calls of the attention kernel", f"{report.kernels}"],
        ["HBM of a chip for weights, cache and inputs", f"{report.argument_bytes / _GIB:.2f} GiB"],
        ["HBM of a chip for intermediate results", f"{report.temp_bytes / _MIB:.0f} MiB"],
        ["cache updated in place", f"{report.updated_bytes / _GIB:.2f} of {report.cache_bytes / _GIB:.2f} GiB"],
        ["copies", _counts(report.copies)],
    ]
    return rows + [["between chips", _crossing(report)]] * bool(report.collectives)


def _crossing(report: ModelReport) -> str:
    a_layer = {name: count // report.kernels for name, count in report.collectives.items()}
    named = {f"{name} ({n} a layer)" if (n := a_layer[name]) else name: x for name, x in report.collectives.items()}
    return _counts(named)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none"


def _time(answer: OpAnswer, name: str) -> str:
    if name not in answer.modelled:
        return "not modelled" if answer.untimed else "-"
    microseconds, share = answer.modelled[name]
    return f"{microseconds:.0f} us, {share:.0%} of " + ("bandwidth" if name.startswith("decode") else "peak")


def _time_notes(answer: Answer) -> list[str]:
    """What the modelled times are, the times of whole steps, and why there are none."""
    untimed = dict.fromkeys(f"Not modelled: {a.untimed}" for a in answer.ops if a.untimed)
    steps = [
        [name, f"{1e3 * step.weights:.1f} ms", f"{1e3 * step.attention:.1f} ms", f"{1e3 * sum(step):.1f} ms"]
        for name, step in answer.steps.items()
    ]
    notes = (
        ["Times are modelled from the compiled program, not measured."] if any(a.modelled for a in answer.ops) else []
    )
    if steps:
        notes.append(_align([["a step takes at least", "weights", "attention", "both"], *steps]))
    return notes + ["\n".join(untimed)] * bool(untimed)


def _in_place(answer: OpAnswer) -> str:
    if not answer.op.case.update:
        return "-"
    return "yes" if answer.report.alias_bytes == answer.report.page_bytes else "no"


def _of(used: int, there: int) -> str:
    amount = f"{used / _MIB:.0f}" if used >= _MIB else f"{used / _KIB:.0f} KiB"
    return f"{amount} of {there / _MIB:.0f} MiB"


def _align(rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
