"""How long the compiled ops of a plan take, modelled from what libtpu dumps of them."""

from typing import NamedTuple

import numpy as np

from torch_rpa import tpu_time, workloads
from torch_rpa.aot.op import OpCase
from torch_rpa.chips import CHIPS


class OpTime(NamedTuple):
    """Modelled time of one call, and the share of HBM bandwidth (decode) or of peak FLOP/s (prefill) that is useful."""

    microseconds: float
    share: float


class StepTime(NamedTuple):
    """Seconds of a step of the whole model: what its weights take at least, and the modelled attention of all layers.

    The other operations, and what crosses chips, come on top.
    """

    weights: float
    attention: float


def batches(case: OpCase) -> dict[str, list[tuple[int, int]]]:
    """The fullest steps that a case has rows and pages for, by name: (q_len, kv_len) of each sequence."""
    kv_len, new_tokens = case.context, min(case.num_tokens, case.context)
    num_seqs = min(case.max_num_seqs, case.num_tokens, case.num_pages * case.page_size // kv_len)
    return {
        f"decode {num_seqs} x {kv_len}": [(1, kv_len)] * num_seqs,
        f"prefill {new_tokens} at {kv_len}": [(new_tokens, kv_len)],
    }


def modelled_times(case: OpCase, dump: str) -> dict[str, OpTime]:
    """The times of ``batches``.

    Args:
        dump: the folder that libtpu dumped the compile of this case to.

    Raises:
        NotImplementedError: what is needed to model this chip, or this kernel, is not known.
    """
    kernel = tpu_time.Kernel(dump, case.chip)
    return {name: _time(kernel, case, batch) for name, batch in batches(case).items()}


def least_seconds_of_weights(chip: str, weight_bytes: int, batch) -> float:
    """Of reading bfloat16 weights once, or of multiplying every new token by them if that is longer, at the peaks."""
    facts, new_tokens = CHIPS[chip], sum(q_len for q_len, _ in batch)
    return max(weight_bytes / facts.hbm_bytes_per_s, new_tokens * weight_bytes / facts.flops_per_s)


def scalars(case: OpCase, batch) -> list[np.ndarray]:
    """The kernel's scalar operands for a batch, (q_len, kv_len) of each sequence, in one dimension each."""
    metadata = workloads.metadata(batch, case.page_size, case.max_num_seqs, case.context, case.num_pages)
    sinks = [np.zeros(case.heads[0], np.int32)] * case.sinks  # their values change nothing
    return [x.reshape(-1) for x in (*metadata, *sinks)]


def _time(kernel: tpu_time.Kernel, case: OpCase, batch) -> OpTime:
    microseconds = kernel.run(scalars(case, batch)).microseconds
    kv_itemsize, window = workloads.itemsize(case.kv_dtype or case.dtype), case.options.get("sliding_window")
    share = workloads.share_of_peak(batch, case.heads, microseconds * 1e-6, CHIPS[case.chip], kv_itemsize, window)
    return OpTime(microseconds, share)
