"""A transformers ContinuousBatchingConfig: what of it the engine takes; the rest is `patch`'s, or has no meaning."""

from dataclasses import dataclass, fields

from torch_rpa.hf._transformers import ContinuousBatchingConfig

# What sets the same here.
_SETTINGS_OF_PATCH = {
    "page_size": "page_size", "block_size": "page_size", "num_blocks": "num_pages",
    "max_requests_per_batch": "max_num_seqs", "max_batch_tokens": "token_buckets",
    "allow_block_sharing": "prefix_caching",
}  # fmt: skip
_HONOURED = {"return_logprobs", "seed", "max_queue_size"}
# About CUDA and flash attention, or on anyway: parameters are always each request's own.
_WITHOUT_EFFECT = {
    "use_cuda_graph", "q_padding_interval_size", "kv_padding_interval_size", "use_async_batching", "max_cached_graphs",
    "auto_switch_to_flash", "disable_nccl_graph_mixing", "cpu_group_timeout", "per_request_processors",
    "drop_unsupported_processors", "max_blocks_per_request", "cpu_offload_space_safety_threshold",
}  # fmt: skip


@dataclass(frozen=True)
class BatchingOptions:
    """return_logprobs: fill each output's `logprobs`; seed: of everything sampled; max_queue_size: 0 for no limit."""

    return_logprobs: bool = False
    seed: int | None = None
    max_queue_size: int = 0


def batching_options(config: ContinuousBatchingConfig | None) -> BatchingOptions:
    """NotImplementedError that lists every field with another value than its default that cannot be honoured."""
    if config is None:
        return BatchingOptions()
    if not isinstance(config, ContinuousBatchingConfig):
        raise TypeError(
            f"continuous_batching_config must be a transformers.ContinuousBatchingConfig, got {type(config).__name__}"
        )
    refused = []
    for name, default in ((field.name, field.default) for field in fields(ContinuousBatchingConfig)):
        value = getattr(config, name)
        if value != default and name not in _HONOURED | _WITHOUT_EFFECT:
            where = _SETTINGS_OF_PATCH.get(name)
            hint = f"torch_rpa.hf.patch has {where}=" if where else "not supported"
            refused.append(f"{name}={value!r} ({hint})")
    if refused:
        raise NotImplementedError("continuous_batching_config: " + "; ".join(refused))
    return BatchingOptions(config.return_logprobs, config.seed, config.max_queue_size)
