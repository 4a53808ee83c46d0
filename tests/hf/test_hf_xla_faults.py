"""On the XLA device, beside others: their programs are not the engine's, and what PyTorch/XLA drops is made again."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, make_prompts, plain_greedy, tokens
from transformers import GenerationConfig

from torch_rpa import hf

ROOT = Path(__file__).parents[2]
SETTINGS = {"page_size": 8, "num_pages": 64, "max_num_seqs": 4, "token_buckets": (4, 32)}


class OtherWork:
    """A thread that computes on the XLA device and runs all that is pending there; each program is another one."""

    def __init__(self, device):
        self.device, self.num_programs, self.error = device, 0, None
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        import torch_xla

        try:
            while not self._ends.is_set():
                ones = torch.ones(1 + self.num_programs % 400, device=self.device)
                (ones * self.num_programs).sum()
                torch_xla.sync()
                self.num_programs += 1
        except BaseException as error:
            self.error = error

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ends.set()
        self._thread.join()


@pytest.mark.slow
def test_other_work_on_the_device_harms_no_answer_and_its_programs_do_not_count(xla):
    prompts = make_prompts(5, 20, 3, 40, 12, 9, seed=3)
    expected = plain_greedy(make_model(), prompts, 8)
    model = hf.patch(make_model().to(xla), **SETTINGS)
    with model.continuous_batching_context_manager() as manager, OtherWork(xla) as other:
        for _ in range(20):
            ids = manager.add_requests(prompts, max_new_tokens=8)
            answers = [manager.get_result(request_id, timeout=120) for request_id in ids]
            assert [answer.error for answer in answers] == [None] * len(prompts)
            assert [answer.generated_tokens for answer in answers] == expected
        stats = manager.stats
    assert other.error is None
    assert other.num_programs > 20
    assert stats.compilations_after_warm_up == 0
    assert stats.num_failed == 0


def test_a_step_that_fails_on_the_device_is_forgotten_and_nothing_is_compiled_for_it(xla):
    prompts = make_prompts(60, 60, 9, seed=5)
    expected = plain_greedy(make_model(), prompts, 6)
    model = hf.patch(make_model().to(xla), **SETTINGS)
    with model.continuous_batching_context_manager() as manager:
        with manager.pause():
            ids = manager.add_requests(prompts, max_new_tokens=6)
            hook = model.register_forward_hook(lambda *_: 1 / 0)
        assert manager.get_result(ids[0], timeout=120).error == "ZeroDivisionError: division by zero"
        hook.remove()
        outputs = [manager.get_result(request_id, timeout=120) for request_id in ids[1:]]
        survivors = [index for index, output in enumerate(outputs, 1) if output.error is None]
        assert [outputs[index - 1].generated_tokens for index in survivors] == [expected[i] for i in survivors]
        again = manager.get_result(manager.add_request(prompts[0], max_new_tokens=6), timeout=120)
        assert again.generated_tokens == expected[0]
        assert manager.stats.num_free_pages == SETTINGS["num_pages"]


EVICTING = """
import sys
sys.path[:0] = [{tests!r}]
import torch
from tiny_models import make_model, make_prompts, plain_greedy, tokens
from torch_rpa import hf

prompts = make_prompts(5, 20, 3, 40, 12, 9, seed=3)
expected = plain_greedy(make_model(), prompts, 4)
model = hf.patch(make_model().to("xla"), page_size=8, num_pages=64, max_num_seqs=4, token_buckets=(4, 16, 32),
                 xla_step={step!r})
model.warmup(progress_bar=False)  # seven programs
for _ in range(2):
    assert tokens(model.generate_batch(prompts, max_new_tokens=4)) == expected
print("right")
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["replay", "lazy"])
def test_programs_that_pytorch_xla_has_evicted_are_traced_again(step):
    environment = {
        **os.environ,
        "XLA_COMPILATION_CACHE_SIZE": "4",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    program = EVICTING.format(tests=str(Path(__file__).parent), step=step)
    process = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.stdout.splitlines()[-1:] == ["right"], process.stderr


@pytest.mark.slow
def test_many_token_buckets_compile_nothing_after_the_warm_up_with_torch_compile(xla):
    from torch_rpa import bridges

    prompts = make_prompts(1, 7, 15, 30, 60, 3, 110, seed=2)
    expected = plain_greedy(make_model(num_hidden_layers=1), prompts, 3)
    buckets = (4, 8, 16, 24, 32, 48, 64)
    model = make_model(num_hidden_layers=1).to(xla)
    hf.patch(model, page_size=8, num_pages=64, max_num_seqs=4, token_buckets=buckets, xla_step="openxla")
    model.warmup(progress_bar=False)
    before = bridges.of(xla).compilations()[0]
    assert tokens(model.generate_batch(prompts, max_new_tokens=3)) == expected
    model.generate_batch(prompts, GenerationConfig(do_sample=True), max_new_tokens=3)
    for prompt in prompts:
        model.generate_batch([prompt], max_new_tokens=2)
    assert bridges.of(xla).compilations()[0] == before
