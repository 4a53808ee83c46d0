"""Several chips: SPMD is for a whole process, so these tests run in one of their own (``tests/spmd``)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torch_rpa import workloads
from torch_rpa.aot import models, whole_model
from torch_rpa.aot.plan import Plan

pytestmark = pytest.mark.xla
FOLDER = Path(__file__).with_name("spmd")


def run(*command):
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(file.name for file in FOLDER.glob("test_*.py")))
def test_on_four_virtual_chips(name):
    run("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", FOLDER / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "num_chips", "num_kv_heads"),
    [("v5e:2x2", 4, 8), ("v6e:2x4", 8, 8), ("v6e:2x4", 8, 2), ("v6e:4x4", 16, 8)],
)
def test_libtpu_compiles_two_sharded_blocks_with_one_all_reduce_each(tmp_path, topology, num_chips, num_kv_heads):
    pytest.importorskip("libtpu")
    run(FOLDER / "program.py", "trace", topology.split(":")[0], str(num_chips), tmp_path / "program", str(num_kv_heads))
    report = json.loads(run(FOLDER / "program.py", "compile", topology, tmp_path / "program").splitlines()[-1])
    assert report["kernels"] == 2, "the Pallas kernel must be inside"
    assert report["collectives"] == ["all-reduce"] * 2
    assert report["copies"] == []
    stored = max(num_kv_heads, num_chips)  # KV heads of the whole cache
    assert report["alias_bytes"] == report["page_bytes_of_a_head"] * stored // num_chips
    assert report["temp_bytes"] < report["alias_bytes"] / 4


@pytest.mark.slow
def test_libtpu_compiles_a_whole_sharded_model_with_megatrons_collectives(tmp_path):
    """For each layer an all-reduce after the attention and one after the MLP; one for the embedding, whose rows are
    spread over the chips, and an all-gather of the logits. Nothing gathers q, k, v, pages or a weight."""
    pytest.importorskip("libtpu")
    config = workloads.MODELS["llama-3-8b"].config | {"num_hidden_layers": 2, "vocab_size": 32768}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = Plan("v5e", models.of_name(str(tmp_path)), num_chips=4)
    report = whole_model.model_report(plan)
    assert report.error is None
    assert report.kernels == 2, "the Pallas kernel must be inside"
    gathers = {name: count for name, count in report.collectives.items() if name != "all-reduce"}
    assert report.collectives["all-reduce"] == 1 + 2 * 2
    assert list(gathers.values()) == [1]
    assert re.fullmatch(r"all-gather of bf16\[(64,32768|4,8192,64)\]", *gathers), "the logits of 64 sequences"
    assert report.gathered == ()
    assert report.updated_bytes == report.cache_bytes == plan.cache_tokens * plan.token_bytes
    norms, inputs = 2 * 5 * 4096, 2**16
    assert 0 <= report.argument_bytes - report.cache_bytes - plan.weight_bytes < norms + inputs
    assert report.temp_bytes < 2**24
