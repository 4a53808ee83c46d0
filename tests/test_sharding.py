"""Several chips: SPMD is for a whole process, so these tests run in one of their own (``tests/spmd``)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    run(FOLDER / "model_program.py", "v5e", "4", tmp_path / "program")
    report = json.loads(run(FOLDER / "program.py", "compile", "v5e:2x2", tmp_path / "program").splitlines()[-1])
    assert report["kernels"] == 2, "the Pallas kernel must be inside"
    assert sorted(report["collectives"]) == ["all-gather"] + ["all-reduce"] * (1 + 2 * 2)
    assert report["gathered"] == ["bf16[64,32768]"], "the logits of 64 sequences"
    assert report["alias_bytes"] == json.loads((tmp_path / "program").read_text())["cache_bytes"] // 4
    assert report["temp_bytes"] < 2**24
