"""libtpu compiles the ops for real TPUs, ahead of time and without one, and leaves no copy around them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from aot import ENVIRONMENT
from batches import MODEL_HEADS

pytest.importorskip("libtpu")

LLAMA = {"heads": MODEL_HEADS["llama-3-8b"], "sm_scale": 128**-0.5}
V4 = {"chip": "v4", "vmem_limit_bytes": 15 * 2**20}  # of its 16 MiB
CASES = {
    **{
        f"llama-{chip}-{page_size}-{'update' if update else 'read'}": {
            **LLAMA, "chip": chip, "page_size": page_size, "update": update
        }
        for chip, page_size, update in (("v6e", 16, True), ("v6e", 128, False), ("v5e", 16, False), ("v5e", 128, True))
    },
    "llama-v5p": {**LLAMA, "chip": "v5p", "page_size": 128, "update": True},
    "llama-v4": {**LLAMA, **V4, "page_size": 16, "update": True},
    "gemma": {
        "heads": MODEL_HEADS["gemma-2-9b"], "chip": "v6e", "page_size": 32, "sliding_window": 4096, "soft_cap": 50.0
    },
    "gpt-oss-int8": {
        "heads": MODEL_HEADS["gpt-oss-20b"], "chip": "v5e", "page_size": 16, "sliding_window": 128,
        "kv_dtype": "int8", "k_scale": 0.1, "v_scale": 0.1, "update": True,
    },
    "phi-fp8": {"heads": MODEL_HEADS["phi-3-mini"], "chip": "v6e", "page_size": 64, "kv_dtype": "float8_e4m3fn"},
    "smollm2": {"heads": MODEL_HEADS["smollm2-135m"], "chip": "v5e", "page_size": 16, "update": True},
    "falcon-float32": {"heads": MODEL_HEADS["falcon-7b"], "chip": "v6e", "page_size": 16, "dtype": "float32"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiles_for_a_tpu_without_copies_and_updates_in_place(case):
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), json.dumps([case])]
    result = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    (report,) = json.loads(result.stdout.splitlines()[-1])
    assert report["copies"] == []
    assert report["alias_bytes"] == (report["page_bytes"] if case.get("update") else 0)
    assert report["temp_bytes"] < report["page_bytes"] / 2
    assert report["seconds"] < 60  # 4 to 13 s on two cores of their own
