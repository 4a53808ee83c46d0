"""transformers' attention interface, answered by the ragged paged attention op."""

from dataclasses import dataclass

import torch
from transformers import AttentionInterface

from torch_rpa.hf.model.cache import PagedKVCache

NAME = "torch_rpa"

# Keywords that reach the attention and do not concern it: rotary positions are applied before, the rest is for others.
_FOR_OTHERS = frozenset({"position_ids", "use_cache", "output_hidden_states", "output_router_logits", "return_dict"})


@dataclass(frozen=True)
class RaggedBatch:
    """One step's metadata; `model(..., rpa_batch=RaggedBatch(...))` carries it to every attention layer.

    kv_lens [max_num_seqs], page_indices [max_num_seqs, pages_per_seq], cu_q_lens [max_num_seqs + 1] and
    num_seqs [1] are int32 on the model's device and mean what they mean in the op.
    """

    cache: PagedKVCache
    kv_lens: torch.Tensor
    page_indices: torch.Tensor
    cu_q_lens: torch.Tensor
    num_seqs: torch.Tensor


def require_batch(batch: RaggedBatch | None) -> None:
    """RuntimeError if the model was called as if it were not patched."""
    if batch is None:
        raise RuntimeError(
            "this model is patched by torch_rpa.hf and needs batch metadata (rpa_batch=) in each call: use "
            "model.generate_batch(...), or torch_rpa.hf.unpatch(model) to have the plain model back"
        )


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, num_q_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,  # as key
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    rpa_batch: RaggedBatch | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Write this step's keys and values into the layer's pages, then attend. Gives [1, num_tokens, heads,
    dim], None.

    A layer that shares another one's keys and values only reads: the other layer has written them in this very step.
    Raises RuntimeError without rpa_batch, and NotImplementedError for what the op cannot honour.
    """
    require_batch(rpa_batch)
    reasons = _not_supported_reasons(query, key, attention_mask, dropout, kwargs)
    if reasons:
        raise NotImplementedError("torch_rpa attention: " + "; ".join(reasons))
    cache, layer = rpa_batch.cache, module.layer_idx
    metadata = (rpa_batch.kv_lens, rpa_batch.page_indices, rpa_batch.cu_q_lens, rpa_batch.num_seqs)
    options = {"sm_scale": scaling, "sliding_window": sliding_window, "soft_cap": softcap, "sinks": s_aux}
    # [1, heads, tokens, dim] -> [tokens, heads, dim]: views of the projections, so that no copy is made. The transpose
    # comes first, as the very one that XLA can cancel against the model's own.
    q, k, v = (x.transpose(1, 2)[0] for x in (query, key, value))
    if cache.writes(layer):
        op = torch.ops.rpa.ragged_paged_attention_update_
        out = op(q, k, v, cache.layer_pages(layer), *metadata, **options)
    else:
        out = torch.ops.rpa.ragged_paged_attention(q, cache.layer_pages(layer), *metadata, **options)
    return out.unsqueeze(0), None


def _not_supported_reasons(query, key, attention_mask, dropout: float, kwargs: dict) -> list[str]:
    reasons = []
    if query.shape[0] != 1:
        reasons.append(f"the batch is one flattened row of tokens, not {query.shape[0]} rows")
    if key.shape[2] != query.shape[2]:
        reasons.append(f"{key.shape[2]} keys for {query.shape[2]} queries: past_key_values must be None")
    if attention_mask is not None:
        reasons.append("attention_mask must be None: rpa_batch says who sees whom")
    if dropout:
        reasons.append(f"{dropout=} is for training; call model.eval()")
    if kwargs.get("output_attentions"):
        reasons.append("output_attentions=True: the probabilities are never materialised")
    if kwargs.get("is_causal") is False:
        reasons.append("is_causal=False: only causal attention is supported")
    known = _FOR_OTHERS | {"output_attentions", "is_causal"}
    unknown = [name for name, value in kwargs.items() if value is not None and name not in known]
    if unknown:
        reasons.append(f"it does not know the keywords {', '.join(unknown)}, and ignores none")
    return reasons


# At import, so that a patched model finds it that was pickled in another process.
AttentionInterface.register(NAME, paged_attention)
