"""What the README prints runs as printed."""

import re
import sys

import pytest
import torch

from tests.processes import REPO, run, site_of_extras

README = (REPO / "README.md").read_text()
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def example(text):
    (code,) = [code for code in EXAMPLES if text in code]
    return code


def test_the_op_example_runs_as_printed(capsys):
    exec(example("ragged_paged_attention_update_"), {})
    assert capsys.readouterr().out == "torch.Size([4, 6, 64])\n"


def test_the_op_example_is_short():
    assert len(example("ragged_paged_attention_update_").strip().splitlines()) <= 16


def test_the_op_example_runs_on_xla_tensors(xla, capsys):
    with torch.no_grad():
        exec(example("ragged_paged_attention_update_").replace('"cpu"', '"xla"'), {})
    assert capsys.readouterr().out == "torch.Size([4, 6, 64])\n"


@pytest.mark.slow
def test_the_transformers_example_runs_with_the_packages_of_its_extras_alone(xla, tmp_path):
    from torch_rpa.hf import smollm2

    smollm2.load()  # converts the model once
    code = example("torch_rpa.hf.unpatch(model)").replace(HUB_NAME, str(smollm2._model_folder()))
    site = site_of_extras(tmp_path / "site", "xla", "hf")
    printed = run(sys.executable, "-S", "-c", code, env={"PYTHONPATH": f"{site}:{REPO}"}, cwd=tmp_path).stdout
    assert "Paris" in printed
    assert not (site / "accelerate").exists(), "whose import would bring torch_xla"


def test_the_two_commands_exist():
    makefile = (REPO / "Makefile").read_text()
    for command in re.findall(r"^make (\w+) ", README, flags=re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command


def test_every_documented_op_exists():
    import torch_rpa  # noqa: F401

    for name in re.findall(r"^\| `(ragged_paged_attention\w*)`", README, flags=re.MULTILINE):
        assert hasattr(torch.ops.rpa, name)
