"""PEFT's adapters: the ones that are active when a step runs."""

import pytest
import torch
from tiny_models import make_model, make_prompts, plain_greedy, tokens

from torch_rpa import hf

peft = pytest.importorskip("peft")

SETTINGS = {"page_size": 8, "num_pages": 64, "max_num_seqs": 4, "token_buckets": (4, 32)}
PROMPTS = make_prompts(20, 3, 9)


def with_adapters(*names):
    """A tiny Llama under LoRA adapters with weights of their own."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=32)
    model = peft.get_peft_model(make_model(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def expected(choose) -> list[list[int]]:
    model = with_adapters("a", "b")
    with choose(model):
        return plain_greedy(model.get_base_model(), PROMPTS, 5)


class Adapter:
    def __init__(self, model, name):
        model.set_adapter(name)

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def answers(model, **keywords):
    return tokens(model.generate_batch(PROMPTS, max_new_tokens=5, **keywords))


@pytest.mark.parametrize("which", ["the PeftModel", "the model in it"])
def test_the_tokens_are_those_of_the_adapter_that_is_active(device, which):
    of_a, of_b, of_none = (
        expected(lambda model: Adapter(model, "a")),
        expected(lambda model: Adapter(model, "b")),
        expected(lambda model: model.disable_adapter()),
    )
    assert len({str(each) for each in (of_a, of_b, of_none)}) == 3
    model = with_adapters("a", "b").to(device)
    patched = hf.patch(model if which == "the PeftModel" else model.get_base_model(), **SETTINGS)
    assert answers(patched, persistent_manager=True) == of_a
    model.set_adapter("b")
    assert answers(patched, persistent_manager=True) == of_b
    with model.disable_adapter():
        assert answers(patched, persistent_manager=True) == of_none
    model.set_adapter("a")
    assert answers(patched) == of_a
    hf.unpatch(patched)


def test_patching_a_peft_model_gives_it_back_with_every_method():
    model = with_adapters("a", "b")
    assert hf.patch(model, **SETTINGS) is model
    rows = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=4, do_sample=False)
    assert rows.shape == (1, 24)
    with model.continuous_batching_context_manager() as manager:
        assert manager.get_result(manager.add_request(PROMPTS[0], max_new_tokens=2), timeout=60).error is None
    assert hf.unpatch(model) is model
    assert "generate_batch" not in vars(model.get_base_model())
