"""The ops of the ``rpa`` namespace: schemas, and what runs for CPU, XLA, fake and meta tensors.

    ragged_paged_attention            attention over pages that are only read
    ragged_paged_attention_with_lse   the same, and the log of each row's softmax denominator
    ragged_paged_attention_update     writes this step's k and v to new pages, then attends
    ragged_paged_attention_update_    the same in place

PyTorch/XLA takes no mutable op with an XLA kernel of its own. There the in-place form is the functional op followed by
``kv_pages.copy_(new_kv_pages)``, which ends as one aliased buffer; on the CPU it writes straight to the pages.

The ops are for inference: they have no derivative, and say so at the call.
"""

import os
from functools import lru_cache

import torch

from torch_rpa import bridges, cpu, guards, native
from torch_rpa.metadata import check_metadata
from torch_rpa.options import AttentionOptions
from torch_rpa.validation import ArgSpec, check_static, dtype_name

_METADATA_SCHEMA = "Tensor kv_lens, Tensor page_indices, Tensor cu_q_lens, Tensor num_seqs"
_OPTIONS_SCHEMA = (
    "float sm_scale=1.0, bool causal=True, int? sliding_window=None, float? soft_cap=None, float? mask_value=None, "
    "float? k_scale=None, float? v_scale=None, Tensor? sinks=None, int? num_kv_pages_per_block=None, "
    "int? num_queries_per_block=None, int? vmem_limit_bytes=None"
)
_READ_SCHEMA = f"(Tensor q, Tensor kv_pages, {_METADATA_SCHEMA}, *, {_OPTIONS_SCHEMA}"
_UPDATE_SCHEMA = f"(Tensor q, Tensor k, Tensor v, Tensor kv_pages, {_METADATA_SCHEMA}, *, {_OPTIONS_SCHEMA}"

_LIBRARY = torch.library.Library("rpa", "DEF")
_LIBRARY.define(f"ragged_paged_attention{_READ_SCHEMA}) -> Tensor")
_LIBRARY.define(f"ragged_paged_attention.use_kernel{_READ_SCHEMA}, bool use_kernel) -> Tensor")
_LIBRARY.define(f"ragged_paged_attention_with_lse{_READ_SCHEMA}) -> (Tensor out, Tensor lse)")
_LIBRARY.define(f"ragged_paged_attention_update{_UPDATE_SCHEMA}) -> (Tensor out, Tensor new_kv_pages)")
# What the in-place form is made of on TorchTPU. Not for callers: it leaves kv_pages without a buffer.
_LIBRARY.define(f"_ragged_paged_attention_update_donating{_UPDATE_SCHEMA}) -> (Tensor out, Tensor new_kv_pages)")
_LIBRARY.define(
    f"ragged_paged_attention_update_{_UPDATE_SCHEMA.replace('Tensor kv_pages', 'Tensor(a!) kv_pages')}) -> Tensor"
)


def check_batch(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    kv_lens: torch.Tensor,
    page_indices: torch.Tensor,
    cu_q_lens: torch.Tensor,
    num_seqs: torch.Tensor,
    *,
    sliding_window: int | None = None,
) -> None:
    """Check the values of a batch's metadata, which the ops themselves trust.

    Args:
        q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs: as for ``torch.ops.rpa.ragged_paged_attention``, on any
            device; the metadata is copied to the host.
        sliding_window: the window the batch is for, in tokens. Pages wholly before it may have been freed.

    Raises:
        ValueError: num_seqs over max_num_seqs, cu_q_lens that fall or pass num_tokens, a kv_len below its q_len or over
            what pages_per_seq holds, a needed page index out of range.
        ValueError, TypeError, NotImplementedError: what a call refuses for its shapes, dtypes and devices.
    """
    args, _ = _read_args(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs)
    for name, tensor in args.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    check_static(_specs(args), AttentionOptions(sliding_window=sliding_window))
    _check_values(args, sliding_window)


def _read_args(
    q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, *, sinks=None, mask_value=None, **options
):  # mask_value changes no result
    """A call of a read-only op as (tensors by name, options by name)."""
    args = {
        "q": q,
        "kv_pages": kv_pages,
        "kv_lens": kv_lens,
        "page_indices": page_indices,
        "cu_q_lens": cu_q_lens,
        "num_seqs": num_seqs,
    }
    if sinks is not None:
        args["sinks"] = sinks
    return args, options


