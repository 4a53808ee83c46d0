"""Time the op on the XLA device, beside what the model of its compiled kernel says.

    PJRT_DEVICE=TPU python -m torch_rpa.bench

On a TPU: the workloads of ``workloads.py`` with Llama-3-8B's heads, bfloat16, pages of 128 tokens. The modelled figures
are those of ``modelled.json``, written by ``benchmarks/bench_tpu_model.py``. On PJRT CPU: tiny sizes, to see that it
runs.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

from torch_rpa import workloads
from torch_rpa.chips import CHIPS

_MODELLED = Path(__file__).with_name("modelled.json")
_TINY_BATCHES = {
    "decode 4 x 40": [(1, 40)] * 4,
    "prefill 16 at 40": [(16, 40)],
    "2 x 40 + 8 at 16": [(1, 40)] * 2 + [(8, 16)],
}


@dataclass(frozen=True)
class Setup:
    """Sizes of one run: those of the kernel, of the cache, and how often it is repeated.

    Attributes:
        batches: name -> (q_len, kv_len) of each sequence.
        calls: of the op in one program; their time is that of the program less that of a program with one call.
        repeats: programs timed; the fastest counts.
    """

    heads: tuple[int, int, int]
    dtype: str
    num_tokens: int
    max_num_seqs: int
    context: int
    page_size: int
    batches: dict
    calls: int
    repeats: int

    @property
    def num_pages(self) -> int:
        return self.max_num_seqs * self.context // self.page_size


def setup_of(device_kind: str) -> Setup:
    """Real sizes for "tpu", tiny ones for "cpu"."""
    if device_kind == "tpu":
        heads = workloads.MODELS["llama-3-8b"].heads
        return Setup(heads, "bfloat16", 512, 64, 8192, 128, workloads.batches(), calls=21, repeats=5)
    return Setup((4, 2, 64), "float32", 16, 4, 64, 16, _TINY_BATCHES, calls=3, repeats=2)


def measure(setup: Setup) -> dict[str, float]:
    """Name -> microseconds of one call of the read-only op."""
    import torch
    import torch_xla  # noqa: F401  registers the device

    import torch_rpa

    device, dtype = torch.device("xla"), getattr(torch, setup.dtype)
    num_q_heads, num_kv_heads, head_dim = setup.heads
    sizes = setup.num_pages, setup.page_size, num_kv_heads, head_dim
    pages = torch_rpa.empty_kv_pages(*sizes, dtype=dtype, device=device)
    q = torch.randn(setup.num_tokens, num_q_heads, head_dim).to(dtype).to(device)
    times = {}
    for name, batch in setup.batches.items():
        metadata = workloads.metadata(batch, setup.page_size, setup.max_num_seqs, setup.context)
        metadata = [torch.from_numpy(x).to(device) for x in metadata]

        def attend(q, metadata=metadata):
            return torch.ops.rpa.ragged_paged_attention(q, pages, *metadata, sm_scale=head_dim**-0.5)

        one, many = (_fastest(attend, q, calls, setup.repeats) for calls in (1, setup.calls))
        times[name] = (many - one) / (setup.calls - 1) * 1e6
    return times


def _fastest(attend, q, calls: int, repeats: int) -> float:
    """Seconds of the fastest program of so many calls, each of which takes the result of the one before."""
    import torch_xla

    seconds = []
    for _ in range(repeats + 1):  # the first one compiles
        torch_xla.sync(wait=True)
        start, out = time.perf_counter(), q
        for _ in range(calls):
            out = attend(out)
        torch_xla.sync(wait=True)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def table(setup: Setup, times: dict[str, float], chip: str | None) -> str:
    """Markdown: measured time and share of HBM bandwidth (decode) or of peak FLOP/s (/), modelled time, their ratio."""
    modelled = json.loads(_MODELLED.read_text()).get(chip, {})
    lines = ["| | measured, us | share | modelled, us | measured / modelled |", "|---|---:|---:|---:|---:|"]
    for name, microseconds in times.items():
        share = _share(setup, setup.batches[name], microseconds, chip) if chip else "-"
        expected = modelled.get(name)
        ratio = f"{microseconds / expected:.2f}" if expected else "-"
        lines.append(f"| {name} | {microseconds:.1f} | {share} | {expected or '-'} | {ratio} |")
    return "\n".join(lines)


def _share(setup: Setup, batch, microseconds: float, chip: str) -> str:
    share = workloads.share_of_peak(batch, setup.heads, microseconds * 1e-6, CHIPS[chip])
    return f"{share:.2f}" if workloads.decodes_only(batch) else f"/{share:.2f}"


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    from torch_rpa import bridges

    bridge = bridges.of("xla")
    device_kind, chip = bridge.device_kind(), bridge.chip_name()
    if device_kind == "cpu":
        print("PJRT CPU: tiny sizes and plain XLA ops, to see that it runs; these times say nothing about a TPU")
    else:
        print(f"TPU {chip or '(not known here)'}, Llama-3-8B heads, bfloat16, pages of 128 tokens, one launch")
    setup = setup_of(device_kind)
    print(table(setup, measure(setup), chip))


if __name__ == "__main__":
    main()
