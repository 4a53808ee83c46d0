"""`torch_rpa.tpu_time`: the scalar program of libtpu's bundles, and the cycles that it takes."""

import gzip
import json
from pathlib import Path

import pytest

from torch_rpa import tpu_time, workloads
from torch_rpa.tpu_time import listing
from torch_rpa.tpu_time.machine import Machine, Timing
from torch_rpa.tpu_time.program import Program

DUMPS = Path(__file__).with_name("dumps")
# 1 GHz, and a granule of 32 bytes in 4 cycles of the HBM channel.
TIMING = Timing(clock_hz=1e9, hbm_bytes_per_s=8e9, dma_latency_s=100e-9, dma_cycles=8)
ALLOCATIONS = """\
  #allocation0 [shape = 's32[]', space=smem, size = 0x4, offset = 0x4, tag = 'smem constant byte address 0x4']
  #allocation1 [shape = 's32[128]{0}', space=smem, size = 0x200, offset = 0x100, tag = 'scratch operand']
  #allocation2 [shape = 's32[8]{0}', space=sflag, size = 0x20, offset = 0x8, tag = 'scratch operand']
"""
ADDRESSES = {"#allocation1": 0x100 // 4, "#allocation2": 0x8 // 4}


def dump(folder, *bundles):
    """A kernel of these bundles, as libtpu would dump it."""
    lines = [f"{index:#6x} {'LB' * bool(index)}: > {{ {' ;; '.join(b)} }}" for index, b in enumerate(bundles)]
    lines[0] = lines[0].replace("0x0", "  0")
    (folder / "1-kernel-07-packed-bundles-post-ra.txt").write_text("= key start\n\n" + "\n".join(lines) + "\n")
    (folder / "1-kernel-09-post-delay-converter.txt").write_text(ALLOCATIONS)


def run(folder, *bundles, scalars=(), divisions=None):
    """The machine after these bundles; each is a list of operations."""
    dump(folder, *bundles)
    parsed = listing.bundles(folder / "1-kernel-07-packed-bundles-post-ra.txt")
    allocations = listing.allocations(folder / "1-kernel-09-post-delay-converter.txt")
    return execute(Program(parsed, allocations, TIMING.branch_delay, divisions), scalars)


def execute(program, scalars):
    machine = Machine(TIMING, list(scalars))
    program.run(machine, most_cycles=10_000)
    return machine


def smem(machine, word=0):
    return machine.smem[ADDRESSES["#allocation1"] + word]


def store(value, word=0):
    return f"%9 = sst [smem:[#allocation1 + ${word:#x}]] {value}"


@pytest.mark.parametrize(
    ("code", "a", "b", "expected"),
    [
        ("sadd.s32", 4294967295, 3, 2),
        ("ssub.s32", 2, 3, 2**32 - 1),
        ("smul.u32", 2**20, 2**13, 0),
        ("smulhi.u32", 2**20, 2**13, 2),
        ("sshll.u32", 3, 31, 2**31),
        ("sshrl.u32", 2**32 - 8, 2, 2**30 - 2),
        ("sshra.s32", 2**32 - 8, 2, 2**32 - 2),
        ("smin.s32", 2**32 - 1, 5, 2**32 - 1),
        ("smin.u32", 2**32 - 1, 5, 5),
        ("sand.u32", 12, 10, 8),
        ("scalar_lea.smem", 7, 8, 15),
    ],
)
def test_arithmetic_is_that_of_32_bit_words(tmp_path, code, a, b, expected):
    machine = run(
        tmp_path, [f"%s1_s1 = smov {a}", f"%s2_s2 = smov {b}"], [f"%s3_s3 = {code} %s1_s1, %s2_s2"], [store("%s3_s3")]
    )
    assert smem(machine) == expected


@pytest.mark.parametrize(
    ("code", "a", "b", "expected"),
    [("lt.s32", 2**32 - 1, 0, 1), ("lt.u32", 2**32 - 1, 0, 0), ("ge.s32", 4, 4, 1), ("ne.s32", 4, 4, 0)],
)
def test_comparisons_are_signed_or_not(tmp_path, code, a, b, expected):
    machine = run(
        tmp_path,
        [f"%s1_s1 = smov {a}", f"%s2_s2 = smov {b}"],
        [f"%p1_p1 = scmp.{code}.totalorder %s1_s1, %s2_s2"],
        ["%s3_s3 = scalar_select /*predicate=*/%p1_p1, /*on_true=*/1, /*on_false=*/0"],
        [store("%s3_s3")],
    )
    assert smem(machine) == expected


def test_a_bundle_reads_every_operand_before_it_writes_a_result(tmp_path):
    swap = ["%s3_s1 = smov %s2_s2", "%s4_s2 = smov %s1_s1"]
    machine = run(tmp_path, ["%s1_s1 = smov 5", "%s2_s2 = smov 6"], swap, [store("%s3_s1"), store("%s4_s2", 1)])
    assert (smem(machine), smem(machine, 1)) == (6, 5)


def test_a_guarded_operation_happens_only_where_its_predicate_says_so(tmp_path):
    machine = run(
        tmp_path,
        ["%s1_s1 = smov 5"],
        ["%p1_p1 = scmp.eq.s32.totalorder %s1_s1, 5"],
        ["%s2_s1 = smov (!%p1_p1, %s1_s1), 9", "%9 = sst [smem:[#allocation1 + $0x1]] (!%p1_p1), %s1_s1"],
        ["%s3_s2 = smov (%p1_p1), 7"],
        [store("%s2_s1"), store("%s3_s2", 2)],
    )
    assert smem(machine) == 5
    assert smem(machine, 2) == 7
    assert ADDRESSES["#allocation1"] + 1 not in machine.smem


def test_a_division_gives_what_an_earlier_stage_of_libtpu_asked_for(tmp_path):
    (tmp_path / "1-kernel-01-before.txt").write_text("%s1 = sdiv.u32.pop %s5, %s6\n%s2 = srem.u32.pop %s7, %s6\n")
    (tmp_path / "1-kernel-02-after.txt").write_text("%8 = sdivrem.u32 %s5, %s6\n%9 = sdivrem.u32 %s7, %s6\n")
    divisions = listing.divisions(tmp_path / "1-kernel-01-before.txt", tmp_path / "1-kernel-02-after.txt")
    assert divisions == {"%8": "div", "%9": "rem"}
    divide = ["%8 = sdivrem.u32 %s1_s1, 3"], ["%9 = sdivrem.u32 %s1_s1, 3"]
    take = ["%s2_s2 = spop.drf %8"], ["%s3_s3 = spop.drf %9"], [store("%s2_s2"), store("%s3_s3", 1)]
    machine = run(tmp_path, ["%s1_s1 = smov 20"], *divide, *take, divisions=divisions)
    assert (smem(machine), smem(machine, 1)) == (6, 2)
    with pytest.raises(NotImplementedError, match="sdivrem"):
        run(tmp_path, *divide, *take)


def test_arithmetic_of_floats_is_passed_over_and_a_comparison_of_them_is_refused(tmp_path):
    machine = run(tmp_path, ["%s1_s1 = smul.f32 1.442695, %s1_s1"], ["%s2_s2 = smov 7"], [store("%s2_s2")])
    assert smem(machine) == 7
    with pytest.raises(NotImplementedError, match=r"scmp\.lt\.f32"):
        run(tmp_path, ["%p1_p1 = scmp.lt.f32.partialorder %s1_s1, %s2_s2"])


def test_a_division_of_which_both_results_are_taken_gives_the_quotient_first(tmp_path):
    divide = ["%s1_s1 = smov 20"], ["%8 = sdivrem.u32 %s1_s1, 3"]
    take = ["%s2_s2 = spop.drf %8"], ["%s3_s3 = spop.drf %8"], [store("%s2_s2"), store("%s3_s3", 1)]
    machine = run(tmp_path, *divide, *take)
    assert (smem(machine), smem(machine, 1)) == (6, 2)


def test_a_loop_takes_a_cycle_for_each_bundle_and_branches_after_the_delay(tmp_path):
    loop = [
        ["%s2_s1 = sadd.s32 1, %s1_s1"],
        ["%p1_p1 = scmp.lt.s32.totalorder %s2_s1, 10"],
        ["%3 = sbr.rel (%p1_p1) target bundleno = 1 (0x1), region = 4"],
        [], [], [], [store("%s2_s1")],
    ]  # fmt: skip
    machine = run(tmp_path, ["%s1_s1 = smov 0"], *loop)
    assert smem(machine) == 10, "the delay slots of the last iteration still count"
    assert machine.now == 1 + 10 * len(loop)


def copy_in(granules, flag=0):
    return (
        f"%4 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s1_s1, /*size_in_granules=*/{granules}, /*vmem=*/%s2_s2, "
        f"/*dst_syncflagno=*/[#allocation2 + ${flag:#x}]"
    )


def wait(granules, flag=0):
    address = f"[#allocation2 + ${flag:#x}]"
    return [[f"%5 = dma.done.wait {address}, {granules}"], [f"%6 = vsyncadd {address}, {2**32 - granules}"]]


def test_a_dma_takes_its_latency_and_its_bytes(tmp_path):
    machine = run(tmp_path, [copy_in(1000)], *wait(1000))
    assert machine.now == 100 + 8 + 4000 + 2, "the wait's own bundle, and the one after it"
    assert machine.hbm_bytes == 32_000


def test_dmas_share_the_bandwidth_but_hide_each_others_latency(tmp_path):
    machine = run(tmp_path, [copy_in(1000)], [copy_in(1000, flag=1)], *wait(1000), *wait(1000, flag=1))
    assert machine.now == 100 + 2 * (8 + 4000) + 2


def test_work_beside_a_dma_is_not_waited_for_twice(tmp_path):
    machine = run(tmp_path, [copy_in(10)], *[["%s3_s3 = smov 1"]] * 1000, *wait(10))
    assert machine.waited == 0
    assert machine.now == 1 + 1000 + 2


def test_a_general_dma_is_between_the_memories_that_a_comment_names(tmp_path):
    operands = "/*src=*/%s1_s1, /*size_in_granules=*/1000, /*dst=*/%s1_s1, /*dst_syncflagno=*/[#allocation2], "
    operands += "/*src_syncflagno=*/%s1_s1, /*stridedescaddr=*/[#allocation1], /*dst_syncflagno_1=*/0 /* hbm-to-vmem */"
    machine = run(tmp_path, [f"%4 = dma.general (!%p1_p1), {operands}"], *wait(1000))
    assert machine.now == 100 + 8 + 4000 + 2
    assert machine.hbm_bytes == 32_000


def test_a_number_may_come_with_a_note_of_where_its_address_belongs(tmp_path):
    machine = run(
        tmp_path,
        ["%s1_s1 = smov [#allocation1]"],
        ["%s2_s2 = scalar_lea.smem %s1_s1, 1 [#allocation1]"],
        ["%9 = sst [smem:[%s2_s2]] 7"],
    )
    assert smem(machine, 1) == 7


def test_scalars_come_in_by_dma(tmp_path):
    machine = run(
        tmp_path,
        ["%s1_s1 = inlined_call_operand.vmem [shape: s32[16], index: 1, kind: input, shape index: {}]"],
        ["%s3_s2 = sshll.u32 %s1_s1, 4", "%s4_s2 = int_to_ptr.vmem [resolvable:$true] %s3_s2"],
        [
            "%4 = dma.vmem_to_smem /*vmem=*/%s4_s2, /*size_in_granules=*/2, /*smem=*/[#allocation1], "
            "/*dst_syncflagno=*/[#allocation2]"
        ],
        *wait(2),
        scalars=[[7], range(100, 116)],
    )
    assert [smem(machine, i) for i in range(16)] == list(range(100, 116))


def test_vector_operations_only_take_their_bundle(tmp_path):
    machine = run(tmp_path, ["%v1_v0 = vmov 0.0 /* constant */", "%7 = vmatmul.mubr.bf16.gmra.mxu0 %v1_v0"], [])
    assert machine.now == 2


@pytest.mark.parametrize("operation", ["%s1_s1 = sfoo %s2_s2", "%1 = vwait 3", "%s1_s1 = vsum.xyz %v1_v1"])
def test_an_operation_that_may_decide_and_is_not_known_is_refused(tmp_path, operation):
    with pytest.raises(NotImplementedError, match="is not known"):
        run(tmp_path, [operation])


def test_what_cannot_be_right_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="nothing is under way"):
        run(tmp_path, *wait(1))
    with pytest.raises(RuntimeError, match="nobody waited"):
        run(tmp_path, [copy_in(1)])
    with pytest.raises(RuntimeError, match="nothing has written"):
        run(tmp_path, ["%s1_s1 = sld [smem:[#allocation1]]"])
    with pytest.raises(RuntimeError, match="more than 10000 cycles"):
        run(tmp_path, ["%1 = sbr.rel target bundleno = 0 (0x0), region = 4"], [], [], [], [])
    with pytest.raises(RuntimeError, match="an error of its own"):
        run(tmp_path, ["%1 = shalt.err"])


