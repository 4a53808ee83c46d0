"""`python -m torch_rpa.aot`: what a model takes of a chip, and what libtpu makes of its attention."""

import itertools
import json
import math
import re
import resource
import subprocess
import sys

import pytest
import torch

from benchmarks import aot_matrix
from torch_rpa import chips, workloads
from torch_rpa.aot import OpCase, Report, __main__, graph, hbm_copies, models, times, whole_model
from torch_rpa.aot import answer as answers
from torch_rpa.aot.plan import Plan
from torch_rpa.hf.engine.config import EngineConfig

GOOD = Report(None, 7.0, vmem_bytes=30 * 2**20, smem_bytes=2**14, block_keys=256, block_rows=128)
TIME = times.OpTime(100.0, 0.5)
LLAMA = ["--chip", "v6e", "--model", "llama-3-8b"]


def good_report(case: OpCase) -> Report:
    page_bytes = 2 * case.pages_shape[0]
    return GOOD._replace(page_bytes=page_bytes, alias_bytes=page_bytes * case.update)


def run(monkeypatch, *argv, error=None, copies=()):
    """The exit code of the command with a compiler that always says the same."""

    def compile_(case: OpCase, dump: str) -> Report:
        return Report(error, 1.0) if error else good_report(case)._replace(copies=copies)

    monkeypatch.setattr(answers, "compile_report", compile_)
    monkeypatch.setattr(answers.times, "modelled_times", lambda case, dump: dict.fromkeys(times.batches(case), TIME))
    return __main__.main([*map(str, argv)])


def rows(text):
    """{first column: the others} of the printed tables."""
    lines = [line.split("  ") for line in text.splitlines() if "  " in line]
    return {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}


def test_a_model_that_fits_is_a_table_and_exit_code_0(monkeypatch, capsys):
    assert run(monkeypatch, *LLAMA) == 0
    found = rows(capsys.readouterr().out)
    assert found["weights"] == ["14.96 GiB"]
    assert found["cache"] == ["128 KiB a token"]
    assert found["op"] == ["read", "update"]
    assert found["layers"] == ["-", "32"]
    assert found["VMEM"] == ["30 of 128 MiB"] * 2
    assert found["SMEM"] == ["16 KiB of 1 MiB"] * 2
    assert found["copies"] == ["none"] * 2
    assert found["pages in place"] == ["-", "yes"]
    assert "decode 13 x 8192" in found, "as many full sequences as the cache holds"


def test_json_has_the_same_facts(monkeypatch, capsys):
    assert run(monkeypatch, *LLAMA, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["memory"]["hbm_bytes"] == 32 * 2**30
    assert found["memory"]["token_bytes"] == 32 * 2 * 8 * 128 * 2
    assert [op["name"] for op in found["ops"]] == ["read", "update"]
    assert found["ops"][1]["report"]["vmem_bytes"] == GOOD.vmem_bytes


def test_layers_with_and_without_a_window_are_ops_of_their_own(monkeypatch, capsys):
    assert run(monkeypatch, "--chip", "v6e", "--model", "gemma-2-9b") == 0
    found = rows(capsys.readouterr().out)
    assert found["op"] == ["read, window 4096", "update, window 4096", "read", "update"]
    assert found["layers"] == ["-", "21", "-", "21"]


def test_heads_alone_say_how_many_tokens_fit_without_weights(monkeypatch, capsys):
    assert run(monkeypatch, "--chip", "v5e", "--heads", "32/8/128", "--layers", 2) == 0
    found = rows(capsys.readouterr().out)
    assert found["weights"] == ["-"]
    assert found["cache"] == ["8 KiB a token"]


def test_each_chip_has_its_share_of_heads_weights_and_cache(monkeypatch, capsys):
    assert run(monkeypatch, *LLAMA, "--num-chips", 4) == 0
    found = rows(capsys.readouterr().out)
    assert found["weights"] == ["3.74 GiB"]
    assert found["cache"] == ["32 KiB a token"]
    assert Plan("v6e", models.of_heads((32, 8, 128), 1), num_chips=16).ops()[0].case.heads == (2, 1, 128)


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["--chip", "v5e", "--model", "llama-3-8b"], "--num-chips"),  # its weights fill the chip
        (["--num-chips", 3], "--num-chips"),
        (["--page-size", 8, "--max-context", 8192, "--max-seqs", 512], "--max-context"),  # page table in SMEM
        (["--max-tokens", 16], "--max-tokens"),
        (["--max-context", 9000], "--max-context"),
    ],
)
def test_what_does_not_fit_names_the_option_to_change_and_exits_with_1(monkeypatch, capsys, argv, option):
    assert run(monkeypatch, *LLAMA, *argv) == 1
    (error,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    assert option in error


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("XlaRuntimeError: INVALID_ARGUMENT: Invalid TPU external name: TPU7x", "libtpu"),
        ("XlaRuntimeError: RESOURCE_EXHAUSTED: would exceed memory :: #allocation16 [space=smem]", "--max-context"),
        ("XlaRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", "--page-size"),
        ("XlaRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm", "--num-chips"),
        ("NotImplementedError: head_dim on TPU is one of 64", "head_dim"),
    ],
)
def test_an_op_that_does_not_compile_says_why_in_one_line_and_exits_with_1(monkeypatch, capsys, error, advice):
    assert run(monkeypatch, *LLAMA, error=error) == 1
    out = capsys.readouterr().out
    assert rows(out)["compiles"] == ["no", "no"]
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert all(error in line and advice in line for line in errors)


