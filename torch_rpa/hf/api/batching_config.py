"""A transformers ContinuousBatchingConfig: what of it the engine takes; the rest is `patch`'s, or has no meaning."""

from dataclasses import dataclass, fields

from torch_rpa.hf._transformers import ContinuousBatchingConfig
from torch_rpa.hf.api import settings
from torch_rpa.hf.engine.config import EngineConfig


@dataclass(frozen=True)
class BatchingOptions:
    """return_logprobs: fill each output's `logprobs`; seed: of everything sampled; max_queue_size: 0 for no limit."""

    return_logprobs: bool = False
    seed: int | None = None
    max_queue_size: int = 0


def batching_options(config: ContinuousBatchingConfig | None, patched: EngineConfig) -> BatchingOptions:
    """NotImplementedError that lists every field with another value than its default that cannot be honoured, such as a
    size that is not the one that `patch` set."""
    if config is None:
        return BatchingOptions()
    if not isinstance(config, ContinuousBatchingConfig):
        raise TypeError(
            f"continuous_batching_config must be a transformers.ContinuousBatchingConfig, got {type(config).__name__}"
        )
    refused = settings.refused(_said(config, patched), settings.BATCHING)
    if refused:
        raise NotImplementedError("continuous_batching_config: " + "; ".join(refused))
    return BatchingOptions(config.return_logprobs, config.seed, config.max_queue_size)


def _said(config: ContinuousBatchingConfig, patched: EngineConfig) -> dict:
    """What differs from its default, and from what `patch` set; also attributes that the class does not define."""
    defaults = {field.name: field.default for field in fields(ContinuousBatchingConfig)}
    of_patch = {"token_buckets": patched.max_step_tokens}
    said = {n: v for n, v in vars(config).items() if n not in defaults or not settings.is_same(v, defaults[n])}
    for name in list(said):
        setting = settings.BATCHING[name].patch if name in settings.BATCHING else None
        if setting and settings.is_same(said[name], of_patch.get(setting, getattr(patched, setting))):
            del said[name]
    return said
