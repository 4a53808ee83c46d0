"""The host's cost of one repeated eager call on a "tpu" tensor of TorchTPU, side by side in one run.

    .venv-torchtpu/bin/python -m benchmarks.torchtpu_calls

Compares torch.ops.rpa with TorchTPU's own ``jax_op`` of the same JAX function, and with ``x + 1``. Without a TPU the
device is the tests' CPU (tests/torchtpu), and a call that computes next to nothing: a batch of no sequence.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "torchtpu"))
import testbed

CALLS = 500


def microseconds(call, finish) -> float:
    """Median of single calls, each made while the device has nothing to do: here it would take the host's cores."""
    times = []
    for _ in range(CALLS):
        finish()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def jax_op_of_the_same():
    """TorchTPU's op of our function; it needs every argument annotated."""
    import jax
    from torch_tpu._internal.pallas import jax_op

    from torch_rpa import kernels

    def attend(
        q: jax.Array,
        kv_pages: jax.Array,
        kv_lens: jax.Array,
        page_indices: jax.Array,
        cu_q_lens: jax.Array,
        num_seqs: jax.Array,
        sm_scale: float,
        causal: bool,
        sliding_window: int | None,
        soft_cap: float | None,
        k_scale: float | None,
        v_scale: float | None,
    ) -> jax.Array:
        options = {"causal": causal, "sliding_window": sliding_window, "soft_cap": soft_cap}
        scales = {"sm_scale": sm_scale, "k_scale": k_scale, "v_scale": v_scale}
        metadata = kv_lens, page_indices, cu_q_lens, num_seqs
        return kernels.ragged_paged_attention(q, kv_pages, *metadata, **options, **scales, backend="xla")

    return jax_op("torch_rpa_bench::attend", attend)


def main() -> None:
    if testbed.is_installed():
        testbed.prepare()
    import torch

    device = testbed.start()
    torch.set_grad_enabled(False)

    import torch_rpa  # noqa: F401  registers the ops

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=device)

    q, k, pages = zeros(1, 1, 8), zeros(1, 1, 8), zeros(1, 8, 2, 8)
    metadata = [zeros(*shape, dtype=torch.int32) for shape in ((1,), (1, 1), (2,), (1,))]
    ops, theirs = torch.ops.rpa, jax_op_of_the_same()
    calls = {
        "x + 1": lambda: q + 1,
        "torch.ops.rpa.ragged_paged_attention": lambda: ops.ragged_paged_attention(q, pages, *metadata),
        "torch.ops.rpa.ragged_paged_attention_update_": lambda: ops.ragged_paged_attention_update_(
            q, k, k, pages, *metadata
        ),
        "jax_op of the same function, 12 arguments": lambda: theirs(
            q, pages, *metadata, 1.0, True, None, None, None, None
        ),
    }
    print("| one repeated eager call | us |\n|---|---:|")
    for name, call in calls.items():
        print(f"| {name} | {microseconds(call, torch.accelerator.synchronize):.1f} |", flush=True)


if __name__ == "__main__":
    main()