def test_a_chip_without_a_time_model_says_so_in_the_table(monkeypatch, capsys):
    monkeypatch.setattr(answers, "compile_report", lambda case, dump: good_report(case))
    assert __main__.main(["--chip", "v4", "--model", "llama-3-8b"]) == 0
    out = capsys.readouterr().out
    assert rows(out)["decode 13 x 8192"] == rows(out)["prefill 512 at 8192"] == ["not modelled"] * 2
    assert out.count("Not modelled: time is modelled for v5e, v5p, v6e, 7x; nothing says how v4 is timed") == 1


def test_a_copy_in_the_program_is_an_error(monkeypatch, capsys):
    assert run(monkeypatch, *LLAMA, copies=("bf16[512,4096]",)) == 1
    assert "error: read: copies of bf16[512,4096]" in capsys.readouterr().out


def test_a_model_that_patch_refuses_is_refused_by_name(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "falcon", "num_hidden_layers": 1}')
    assert run(monkeypatch, "--chip", "v6e", "--model", tmp_path) == 1
    assert "FalconForCausalLM" in capsys.readouterr().err


def test_a_model_that_is_no_folder_and_no_name_is_an_error(monkeypatch, capsys):
    assert run(monkeypatch, "--chip", "v6e", "--model", "nowhere") == 1
    assert "--model must be a folder with a config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [["--heads", "32"], ["--heads", "32/8/0"], ["--model", "x", "--max-seqs", "-1"], ["--model", "x", "--chip", "v3"],
     ["--model", "x", "--page-size", "48"]],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(capsys, argv):
    with pytest.raises(SystemExit):
        __main__.parse_args(["--chip", "v6e", *argv])
    assert argv[-2] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "chip"),
    [("ironwood", "7x"), ("Trillium", "v6e"), ("v5litepod", "v5e"), ("tpu7x", "7x"), ("v5p", "v5p")],
)
def test_a_chip_goes_by_the_names_that_people_and_cloud_tpu_call_it(typed, chip):
    assert __main__.parse_args(["--chip", typed, "--model", "x"]).chip == chip
    assert chips.named(typed).name == chip


