"""Linear layers inside the engine's steps."""

import torch
from tiny_models import make_model, make_prompts, plain_greedy, tokens
from torch.nn.functional import linear

from torch_rpa import hf

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
