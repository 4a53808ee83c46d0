"""Bad input: which error, and that it names the argument, what it was and what was expected."""

import re
from dataclasses import replace

import pytest
import torch
from batches import assert_matches_oracle, make_batch
from devices import BRIDGED

pytestmark = pytest.mark.usefixtures("no_grad")

UPDATE = torch.ops.rpa.ragged_paged_attention_update
UPDATE_ = torch.ops.rpa.ragged_paged_attention_update_

# What is changed in a good batch -> the error and its message (a regular expression).
BAD_TENSORS = {
    "q_with_a_batch_dimension": (
        {"q": lambda b: b.q[None]},
        (ValueError, r"q must be \[num_tokens, num_q_heads, head_dim\], got shape \[1, 47, 4, 64\]; flatten the batch"),
    ),
    "q_transposed": (
        {"q": lambda b: b.q.transpose(0, 1)},
        (
            ValueError,
            r"num_q_heads=47 and num_kv_heads=2; q must be \[num_tokens, .* \(never transposed\), got .*\[4, 47",
        ),
    ),
    "q_with_heads_last": (
        {"q": lambda b: b.q.transpose(1, 2)},
        (ValueError, r"q must be \[num_tokens, .*\], got shape \[47, 64, 4\] with head_dim=64 .*: is q transposed\?"),
    ),
    "heads_that_do_not_divide": (
        {"q": lambda b: b.q[:, :3]},
        (ValueError, r"num_q_heads must be a multiple of num_kv_heads, got num_q_heads=3 and num_kv_heads=2"),
    ),
    "head_dim_not_a_multiple_of_8": (
        {"q": lambda b: b.q[..., :63]},
        (ValueError, r"head_dim must be a multiple of 8 up to 256, got 63"),
    ),
    "float64_q": (
        {"q": lambda b: b.q.double()},
        (TypeError, r"q must be one of float32, bfloat16, float16, got float64"),
    ),
    "integer_q": ({"q": lambda b: b.q.nan_to_num().int()}, (TypeError, r"q must be one of float32, .* got int32")),
    "pages_of_another_float": (
        {"kv_pages": lambda b: b.kv_pages.bfloat16()},
        (TypeError, r"kv_pages must have q's dtype float32 or one of float8_e4m3fn, float8_e5m2, int8, got bfloat16"),
    ),
    "pages_with_heads_before_tokens": (
        {"kv_pages": lambda b: b.kv_pages.transpose(1, 2).contiguous()},
        (
            ValueError,
            r"kv_pages must be \[num_pages, page_size, 2 \* num_kv_heads.*whose page_size 4 is not a power of two",
        ),
    ),
    "pages_of_another_head_dim": (
        {"kv_pages": lambda b: b.kv_pages[..., :32]},
        (ValueError, r"kv_pages must be .*got shape \[\d+, 16, 4, 32\], whose head_dim 32 is not q's 64"),
    ),
    "pages_with_an_odd_number_of_heads": (
        {"kv_pages": lambda b: b.kv_pages[:, :, :3]},
        (ValueError, r"kv_pages must be .*whose third dimension 3 is not 2 \* num_kv_heads"),
    ),
    "flat_pages_of_a_wrong_width": (
        {"kv_pages": lambda b: b.kv_pages.flatten(2)[..., :250]},
        (ValueError, r"kv_pages must be .*whose width 250 is not a multiple of 2 \* head_dim = 128"),
    ),
    "pages_of_a_wrong_page_size": (
        {"kv_pages": lambda b: b.kv_pages[:, :12]},
        (ValueError, r"kv_pages must be .*whose page_size 12 is not a power of two from 8 to 256"),
    ),
    "no_page": ({"kv_pages": lambda b: b.kv_pages[:0]}, (ValueError, r"kv_pages must be .*which has no page")),
    "one_tensor_of_keys": (
        {"kv_pages": lambda b: b.kv_pages[0, 0]},
        (ValueError, r"kv_pages must be .*; got shape \[4, 64\]"),
    ),
    "kv_lens_too_long": (
        {"kv_lens": lambda b: b.kv_lens.repeat(2)},
        (ValueError, r"kv_lens must be \[max_num_seqs\] with max_num_seqs = 9 .*got shape \[18\]"),
    ),
    "cu_q_lens_without_the_last_entry": (
        {"cu_q_lens": lambda b: b.cu_q_lens[:-1]},
        (ValueError, r"cu_q_lens must be \[max_num_seqs \+ 1\] with max_num_seqs \+ 1 = 10 .*got shape \[9\]"),
    ),
    "num_seqs_without_a_dimension": (
        {"num_seqs": lambda b: b.num_seqs[0]},
        (ValueError, r"num_seqs must be \[1\], got shape \[\]"),
    ),
    "flattened_page_table": (
        {"page_indices": lambda b: b.page_indices.flatten()},
        (ValueError, r"page_indices must be \[max_num_seqs, pages_per_seq\], got shape \[\d+\]"),
    ),
    **{
        f"int64_{name}": (
            {name: lambda b, name=name: getattr(b, name).long()},
            (TypeError, rf"{name} must be int32, got int64; write {name}.to\(torch.int32\)"),
        )
        for name in ("kv_lens", "page_indices", "cu_q_lens", "num_seqs")
    },
    "float_kv_lens": ({"kv_lens": lambda b: b.kv_lens.float()}, (TypeError, r"kv_lens must be int32, got float32$")),
}

