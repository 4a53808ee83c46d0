"""Put the engine into an existing transformers model, and take it out again."""

import copy
import inspect
from functools import cache, partial

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from torch_rpa.hf._transformers import can_set_experts, experts_of
from torch_rpa.hf.api.gate import gate_of
from torch_rpa.hf.api.generate import generate_batch
from torch_rpa.hf.api.manager import continuous_batching_context_manager, init_continuous_batching, warmup
from torch_rpa.hf.api.padded_generate import generate
from torch_rpa.hf.engine.config import EngineConfig
from torch_rpa.hf.model import attention, experts, tensor_parallel
from torch_rpa.hf.patching import class_patch, keywords
from torch_rpa.hf.patching.state import PatchState, attach, detach, is_patched
from torch_rpa.hf.patching.support import require_supported_model

# What a patched model has instead of transformers' methods of these names; each takes the model first.
METHODS = {
    method.__name__: method
    for method in (generate, generate_batch, init_continuous_batching, continuous_batching_context_manager, warmup)
}


def patch(model: PreTrainedModel | type[PreTrainedModel], **settings) -> PreTrainedModel | type[PreTrainedModel]:
    """Give this model, or each model of this class, paged attention and `generate_batch`; returns what it was given.

    settings: the fields of `EngineConfig`, such as page_size=16, num_pages=None, max_num_seqs=8,
    token_buckets=None, kv_dtype=None. With mesh=, axis="model" the weights are sharded over the chips, see
    `tensor_parallel`; the cache and the steps are too.

    Only this model changes (its config becomes a copy of its own, for models may share one), until `unpatch`.
    The cache is allocated at the first use, on the device the model is on then. Patching again replaces the
    settings. Each model of a patched class is patched when one of the new methods is first called on it.

    Raises NotImplementedError, with every reason, for a model that cannot be served; ValueError for a bad
    setting, or heads that the chips of a mesh cannot share; RuntimeError for a mesh without SPMD, or while a manager
    runs on the model; TypeError for a setting that does not exist or something that is no model. Nothing has been
    changed then.
    """
    config = EngineConfig(**settings)
    if isinstance(model, type) and issubclass(model, PreTrainedModel):
        unpatch(model)
        class_patch.patch_class(model, METHODS, partial(patch, **settings))
        return model
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"torch_rpa.hf.patch: model must be a transformers model or a class of them, got {model!r}")
    require_supported_model(model, config)
    if config.heads is not None:
        is_ours = is_patched(model) and gate_of(model).config.heads is not None
        tensor_parallel.require_shardable(model, config.heads, is_ours=is_ours)
    unpatch(model)
    former_configs = _give_own_config(model)
    try:
        _set_implementations(model)
    except BaseException:
        _restore_configs(former_configs)
        raise
    former_methods = {name: model.__dict__[name] for name in METHODS if name in model.__dict__}
    attach(model, PatchState(former_configs, former_methods, _add_hooks(model)), config)
    for name, method in METHODS.items():
        model.__dict__[name] = _bound(method, model)
    if config.heads is not None:
        tensor_parallel.shard(model, config.heads)
    return model


def unpatch(model: PreTrainedModel | type[PreTrainedModel]) -> PreTrainedModel | type[PreTrainedModel]:
    """Undo `patch`: the former configs, attention, methods and weights in one piece, no cache. A model not patched
    stays as it is.

    Waits for a generate_batch of another thread to end. A class takes the models with it that were patched for it.
    RuntimeError while a manager runs on the model, or inside its `pause`; nothing has been changed then.
    """
    if isinstance(model, type):
        class_patch.unpatch_class(model, METHODS, unpatch)
        return model
    if not is_patched(model):
        return model
    with gate_of(model).hold("unpatch"):
        is_sharded = gate_of(model).config.heads is not None
        state = detach(model)
        _restore_configs(state.former_configs)
        for hook in state.hooks:
            hook.remove()
        for name in METHODS:
            del model.__dict__[name]
        model.__dict__.update(state.former_methods)
        if is_sharded:
            tensor_parallel.unshard(model)
    return model


def _bound(method, model: PreTrainedModel) -> partial:
    bound = partial(method, model)  # unlike a bound method, it can be pickled
    bound.__doc__ = method.__doc__
    return bound


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


def _set_implementations(model: PreTrainedModel) -> None:
    """Paged attention everywhere and, in a mixture of experts, experts with static shapes where it runs on XLA."""
    model.set_attn_implementation(attention.NAME)
    if can_set_experts(model):
        model.set_experts_implementation(experts.register(experts_of(model.config)))


def _add_hooks(model: PreTrainedModel) -> list[RemovableHandle]:
    """Checks before the model and the models in it (`model.model`), and what keeps the batch on its way."""
    inner_models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    checks = [inner.register_forward_pre_hook(_check_call, with_kwargs=True) for inner in inner_models]
    return [*checks, *keywords.add_hooks(model)]


def _check_call(model: PreTrainedModel, args: tuple, kwargs: dict) -> None:
    """Before each forward: refuse what would be ignored further down, where transformers drops 2-D masks silently."""
    attention.require_batch(kwargs.get("rpa_batch"))
    given = _forward_signature(type(model)).bind_partial(model, *args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    refused = [
        name
        for name in ("attention_mask", "past_key_values", "labels", "output_attentions", "encoder_hidden_states")
        if given.get(name) is not None and given[name] is not False
    ]
    if refused:
        raise NotImplementedError(
            f"a model patched by torch_rpa.hf cannot take {', '.join(refused)}: rpa_batch and its pages replace "
            "them; torch_rpa.hf.unpatch(model) gives the plain model back"
        )


@cache
def _forward_signature(model_class: type[PreTrainedModel]) -> inspect.Signature:
    return inspect.signature(model_class.forward)