def test_a_folder_without_a_kernel_and_a_chip_without_facts_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="packed-bundles"):
        tpu_time.Kernel(tmp_path, "v6e")
    with pytest.raises(NotImplementedError, match="nothing says how v4 is timed"):
        tpu_time.Kernel(tmp_path, "v4")


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_attention_kernel_takes_as_many_cycles_as_tpusim_says(tmp_path, chip):
    """Of a kernel of this project, compiled once: decode, prefill and both, 38,382 to 3,972,498 cycles."""
    saved = json.loads(gzip.decompress((DUMPS / f"{chip}.json.gz").read_bytes()))
    for name, text in saved["files"].items():
        (tmp_path / name).write_text(text)
    kernel = tpu_time.Kernel(tmp_path, chip)
    for name, batch in workloads.batches().items():
        scalars = workloads.metadata(batch, page_size=128, max_num_seqs=64, context=8192)
        assert kernel.run(scalars).cycles == saved["cycles"][name], name


def test_bytes_are_those_that_decode_cannot_avoid(tmp_path):
    saved = json.loads(gzip.decompress((DUMPS / "v6e.json.gz").read_bytes()))
    for name, text in saved["files"].items():
        (tmp_path / name).write_text(text)
    batch = [(1, 1024)] * 64
    time = tpu_time.Kernel(tmp_path, "v6e").run(workloads.metadata(batch, 128, 64, 8192))
    assert time.hbm_bytes == 64 * 1024 * 2 * 8 * 128 * 2  # q and out stand in VMEM there
