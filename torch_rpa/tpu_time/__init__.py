"""Modelled time of a compiled Pallas TPU kernel, without a TPU: libtpu's own bundles, their scalar program executed.

libtpu dumps a kernel as a list of bundles, of which a TensorCore issues one in a cycle. Which ones it issues depends on
scalars alone (lengths, page tables), and those are known; what the vector and matrix units compute does not matter, for
libtpu's schedule leaves them the cycles they need. So

    cycles = bundles issued + cycles in which the program waits for a DMA

A DMA is done a latency after its start or, if later, when those before it have left the HBM channel; it takes its bytes
at the published bandwidth. The latency was fitted to matrix products that JAX's documentation times on a v5e, and is
assumed for the other chips; no attention kernel was compared with hardware. What makes a real TPU slower is left out:
HBM below its published bandwidth, the start of a kernel, XLA's operations around it.

    kernel = Kernel(folder, "v6e")            where libtpu dumped its stages: torch_rpa.aot.environment(folder)
    kernel.run([kv_lens, page_indices.reshape(-1), cu_q_lens, num_seqs]).microseconds

``listing`` reads the text, ``program`` makes steps of it, ``machine`` has the state they change.
"""

from torch_rpa.tpu_time.kernel import CHIPS, Kernel, ModelledTime

__all__ = ["CHIPS", "Kernel", "ModelledTime"]