def _update_args(q, k, v, *pages_and_metadata, **kwargs):
    """A call of an update op as (tensors by name, options by name)."""
    args, options = _read_args(q, *pages_and_metadata, **kwargs)
    return {"q": args.pop("q"), "k": k, "v": v, **args}, options


def _specs(args) -> dict[str, ArgSpec]:
    return {name: ArgSpec(tuple(t.shape), dtype_name(t.dtype), str(t.device)) for name, t in args.items()}


def _check_values(args, sliding_window):
    check_metadata(
        _on_host(args["kv_lens"]).tolist(),
        _on_host(args["page_indices"]).tolist(),
        _on_host(args["cu_q_lens"]).tolist(),
        _on_host(args["num_seqs"]).item(),
        num_tokens=args["q"].shape[0],
        num_pages=args["kv_pages"].shape[0],
        page_size=args["kv_pages"].shape[1],
        sliding_window=sliding_window,
        writes="k" in args,
    )


def _on_host(metadata):
    """For its values. A copy on XLA: what is read of a lazy tensor becomes a constant of the program that is traced;
    and .cpu() before .tolist(), which torch.compile(backend="openxla") takes for an op to split the graph at."""
    return (metadata.clone() if metadata.device.type == "xla" else metadata).cpu()


def _value_checks_asked() -> bool:
    return os.environ.get("TORCH_RPA_CHECK", "0") not in ("", "0")


# CPU


def _cpu_path():
    """The module that runs a call: the native kernel, or Python where that is not built or turned off."""
    return native if native.is_available() else cpu


def _prepare_cpu(args, options) -> AttentionOptions:
    options = _checked_options(tuple(_specs(args).items()), tuple(options.items()))
    if _value_checks_asked():
        _check_values(args, options.sliding_window)
    return options


@lru_cache(maxsize=256)  # a served model has a handful of shapes
def _checked_options(specs, options) -> AttentionOptions:
    checked = AttentionOptions(**dict(options))
    check_static(dict(specs), checked)
    return checked


def _cpu_attention_with_lse(*tensors, **kwargs):
    args, options = _read_args(*tensors, **kwargs)
    return _cpu_path().attend(**args, options=_prepare_cpu(args, options))


def _cpu_attention(*tensors, **kwargs):
    return _cpu_attention_with_lse(*tensors, **kwargs)[0]


def _cpu_attention_update_(*tensors, **kwargs):
    args, options = _update_args(*tensors, **kwargs)
    options = _prepare_cpu(args, options)
    if not args["kv_pages"].is_contiguous():
        raise ValueError(
            f"kv_pages must be contiguous to be written in place, got strides {args['kv_pages'].stride()} "
            f"for shape {list(args['kv_pages'].shape)}"
        )
    return _cpu_path().attend_update_(**args, options=options)


def _cpu_attention_update(q, k, v, kv_pages, *metadata, **kwargs):
    new_kv_pages = kv_pages.clone(memory_format=torch.contiguous_format)
    return _cpu_attention_update_(q, k, v, new_kv_pages, *metadata, **kwargs), new_kv_pages


# XLA and TorchTPU's tpu: the bridge, and with it torch_xla or torch_tpu and JAX, is imported by the first call


def _bridge_of(args, options):
    """The bridge to the device of a call, whose values are checked first where that is asked for."""
    found = (bridge for t in args.values() if (bridge := bridges.of(t.device)) is not None)
    bridge = next(found, None)
    if bridge is None:
        raise NotImplementedError(
            f"torch_rpa runs on CPU, XLA and TorchTPU's tpu tensors, not on {args['q'].device}; move them to the CPU"
        )
    if _value_checks_asked():
        check_static(_specs(args), AttentionOptions(**options))
        _check_values(args, options.get("sliding_window"))
    return bridge


def _bridged_attention(*tensors, **kwargs):
    args, options = _read_args(*tensors, **kwargs)
    return _bridge_of(args, options).call("ragged_paged_attention", args, options)[0]


def _bridged_attention_with_lse(*tensors, **kwargs):
    args, options = _read_args(*tensors, **kwargs)
    return tuple(_bridge_of(args, options).call("ragged_paged_attention_with_lse", args, options))


