"""Put the engine into an existing transformers model, and take it out again."""

import copy
import inspect
from functools import partial

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from torch_rpa.hf import attention
from torch_rpa.hf.config import DEFAULT_TOKEN_BUCKETS, EngineConfig
from torch_rpa.hf.generate import generate_batch
from torch_rpa.hf.state import PatchState, attach, detach, is_patched, state_of
from torch_rpa.hf.support import not_supported_reasons


def patch(
    model: PreTrainedModel,
    *,
    page_size: int = 16,
    num_pages: int | None = None,
    max_num_seqs: int = 8,
    token_buckets: tuple[int, ...] = DEFAULT_TOKEN_BUCKETS,
    kv_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Give this model paged attention and `generate_batch`; returns the same model.

    page_size      tokens in a page of the cache
    num_pages      pages in the cache; None: enough for max_num_seqs sequences of
                   min(max_position_embeddings, 1024) tokens (logged at INFO)
    max_num_seqs   sequences in one step
    token_buckets  row counts a step may have, rising; each is compiled once on an XLA device
    kv_dtype       dtype of the cache: None (the model's), torch.float8_e4m3fn or torch.float8_e5m2

    Only this model changes (its config becomes a copy of its own, for models may share one), until `unpatch`.
    The cache is allocated at the first use, on the device the model is on then. Patching again replaces the
    settings.

    Raises NotImplementedError, with every reason, for a model that cannot be served; ValueError for a bad
    setting.
    """
    config = EngineConfig(page_size, num_pages, max_num_seqs, token_buckets, kv_dtype)
    reasons = not_supported_reasons(model, config)
    if reasons:
        raise NotImplementedError(f"torch_rpa.hf.patch: {type(model).__name__}: " + "; ".join(reasons))
    unpatch(model)
    attention.register()
    former_configs = _give_own_config(model)
    try:
        model.set_attn_implementation(attention.NAME)
    except BaseException:
        _restore_configs(former_configs)
        raise
    hook = model.register_forward_pre_hook(_check_call, with_kwargs=True)
    attach(model, PatchState(config, former_configs, model.__dict__.get("generate_batch"), hook))
    method = partial(generate_batch, model)  # unlike a bound method, it can be pickled
    method.__doc__ = generate_batch.__doc__
    model.__dict__["generate_batch"] = method
    return model


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `patch`: the former configs, attention and generate_batch, no cache. A model not patched stays as it is.

    Waits for a generate_batch of another thread to end.
    """
    if not is_patched(model):
        return model
    with state_of(model).lock:
        state = detach(model)
        _restore_configs(state.former_configs)
        state.hook.remove()
        del model.__dict__["generate_batch"]
        if state.former_generate_batch is not None:
            model.__dict__["generate_batch"] = state.former_generate_batch
    return model


def _give_own_config(model: PreTrainedModel) -> list[tuple[torch.nn.Module, PreTrainedConfig]]:
    """Replace every module's config by a copy, the same copy for the same config; list who had which."""
    memo: dict = {}
    former = []
    for module in model.modules():
        if isinstance(config := module.__dict__.get("config"), PreTrainedConfig):
            former.append((module, config))
            module.config = copy.deepcopy(config, memo)
    return former


def _restore_configs(former_configs: list[tuple[torch.nn.Module, PreTrainedConfig]]) -> None:
    for module, config in former_configs:
        module.config = config


def _check_call(model: PreTrainedModel, args: tuple, kwargs: dict) -> None:
    """Before each forward: refuse what would be ignored further down, where transformers drops 2-D masks silently."""
    attention.require_batch(kwargs.get("rpa_batch"))
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    refused = [
        name
        for name in ("attention_mask", "past_key_values", "labels", "output_attentions")
        if given.get(name) is not None and given[name] is not False
    ]
    if refused:
        raise NotImplementedError(
            f"a model patched by torch_rpa.hf cannot take {', '.join(refused)}: rpa_batch and its pages replace "
            "them; torch_rpa.hf.unpatch(model) gives the plain model back"
        )
