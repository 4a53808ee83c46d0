"""The manager: requests from several threads while it runs, results as they come, and nobody waits for ever."""

import asyncio
import queue
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_model, make_prompts, plain_greedy
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestStatus

from torch_rpa import hf
from torch_rpa.hf.api.gate import engine_of

SETTINGS = {"page_size": 8, "num_pages": 24, "max_num_seqs": 4, "token_buckets": (4, 32)}


@pytest.fixture
def model():
    return hf.patch(make_model(), **SETTINGS)


@pytest.fixture
def manager(model):
    manager = model.init_continuous_batching()
    manager.start()
    yield manager
    manager.stop(hard_stop=True, timeout=30)
    assert not manager.is_running()
    assert engine_of(model).allocator.num_free == SETTINGS["num_pages"]


def test_requests_from_several_threads_get_their_own_answers(manager):
    prompts = make_prompts(5, 20, 3, 30, 12, 8, 17, 9, seed=1)
    expected = plain_greedy(make_model(), prompts, 8)
    answers = {}

    def ask(index):
        request_id = manager.add_request(prompts[index], max_new_tokens=8)
        answers[index] = manager.get_result(request_id, timeout=60).generated_tokens

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index] for index in range(len(prompts))] == expected


def test_streaming_gives_an_output_for_each_token(manager):
    (prompt,) = make_prompts(7)
    request_id = manager.add_request(prompt, max_new_tokens=6, streaming=True, record_timestamps=True)
    outputs = list(manager.request_id_iter(request_id))
    expected = plain_greedy(make_model(), [prompt], 6)[0]
    assert [output.generated_tokens for output in outputs] == [expected[: n + 1] for n in range(6)]
    assert [output.status for output in outputs] == [RequestStatus.DECODING] * 5 + [RequestStatus.FINISHED]
    assert len(outputs[-1].timestamps) == 6


def test_each_request_has_its_own_parameters(manager):
    (prompt,) = make_prompts(7)
    wanted = [
        {},
        {"do_sample": True, "temperature": 3.0, "seed": 3},
        {"repetition_penalty": 1.8},
        {"eos_token_id": 5, "max_new_tokens": 9},
    ]
    ids = [manager.add_request(prompt, **{"max_new_tokens": 12, **one}) for one in wanted]
    together = [manager.get_result(request_id, timeout=60).generated_tokens for request_id in ids]
    alone = [
        manager.get_result(manager.add_request(prompt, **{"max_new_tokens": 12, **one}), timeout=60).generated_tokens
        for one in wanted
    ]
    assert together == alone
    assert len({str(answer) for answer in together[:3]}) == 3


def test_cancelling_frees_the_pages_and_ends_with_an_output_that_says_so(manager, model):
    running = manager.add_request([1] * 20, max_new_tokens=150, streaming=True)
    assert manager.get_result(running, timeout=60).status == RequestStatus.DECODING
    manager.cancel_request(running)
    *_, last = manager.request_id_iter(running)
    assert (last.status, last.error) == (RequestStatus.FAILED, "cancelled")
    assert last.generated_tokens
    assert manager.stats.num_free_pages == SETTINGS["num_pages"]
    assert manager.stats.num_cancelled == 1
    manager.cancel_request("unknown")  # or ended already: no error


def test_a_request_that_can_never_run_is_refused_at_once_with_its_numbers(manager):
    with pytest.raises(ValueError, match=r"180 prompt tokens.*need 25 pages of 8, but the cache has num_pages=24"):
        manager.add_request([1] * 180, max_new_tokens=20)
    with pytest.raises(TypeError, match="does not know the keywords temprature"):
        manager.add_request([1], temprature=2)
    first = manager.add_request([1], request_id="mine", max_new_tokens=150)
    with pytest.raises(ValueError, match="request_id='mine' is the id of a request that has not ended"):
        manager.add_request([1], request_id=first)