BAD_OPTIONS = {
    "sliding_window": [0, -3],
    "soft_cap": [0.0, float("nan"), float("inf"), 1e300, 1e30, 1e-39, -1e-39, 1e-46],
    "sm_scale": [float("nan"), float("inf"), 1e39],
    "k_scale": [float("nan"), 0.0, -1.0, float("inf"), 1e-39, 1e-46],
    "v_scale": [float("nan"), 0.0, -1.0, float("inf"), 1e-39, 1e-46],
    "num_kv_pages_per_block": [0, -1],
    "num_queries_per_block": [0, -1],
    "vmem_limit_bytes": [0, -1],
}


@pytest.mark.parametrize(("changes", "error"), BAD_TENSORS.values(), ids=BAD_TENSORS)
@pytest.mark.parametrize("where", ["cpu", *BRIDGED, "meta"])
def test_a_bad_tensor_is_refused_by_name(changes, error, where, request):
    device = request.getfixturevalue(where) if where not in ("cpu", "meta") else where
    batch = make_batch(spare_rows=2)  # 47 rows: transposed, they are no multiple of the KV heads
    batch = replace(batch, **{name: change(batch) for name, change in changes.items()}).to(device)
    with pytest.raises(error[0], match=error[1]):
        batch.read()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD_OPTIONS for value in BAD_OPTIONS[name]])
def test_an_option_out_of_range_is_refused_by_name(name, value, device):
    with pytest.raises(ValueError, match=rf"{name} must be .*got {re.escape(str(value))}"):
        make_batch().to(device).read(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sm_scale": 2.0**100, "k_scale": 2.0**100}, r"sm_scale \* k_scale must be finite in float32, got 1\.6"),
        ({"sm_scale": 1e3, "soft_cap": 1e-37}, r"sm_scale \* k_scale / soft_cap must be finite in float32, got "),
    ],
)
def test_factors_whose_product_float32_cannot_hold_are_refused(options, message, device):
    with pytest.raises(ValueError, match=message):
        make_batch().to(device).read(**options)


@pytest.mark.parametrize("soft_cap", [2.0**-126, -(2.0**-126), 2.0**64])
def test_the_smallest_and_the_largest_soft_cap_are_exact_with_zero_scores_too(soft_cap, device):
    batch = make_batch()
    for q in (batch.q, torch.zeros_like(batch.q)):
        batch = replace(batch, q=q)
        assert_matches_oracle(batch, *batch.to(device).read(soft_cap=soft_cap), soft_cap=soft_cap)


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_int8_pages_need_both_scales(name, device):
    batch = make_batch(kv_dtype=torch.int8)
    del batch.scales[name]
    with pytest.raises(ValueError, match=f"{name} must be given for int8 kv_pages, got None"):
        batch.to(device).read()


@pytest.mark.parametrize("name", ["kv_pages", "kv_lens", "num_seqs"])
@pytest.mark.parametrize("where", BRIDGED)
def test_tensors_on_another_device_are_refused_by_name(name, where, request):
    batch = make_batch()
    on_device = batch.to(request.getfixturevalue(where))
    with pytest.raises(ValueError, match=f"{name} must be on q's device {where}:0, got cpu; all tensors go together"):
        replace(on_device, **{name: getattr(batch, name)}).read()


@pytest.mark.parametrize("where", BRIDGED)
def test_a_cpu_q_beside_pages_on_another_device_is_refused_by_name(where, request):
    batch = make_batch()
    on_device = batch.to(request.getfixturevalue(where))
    with pytest.raises(ValueError, match=f"kv_pages must be on q's device cpu, got {where}:0; all tensors go together"):
        replace(on_device, q=batch.q).read()