def _bridged_attention_update(*tensors, **kwargs):
    args, options = _update_args(*tensors, **kwargs)
    return tuple(_bridge_of(args, options).call("ragged_paged_attention_update", args, options))


def _bridged_attention_update_donating(*tensors, **kwargs):
    args, options = _update_args(*tensors, **kwargs)
    return tuple(_bridge_of(args, options).call_donating_pages(args, options))


def _composite_attention_update_(q, k, v, kv_pages, *metadata, **kwargs):
    op, old_kv_pages = torch.ops.rpa.ragged_paged_attention_update.default, kv_pages
    bridge = bridges.of(kv_pages.device)
    if bridge is not None:
        op, old_kv_pages = bridge.prepare_update(kv_pages, is_traced=type(kv_pages) is not torch.Tensor)
    out, new_kv_pages = op(q, k, v, old_kv_pages, *metadata, **kwargs)
    kv_pages.copy_(new_kv_pages)
    return out


# Fake and meta tensors


def _check_fake(args, options):
    check_static(_specs(args), AttentionOptions(**options))
    return args["q"]


def _fake_attention(*tensors, **kwargs):
    q = _check_fake(*_read_args(*tensors, **kwargs))
    return q.new_empty(q.shape)


def _fake_attention_with_lse(*tensors, **kwargs):
    q = _check_fake(*_read_args(*tensors, **kwargs))
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _fake_attention_update(*tensors, **kwargs):
    args, options = _update_args(*tensors, **kwargs)
    q = _check_fake(args, options)
    return q.new_empty(q.shape), args["kv_pages"].new_empty(args["kv_pages"].shape)


def _refuse_use_kernel(*tensors, use_kernel, **kwargs):
    raise TypeError(
        f"torch.ops.rpa.ragged_paged_attention takes no use_kernel (got {use_kernel}): it always runs the fastest path "
        "of the device. Leave it out; set TORCH_RPA_XLA_KERNEL=xla for plain XLA ops instead of a kernel"
    )


_LIBRARY.impl("ragged_paged_attention", _cpu_attention, "CPU")
_LIBRARY.impl("ragged_paged_attention_with_lse", _cpu_attention_with_lse, "CPU")
_LIBRARY.impl("ragged_paged_attention_update", _cpu_attention_update, "CPU")
_LIBRARY.impl("ragged_paged_attention_update_", _cpu_attention_update_, "CPU")

for _key in ("XLA", "PrivateUse1"):  # TorchTPU renames PrivateUse1 to tpu, before or after this
    _LIBRARY.impl("ragged_paged_attention", _bridged_attention, _key)
    _LIBRARY.impl("ragged_paged_attention_with_lse", _bridged_attention_with_lse, _key)
    _LIBRARY.impl("ragged_paged_attention_update", _bridged_attention_update, _key)
_LIBRARY.impl("_ragged_paged_attention_update_donating", _bridged_attention_update_donating, "PrivateUse1")

_LIBRARY.impl("ragged_paged_attention_update_", _composite_attention_update_, "CompositeImplicitAutograd")
_LIBRARY.impl("ragged_paged_attention.use_kernel", _refuse_use_kernel, "CompositeImplicitAutograd")

for _name, _named in (
    ("ragged_paged_attention", _read_args),
    ("ragged_paged_attention_with_lse", _read_args),
    ("ragged_paged_attention_update", _update_args),
    ("ragged_paged_attention_update_", _update_args),
):
    _op = getattr(torch.ops.rpa, _name).default
    _LIBRARY.impl(_name, guards.refusing_derivatives(_op, _named), "Autograd")
    for _key in guards.AUTOCAST_KEYS:
        _LIBRARY.impl(_name, guards.in_one_dtype(_op, _named), _key)

torch.library.register_fake("rpa::ragged_paged_attention", _fake_attention, lib=_LIBRARY)
torch.library.register_fake("rpa::ragged_paged_attention_with_lse", _fake_attention_with_lse, lib=_LIBRARY)
torch.library.register_fake("rpa::ragged_paged_attention_update", _fake_attention_update, lib=_LIBRARY)
torch.library.register_fake("rpa::_ragged_paged_attention_update_donating", _fake_attention_update, lib=_LIBRARY)
