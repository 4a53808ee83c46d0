"""libtpu compiles the ops for real TPUs, ahead of time and without one, and leaves no copy around them."""

import itertools

import pytest
from batches import MODEL_HEADS

from benchmarks.compile_matrix import FACTORS, all_points, case_of, pairs_of, pairwise
from torch_rpa import chips, tpu_time
from torch_rpa.aot import OpCase, compile_report
from torch_rpa.aot.times import scalars

pytest.importorskip("libtpu")

NUM_POINTS = 24
SPECIAL = {
    "falcon-float32": OpCase("v6e", MODEL_HEADS["falcon-7b"], page_size=16, dtype="float32"),
    "heads-form-update": OpCase("v6e", MODEL_HEADS["llama-3-8b"], page_size=32, form="heads", update=True),
    "heads-form-one-kv-head": OpCase("v5e", MODEL_HEADS["llama-3-70b-on-8-chips"], form="heads", update=True),
    "heads-form-fp8": OpCase("v5e", MODEL_HEADS["llama-3-8b"], form="heads", kv_dtype="float8_e4m3fn"),
    "not-causal-update": OpCase("v6e", MODEL_HEADS["llama-3-8b"], update=True, options={"causal": False}),
    "qwen2.5-14b-update": OpCase("v5e", MODEL_HEADS["qwen2.5-14b"], page_size=256, update=True),
}
CASES = {"-".join(map(str, point.values())): case_of(point) for point in pairwise(NUM_POINTS)} | SPECIAL


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiles_for_a_tpu_without_copies_and_updates_in_place(case):
    report = compile_report(case)
    assert report.error is None
    assert report.copies == ()
    assert report.alias_bytes == (report.page_bytes if case.update else 0)
    assert report.temp_bytes < report.page_bytes / 2
    assert 0 < report.vmem_bytes <= chips.named(case.chip).vmem_limit_bytes
    assert report.seconds < 60  # 4 to 16 s on two cores of their own


@pytest.mark.slow
def test_decode_of_a_long_sequence_takes_as_long_as_its_sliding_window(tmp_path):
    """Modelled, and so the same on every machine."""
    sizes = {"context": 32768, "num_pages": 64 * 256}
    case = OpCase("v6e", MODEL_HEADS["llama-3-8b"], options={"sliding_window": 1024}, **sizes)
    assert compile_report(case, tmp_path).error is None
    kernel = tpu_time.Kernel(tmp_path, "v6e")
    window, long = (kernel.run(scalars(case, [(1, kv_len)] * 64)).microseconds for kv_len in (1024, 32768))
    assert 0.95 * window < long < 1.05 * window


@pytest.mark.slow
def test_a_report_of_what_does_not_compile_says_why():
    report = compile_report(OpCase("v4", MODEL_HEADS["phi-3-mini"], page_size=256))
    assert report.error.startswith("NotImplementedError: torch_rpa cannot run this call: 16 rows and 1 pages of 256")
    assert "use smaller pages" in report.error
    report = compile_report(OpCase("v3", MODEL_HEADS["llama-3-8b"]))
    assert report.error == "ValueError: chip must be one of v4, v5e, v5p, v6e, 7x, or None if it is not known; got 'v3'"


def test_the_subset_of_the_matrix_covers_every_pair_that_so_few_cases_can():
    """28 cases would take in every pair of model and chip; in 24, each model still meets at least three chips."""
    covered = set().union(*map(pairs_of, pairwise(NUM_POINTS)))
    missing = set().union(*map(pairs_of, all_points())) - covered
    assert {(a, b) for (a, _), (b, _) in missing} <= {("chip", "model"), ("page_size", "model")}
    for model, factor in itertools.product(FACTORS["model"], ("chip", "page_size")):
        levels = {level for level in FACTORS[factor] if ((factor, level), ("model", model)) in covered}
        assert len(levels) >= 3, (model, factor)


def test_a_larger_subset_covers_every_pair():
    every_pair = set().union(*map(pairs_of, all_points()))
    assert set().union(*map(pairs_of, pairwise(28))) == every_pair


@pytest.mark.parametrize(
    ("device_kind", "name"), [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e"), ("cpu", None)]
)
def test_a_chip_is_known_by_what_pjrt_calls_its_devices(device_kind, name):
    assert chips.name_of(device_kind) == name


def test_no_chip_is_asked_for_more_vector_memory_than_it_has():
    assert all(chip.vmem_limit_bytes < chip.vmem_bytes for chip in chips.CHIPS.values())
    assert all(chips.named(None).vmem_limit_bytes < c.vmem_bytes for c in chips.CHIPS.values() if c.name != "v4")