def test_iteration_gives_every_result_and_ends_with_the_manager(model):
    prompts = make_prompts(5, 9, 3)
    manager = model.init_continuous_batching()
    ids = manager.add_requests(prompts, max_new_tokens=4)
    assert manager.get_result(timeout=0) is None
    manager.start()
    manager.stop(block=False)  # after the requests that it has
    outputs = {output.request_id: output.generated_tokens for output in manager}
    assert [outputs[request_id] for request_id in ids] == plain_greedy(make_model(), prompts, 4)
    manager.join()
    assert manager.get_result() is None
    with pytest.raises(RuntimeError, match="stopping"):
        manager.add_request([1])


def test_a_handler_gets_the_outputs_on_its_event_loop(manager):
    async def ask():
        outputs, finished = [], asyncio.Event()

        def handle(output):
            outputs.append(output.generated_tokens)
            if output.is_finished():
                finished.set()

        request_id = manager.add_request([1, 2, 3], max_new_tokens=5, streaming=True)
        manager.register_result_handler(request_id, handle)
        await asyncio.wait_for(finished.wait(), 60)
        return outputs

    expected = plain_greedy(make_model(), [[1, 2, 3]], 5)[0]
    assert asyncio.run(ask()) == [expected[: n + 1] for n in range(5)]


def test_a_hard_stop_fails_what_is_left(model):
    manager = model.init_continuous_batching()
    manager.start()
    request_id = manager.add_request([1], max_new_tokens=150)
    manager.stop(hard_stop=True)
    assert manager.get_result(request_id).error == "the manager was stopped"


def test_one_manager_or_call_uses_the_model_at_a_time(model, manager):
    for call in (
        model.init_continuous_batching().start,
        lambda: model.generate_batch([[1]], max_new_tokens=1),
        lambda: model.generate(torch.tensor([[1]])),
        model.warmup,
    ):
        with pytest.raises(RuntimeError, match="a manager runs on this model"):
            call()


def test_weights_may_change_in_a_pause_and_no_page_of_the_old_ones_is_shared(manager, model):
    prompts = make_prompts(20)
    first = manager.get_result(manager.add_request(prompts[0], max_new_tokens=6), timeout=60).generated_tokens
    other = make_model(seed=1)
    with manager.pause():
        model.load_state_dict(other.state_dict())
        with pytest.raises(RuntimeError, match="stop inside pause"):
            manager.stop()
    second = manager.get_result(manager.add_request(prompts[0], max_new_tokens=6), timeout=60).generated_tokens
    assert first == plain_greedy(make_model(), prompts, 6)[0]
    assert second == plain_greedy(other, prompts, 6)[0] != first


def test_no_step_runs_in_a_pause(manager):
    request_id = manager.add_request([1], max_new_tokens=100)
    with manager.pause():
        before = manager.stats.num_steps
        time.sleep(0.05)
        assert manager.stats.num_steps == before
    assert len(manager.get_result(request_id, timeout=60).generated_tokens) == 100


def test_a_full_queue_says_so(model, monkeypatch):
    monkeypatch.setattr("torch_rpa.hf.api.session.QUEUE_TIMEOUT", 0.01)
    manager = model.init_continuous_batching(None, ContinuousBatchingConfig(max_queue_size=1))
    manager.add_request([1])
    with pytest.raises(queue.Full):
        manager.add_request([1], request_id="again")
    with pytest.raises(queue.Full):
        manager.add_request([1], request_id="again")  # its id is free again


def test_the_context_manager_warms_up_and_stops(model):
    with model.continuous_batching_context_manager() as manager:
        request_id = manager.add_request([1, 2], max_new_tokens=3)
        assert len(manager.get_result(request_id, timeout=60).generated_tokens) == 3
        assert manager.stats.compilations_after_warm_up == 0
    assert not manager.is_running()


def test_the_readmes_example_runs_as_printed(model, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = [code for code in re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S) if "init_continuous" in code]
    tokenizer = SimpleNamespace(decode=lambda ids: f"{len(ids)} tokens")
    exec(code, {"model": model, "prompts": make_prompts(5), "tokenizer": tokenizer})
    printed = capsys.readouterr().out.splitlines()
    assert printed[:64] == [f"{count + 1} tokens" for count in range(64)]
    assert "num_finished=1" in printed[64]
