"""What a TPU will make of the ops, or of a model, before there is one: libtpu compiles for it on any Linux host.

``python -m torch_rpa.aot --chip v6e --model llama-3-8b`` prints it. From Python:

    report = compile_report(OpCase(chip="v6e", heads=(32, 8, 128), page_size=16, update=True))
"""

from torch_rpa.aot.op import (
    OpCase,
    Report,
    child_environment,
    compile_for,
    compile_op,
    compile_report,
    environment,
    hbm_copies,
    report,
)

__all__ = [
    "OpCase",
    "Report",
    "child_environment",
    "compile_for",
    "compile_op",
    "compile_report",
    "environment",
    "hbm_copies",
    "report",
]
