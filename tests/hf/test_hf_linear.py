"""Linear layers inside the engine's steps."""

import torch
from tiny_models import make_model, make_prompts, plain_greedy, tokens
from torch.nn.functional import linear

from torch_rpa import hf
from torch_rpa.hf.model.linear import on_device

PROMPTS = make_prompts(5, 20)


class OwnLinear(torch.Tensor):
    """A weight that says itself what its products are, as quantised ones do."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls += func is linear
        return super().__torch_function__(func, types, args, kwargs)


def test_a_weight_with_a_product_of_its_own_keeps_it():
    plain, model = make_model(), make_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().as_subclass(OwnLinear))
    hf.patch(model, page_size=8, max_num_seqs=2)
    OwnLinear.calls = 0
    assert tokens(model.generate_batch(PROMPTS, max_new_tokens=4)) == plain_greedy(plain, PROMPTS, 4)
    assert OwnLinear.calls >= 4


def test_under_autocast_a_product_is_in_its_dtype(device):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 16), torch.randn(8, 16), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = linear(x, weight, bias)
    x, weight, bias = x.to(device), weight.to(device), bias.to(device)
    with torch.autocast(device.type, torch.bfloat16), on_device(device):
        product = linear(x, weight, bias)
    assert product.dtype == torch.bfloat16
    rounding = 2.0**-8  # the product is rounded, and once more with its bias
    torch.testing.assert_close(
        product.cpu(), expected, rtol=2 * rounding, atol=2 * rounding * expected.abs().max().item()
    )


def test_a_model_answers_under_autocast(device):
    """Its first tokens, which are no close calls; later ones differ between transformers' own attentions, too."""
    model = hf.patch(make_model().to(device), page_size=8, max_num_seqs=2, token_buckets=(8,))
    with torch.autocast(device.type, torch.bfloat16):
        answers = tokens(model.generate_batch(PROMPTS, max_new_tokens=4))
    assert [answer[:1] for answer in answers] == plain_greedy(make_model(), PROMPTS, 1)
    assert [len(answer) for answer in answers] == [4, 4]