@pytest.mark.parametrize("form", ["heads", "flat"])
@pytest.mark.parametrize("names", [("q", "k", "v"), ("q",), ("v",)], ids="".join)
def test_an_update_with_heads_last_asks_what_is_transposed(names, form, device):
    batch = make_batch(form=form)
    batch = replace(batch, **{name: getattr(batch, name).transpose(1, 2) for name in names})
    with pytest.raises(ValueError, match=rf"{names[0]} must be .*is {names[0]} transposed\?"):
        batch.to(device).update()


@pytest.mark.parametrize("op", [UPDATE, UPDATE_], ids=["functional", "in_place"])
@pytest.mark.parametrize("name", ["k", "v"])
def test_new_tokens_of_a_wrong_shape_or_dtype_are_refused(name, op, device):
    batch = make_batch(spare_rows=2)
    x = getattr(batch, name)
    with pytest.raises(ValueError, match=rf"{name} must be \[num_tokens, num_kv_heads, head_dim\] = \[47, 2, 64\]"):
        replace(batch, **{name: x[:-1]}).to(device).update(op)
    with pytest.raises(ValueError, match=rf"{name} must be .*got shape \[47, 1, 64\]"):
        replace(batch, **{name: x[:, :1]}).to(device).update(op)
    with pytest.raises(TypeError, match=f"{name} must have q's dtype float32, got bfloat16"):
        replace(batch, **{name: x.bfloat16()}).to(device).update(op)


@pytest.mark.parametrize(
    ("sinks", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"sinks must be \[num_q_heads\] = \[4\], got shape \[3\]"),
        (torch.zeros(1, 4), ValueError, r"sinks must be \[num_q_heads\], got shape \[1, 4\]"),
        (torch.zeros(4).double(), TypeError, "sinks must be float32 or q's dtype float32, got float64"),
    ],
)
def test_bad_sinks_are_refused(sinks, error, message, device):
    with pytest.raises(error, match=message):
        make_batch().to(device).read(sinks=sinks.to(device))


@pytest.mark.parametrize("where", BRIDGED)
def test_what_a_device_cannot_do_says_what_works(where, request):
    with pytest.raises(NotImplementedError, match=r"float16 runs on CPU tensors only, not on .*; use bfloat16"):
        make_batch(dtype=torch.float16).to(request.getfixturevalue(where)).read()


def test_use_kernel_of_the_older_op_is_refused_with_a_hint(device):
    batch = make_batch().to(device)
    with pytest.raises(TypeError, match=r"takes no use_kernel .*Leave it out"):
        batch.read(torch.ops.rpa.ragged_paged_attention, use_kernel=True)


def test_a_refused_call_leaves_the_pages_alone(device):
    batch = make_batch().to(device)
    before = batch.kv_pages.cpu()
    with pytest.raises(ValueError, match="sliding_window"):
        batch.update(UPDATE_, sliding_window=0)
    assert torch.equal(batch.kv_pages.cpu().view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 16, 2, 64), "num_pages must be at least 1, got 0"),
        ((4, 12, 2, 64), "page_size must be a power of two from 8 to 256, got 12"),
        ((4, 16, 0, 64), "num_kv_heads must be at least 1, got 0"),
        ((4, 16, 2, 0), "head_dim must be a multiple of 8 up to 256, got 0"),
        ((4, 16, 2, 7), "head_dim must be a multiple of 8 up to 256, got 7"),
        ((4, 16, 2, 512), "head_dim must be a multiple of 8 up to 256, got 512"),
    ],
)
def test_empty_kv_pages_refuses_bad_sizes(sizes, message, device):
    import torch_rpa

    with pytest.raises(ValueError, match=message):
        torch_rpa.empty_kv_pages(*sizes, dtype=torch.float32, device=device)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64], ids=str)
def test_empty_kv_pages_refuses_dtypes_that_no_op_takes(dtype, device):
    import torch_rpa

    with pytest.raises(TypeError, match=rf"dtype must be one of float32, .* got {dtype}"):
        torch_rpa.empty_kv_pages(4, 16, 2, 64, dtype=dtype, device=device)


def test_empty_kv_pages_are_zeros_that_the_op_takes(device):
    import torch_rpa

    batch = make_batch(((3, 3),)).to(device)
    for dtype in (torch.float32, torch.float8_e4m3fn, torch.int8):
        pages = torch_rpa.empty_kv_pages(4, 16, 2, 64, dtype=dtype, device=device)
        assert pages.dtype == dtype
        assert pages.device.type == device.type
        assert not pages.cpu().float().any()
        replace(batch, kv_pages=pages).read(k_scale=1.0, v_scale=1.0)
