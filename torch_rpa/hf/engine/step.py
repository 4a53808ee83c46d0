"""One step as a function of the uploaded arrays."""

import torch

from torch_rpa import sharding
from torch_rpa.hf.engine.batch import BatchLayout
from torch_rpa.hf.engine.sampling import sample, sample_greedy, unpack_sampling
from torch_rpa.hf.model.cache import PagedKVCache


def run_step(
    model,
    layout: BatchLayout,
    cache: PagedKVCache,
    packed: torch.Tensor,
    numbers: torch.Tensor | None = None,
    bitmaps: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """`BatchLayout.pack`'s array, and `pack_sampling`'s two if not all rows are greedy, on the model's device.

    Gives [what `sample_greedy` gives], or [what `sample` gives, the logits of each sequence's last row]; the cache is
    updated in place.
    """
    inputs = layout.unpack(packed, cache)
    logits = model(
        input_ids=inputs.input_ids,
        position_ids=inputs.position_ids,
        use_cache=False,
        logits_to_keep=inputs.last_rows,
        rpa_batch=inputs.rpa_batch,
    ).logits[0]  # [max_num_seqs, vocab]
    if packed.device.type == "xla" and sharding.current() is not None:
        logits = sharding.current().gathered(logits)  # each chip has its part of the vocabulary
    if numbers is None:
        return [sample_greedy(logits)]
    return [sample(logits, unpack_sampling(numbers, bitmaps, logits.shape[-1])), logits]