@pytest.mark.parametrize("argv", [["--help"], ["--chip", "v6"], ["--chip", "v6e", "--model", "lama-3-8b"]])
def test_help_and_typos_take_less_than_a_second_of_cpu_and_load_no_large_package(argv):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", "torch_rpa.aot", *argv]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", result.stderr, flags=re.MULTILINE))
    assert "torch_rpa.aot.plan" in imported
    assert imported.isdisjoint({"torch", "jax", "numpy", "transformers"})
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_weights_that_fill_more_than_the_chip_are_said_before_anything_is_compiled(monkeypatch, capsys):
    monkeypatch.setattr(answers, "compile_report", lambda *args: pytest.fail("compiled"))
    monkeypatch.setattr(answers, "model_report", lambda *args: pytest.fail("compiled"))
    for option in ([], ["--whole-model"]):
        argv = ["--chip", "v6e", "--model", "llama-3-70b-on-8-chips", "--num-chips", "2", *option]
        assert __main__.main(argv) == 1
        (error,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
        assert "weights of 65.7 GiB do not fit in the 32 GiB of a v6e: raise --num-chips to 5 or more" in error


def test_the_printed_patch_call_makes_the_engine_that_was_modelled(monkeypatch, capsys):
    assert run(monkeypatch, *LLAMA, "--max-seqs", 16, "--kv-dtype", "float8_e4m3fn") == 0
    (call,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("torch_rpa.hf.patch(model, ")]
    call = call.replace("torch_rpa.hf.patch(model, ", "EngineConfig(")
    config = eval(call, {"EngineConfig": EngineConfig, "torch": torch})
    assert (config.page_size, config.max_num_seqs, config.max_seq_len, config.buckets) == (128, 16, 8192, (16, 512))
    assert config.kv_dtype == torch.float8_e4m3fn
    assert config.num_pages == Plan("v6e", models.of_name("llama-3-8b"), kv_dtype="float8_e4m3fn").cache_pages


@pytest.mark.parametrize("name", workloads.MODELS)
def test_the_named_models_have_the_heads_and_options_of_their_configs(name):
    known = workloads.MODELS[name]
    plan = Plan("v6e", models.of_name(name), num_chips=known.num_chips)
    assert {op.case.heads for op in plan.ops()} == {known.heads}
    assert {op.case.sinks for op in plan.ops()} == {known.sinks}
    of_layers = [{k: v for k, v in op.case.options.items() if k != "sm_scale"} for op in plan.ops()]
    assert known.options in of_layers
    others = {k: v for k, v in known.options.items() if k != "sliding_window"}
    assert all(options in (known.options, others) for options in of_layers)


def test_a_layer_that_reads_another_ones_pages_needs_no_update_and_no_cache_of_its_own():
    owner, reader = (models.LayerKind((8, 2, 64), writes=writes) for writes in (True, False))
    plan = Plan("v6e", models.ModelFacts("shares", {owner: 3, reader: 2}))
    assert plan.token_bytes == 3 * 2 * 2 * 64 * 2
    assert [(op.name, op.num_layers) for op in plan.ops()] == [("read", 0), ("update", 3), ("read (2)", 2)]


def test_every_chip_has_memory_for_a_model_of_its_size():
    assert all(chip.vmem_bytes < chip.hbm_bytes < 2**37 for chip in chips.CHIPS.values())


@pytest.mark.parametrize(
    ("chip", "num_chips", "topology"),
    [
        ("v5e", 1, "v5e:2x2"), ("v6e", 4, "v6e:2x2"), ("v6e", 8, "v6e:2x4"), ("v5e", 16, "v5e:4x4"),
        ("v6e", 32, "v6e:4x8"), ("v5p", 8, "v5p:2x2x2"), ("v4", 16, "v4:2x2x4"), ("v5p", 32, "v5p:2x4x4"),
    ],
)  # fmt: skip
def test_a_plan_is_compiled_for_the_smallest_slice_that_has_its_chips(chip, num_chips, topology):
    assert chips.named(chip).topology_of(num_chips) == topology


def test_what_crosses_chips_and_what_is_copied_is_read_from_the_compiled_program():
    text = """
  %all-reduce.1 = bf16[512,4096]{1,0:T(8,128)} all-reduce(%fusion.17), channel_id=4
  %ag = (bf16[8,64]{1,0}, bf16[32,64]{1,0}, u32[]{:S(2)}) all-gather-start(%fusion.18), dimensions={0}
  %done = bf16[32,64]{1,0} all-gather-done(%ag)
  %t.1 = bf16[512,4096]{1,0} transpose(%gather.3), dimensions={0,1}
  %t.2 = bf16[4096,512]{1,0} transpose(%gather.3), dimensions={1,0}
  %copy.1 = f32[64]{0} copy(%x), backend_config={}
  %copy.2 = f32[]{:T(128)S(6)} copy(%y)
  %copy.3 = s32[64,64]{1,0} copy(%z)"""
    assert graph.collectives(text) == [("all-reduce", "bf16[512,4096]"), ("all-gather", "bf16[32,64]")]
    assert hbm_copies(text) == ("bf16[4096,512]", "f32[64]")


def test_tuning_prints_the_blocks_that_were_tried_the_fastest_first(monkeypatch, capsys):
    def modelled_times(case, dump):
        microseconds = 80.0 if case.options.get("num_queries_per_block") == 256 else 100.0
        return dict.fromkeys(times.batches(case), times.OpTime(microseconds, 0.5))

    monkeypatch.setattr(answers, "compile_report", lambda case, dump: good_report(case))
    monkeypatch.setattr(answers.times, "modelled_times", modelled_times)
    assert __main__.main([*LLAMA, "--tune", "--json"]) == 0
    tuning = json.loads(capsys.readouterr().out)["tuning"]
    assert {(one["pages"], one["rows"]) for one in tuning} == set(itertools.product((1, 2, 4), (64, 128, 256)))
    assert [one["rows"] for one in tuning[:3]] == [256] * 3
    assert [one["ratio"] for one in tuning] == pytest.approx([0.8] * 3 + [1.0] * 6)
    assert __main__.main([*LLAMA, "--tune"]) == 0
    assert "1.000, the rule" in capsys.readouterr().out


def test_the_matrix_has_a_row_for_each_model_and_a_column_for_each_chip_that_was_compiled(monkeypatch, capsys):
    assert run(monkeypatch, *LLAMA, "--json") == 0
    fits = json.loads(capsys.readouterr().out)
    fails = fits | {"chip": "v5e", "problems": ["read: no"]}
    step = {"decode": {"weights": 0.01, "attention": 0.0021}, "prefill": {"weights": 0.01, "attention": 0.0}}
    table = aot_matrix.markdown({("llama-3-8b", "v6e"): fits | {"steps": step}, ("llama-3-8b", "v5e"): fails})
    assert table.splitlines()[::2] == [
        "| | v5e | v6e |",
        "| llama-3-8b | read: no | 1 chip, 112k tokens, 12.1 / 10.0 ms |",
    ]


def test_the_matrix_goes_on_where_it_stopped(monkeypatch, tmp_path):
    names, asked = list(workloads.MODELS), []

    def stopped_at_the_third(plan, reading):
        asked.append(plan.model.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answers.Answer(plan)

    monkeypatch.setattr(aot_matrix, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(aot_matrix, "answer", stopped_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        aot_matrix.compile_missing(["v6e"])
    aot_matrix.compile_missing(["v6e"])
    assert asked == names[:3] + names[2:]


MODEL_REPORT = whole_model.ModelReport(
    None, 90.0, kernels=32, argument_bytes=28 * 2**30, updated_bytes=2**33, cache_bytes=2**33, copies={"bf16[64]": 2}
)


def test_a_whole_model_is_a_table_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(answers, "model_report", lambda plan: MODEL_REPORT)
    assert __main__.main([*LLAMA, "--whole-model"]) == 0
    found = rows(capsys.readouterr().out)
    assert found["calls of the attention kernel"] == ["32"]
    assert found["HBM of a chip for weights, cache and inputs"] == ["28.00 GiB"]
    assert found["copies"] == ["2 x bf16[64]"]
    assert "between chips" not in found


def test_a_whole_model_for_several_chips_says_what_crosses_them(monkeypatch, capsys):
    crossing = {"all-reduce": 65, "all-gather of bf16[64,128256]": 1}
    monkeypatch.setattr(answers, "model_report", lambda plan: MODEL_REPORT._replace(collectives=crossing))
    assert __main__.main([*LLAMA, "--whole-model", "--num-chips", "4"]) == 0
    (found,) = rows(capsys.readouterr().out)["between chips"]
    assert found == "65 x all-reduce (2 a layer), 1 x all-gather of bf16[64,128256]"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"error": "XlaRuntimeError: Ran out of memory in memory space hbm"}, "--num-chips"),
        ({"updated_bytes": 2**32}, "the cache is copied"),
        ({"gathered": ("bf16[4096,4096]",)}, "every chip gathers bf16[4096,4096]"),
    ],
)
def test_a_whole_model_that_fails_or_copies_its_cache_or_gathers_a_weight_exits_with_1(
    monkeypatch, capsys, changes, problem
):
    monkeypatch.setattr(answers, "model_report", lambda plan: MODEL_REPORT._replace(**changes))
    assert __main__.main([*LLAMA, "--whole-model", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem in found


@pytest.mark.parametrize(
    ("argv", "option"),
    [([*LLAMA, "--tune"], "--tune"), (["--chip", "v6e", "--heads", "8/8/128"], "--heads")],
)
def test_what_a_whole_model_cannot_be_compiled_with_is_refused(capsys, argv, option):
    assert __main__.main([*argv, "--whole-model"]) == 1
    assert option in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_of_a_whole_model_compiles_with_its_cache_in_place_and_without_its_weights(tmp_path):
    pytest.importorskip("libtpu")
    config = workloads.MODELS["llama-3-8b"].config | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = whole_model.model_report(Plan("v6e", models.of_name(str(tmp_path)), max_tokens=64))
    assert report.error is None
    assert report.kernels == 2
    assert report.updated_bytes == report.cache_bytes
    assert report.argument_bytes > 15 * 2**30, "weights and cache of a chip, far more than this process may hold"
    sizes = [math.prod(map(int, re.findall(r"\d+", shape.partition("[")[2]))) for shape in report.copies]
    assert max(sizes, default=0) <= 64 * 4096, "of rows of the step, not of weights or of the cache"
    assert report.copies.get("bf16[64,1024]", 0) <= 2, "of k in two layers, for RoPE's sake; v has none"


@pytest.mark.slow
def test_the_command_compiles_a_real_op():
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "torch_rpa.aot", "--chip", "v5e", "--model", "smollm2-135m", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["problems"] == []
    assert all(0 < op["report"]["vmem_bytes"] < 128 * 2**20 for op in found["ops"])
    assert "op" in result.stderr, "progress stands on stderr"
