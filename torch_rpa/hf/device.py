"""What depends on the kind of device; torch_xla is imported only for a model that is on an XLA device."""

import torch


def run_pending(tensors: list[torch.Tensor]) -> None:
    """Run the program traced so far on an XLA device, with exactly `tensors` as its results; elsewhere
    nothing.

    Naming the tensors keeps other lazy tensors of the process out of the program: they would change its hash,
    and so recompile it.
    """
    if tensors[0].device.type == "xla":
        import torch_xla

        torch_xla._XLAC._xla_sync_multi(tensors, devices=[], wait=False, sync_xla_data=True)


def compile_count() -> int:
    """Programs that XLA has compiled in this process so far."""
    from torch_xla.debug import metrics

    return metrics.counter_value("UncachedCompile") or 0
