"""What libtpu makes of a step that torch.compile gives to TorchTPU, with the real Pallas kernel in it."""

import pytest
import testbed
import torch
from testbed import compiled_for

import torch_rpa
from torch_rpa import aot
from torch_rpa.bridges.target import Target, using

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.slow]

TOKENS, MODEL_DIM, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, LAYERS = 256, 1024, 16, 8, 128, 2
# 256 MiB for each layer: a cache that vector memory could hold may be staged through it, which looks like a copy.
NUM_PAGES, PAGE_SIZE, MAX_NUM_SEQS, PAGES_PER_SEQ = 1024, 64, 16, 64
SM_SCALE = HEAD_DIM**-0.5


def attention(op):
    """The layers of a step around an update op; gives x."""

    def step(x, weights, caches, *metadata):
        for (wq, wk, wv, wo), pages in zip(weights, caches, strict=True):
            q, k, v = ((x @ w).view(TOKENS, -1, HEAD_DIM) for w in (wq, wk, wv))
            x = x + op(q, k, v, pages, *metadata).view(TOKENS, -1) @ wo
        return x

    return step


def in_place(q, k, v, pages, *metadata):
    return torch.ops.rpa.ragged_paged_attention_update_(q, k, v, pages, *metadata, sm_scale=SM_SCALE)


def functional(q, k, v, pages, *metadata):
    out, new_pages = torch.ops.rpa.ragged_paged_attention_update(q, k, v, pages, *metadata, sm_scale=SM_SCALE)
    pages.copy_(new_pages)
    return out


def captured(op, chip, device):
    """The program of a compiled step for a chip: kept, and then refused by the CPU, which has no such kernel."""

    def zeros(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype, device=device)

    heads = (NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    weights = [
        (*(zeros(MODEL_DIM, n * HEAD_DIM) for n in heads), zeros(NUM_Q_HEADS * HEAD_DIM, MODEL_DIM))
        for _ in range(LAYERS)
    ]
    shapes = (MAX_NUM_SEQS,), (MAX_NUM_SEQS, PAGES_PER_SEQ), (MAX_NUM_SEQS + 1,), (1,)
    metadata = [zeros(*shape, dtype=torch.int32) for shape in shapes]
    torch._dynamo.reset()
    with using(Target("tpu", chip)):
        sizes = NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM
        caches = [torch_rpa.empty_kv_pages(*sizes, dtype=torch.bfloat16, device=device) for _ in range(LAYERS)]
        step = torch.compile(attention(op), fullgraph=True)
        with pytest.raises(RuntimeError, match="tpu_custom_call"):
            step(zeros(TOKENS, MODEL_DIM), weights, caches, *metadata).cpu()
    return testbed.programs()[-1]


CACHE = f"bf16[{NUM_PAGES},{PAGE_SIZE},{2 * NUM_KV_HEADS * HEAD_DIM}]"


@pytest.mark.parametrize("chip", ["v5e", "v6e", "7x"])
def test_every_layers_cache_is_updated_in_place_and_nothing_is_copied(chip, tpu):
    program = compiled_for(chip, captured(in_place, chip, tpu))
    assert program.num_kernels == LAYERS
    assert program.aliased == [CACHE] * LAYERS
    assert program.copies == ()
    assert CACHE not in aot.hbm_copies(program.text)
    assert " transpose(" not in program.text


def test_without_donation_the_cache_would_be_copied(tpu):
    """The functional op leaves its input valid. And the test above can fail."""
    program = compiled_for("v6e", captured(functional, "v6e", tpu))
    assert program.num_kernels == LAYERS
    assert not program.aliased
    assert program.copies.count(CACHE) == LAYERS


def test_in_eager_mode_pages_keep_their_buffer_and_shared_ones_are_copied(tpu):
    pages = torch.zeros(NUM_PAGES, PAGE_SIZE, 2 * NUM_KV_HEADS * HEAD_DIM, dtype=torch.bfloat16, device=tpu) + 1
    from torch_rpa.bridges.torch_tpu.bridge import _own_buffer_

    def program():
        before = len(testbed.programs())
        _own_buffer_(pages)
        pages[0].cpu()
        return next(p for p in testbed.programs()[before:] if b"index_fill" in p.read_bytes())

    pages[0].cpu()
    alone = compiled_for("v6e", program())
    assert (alone.aliased, alone.copies) == ([CACHE], ())
    copy = pages.clone()
    shared = compiled_for("v6e", program())
    assert (shared.aliased, shared.copies) == ([], (CACHE,))
    assert copy.device == pages.device
