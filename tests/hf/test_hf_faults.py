"""One request never harms another: what one client does wrong, or what fails under it, is its own affair."""

import asyncio
import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_model, make_prompts, plain_greedy, tokens
from transformers.generation.continuous_batching.requests import RequestStatus

from torch_rpa import hf
from torch_rpa.bridges import Interrupted

SETTINGS = {"page_size": 8, "num_pages": 24, "max_num_seqs": 4, "token_buckets": (4, 32)}


@pytest.fixture
def model():
    return hf.patch(make_model(), **SETTINGS)


@pytest.fixture
def manager(model):
    """Whatever a test does, the manager ends when it is told to, with all pages back, and can be started again."""
    manager = model.init_continuous_batching()
    manager.start()
    yield manager
    manager.stop(hard_stop=True, timeout=30)
    assert not manager.is_running()
    assert manager.stats.num_free_pages == SETTINGS["num_pages"]
    assert len(tokens(model.generate_batch([[1, 2]], max_new_tokens=2))[0]) == 2


def require_good_answers(manager, model):
    """The service of others goes on."""
    prompts = make_prompts(5, 20, 3)
    ids = manager.add_requests(prompts, max_new_tokens=6)
    answers = [manager.get_result(request_id, timeout=60).generated_tokens for request_id in ids]
    assert answers == plain_greedy(make_model(), prompts, 6)


class Faults:
    """A forward hook that raises in chosen steps."""

    def __init__(self, model, error=None):
        self.error, self.left = error or ValueError("broken"), 0
        model.register_forward_hook(self)

    def __call__(self, module, args, output):
        if self.left:
            self.left -= 1
            raise self.error


# ---- Handlers, tokenizers, ids ------------------------------------------------------------------------------------


def test_a_handler_whose_event_loop_is_closed_ends_its_own_request_only(manager, model):
    other = manager.add_request([3, 4, 5], max_new_tokens=150)

    async def ask():
        request_id = manager.add_request([1, 2], max_new_tokens=150, streaming=True)
        manager.register_result_handler(request_id, lambda output: None)
        return request_id

    request_id = asyncio.run(ask())  # its loop is closed now
    output = manager.get_result(request_id, timeout=60)
    assert (output.status, "event loop" in output.error) == (RequestStatus.FAILED, True)
    assert len(manager.get_result(other, timeout=60).generated_tokens) == 150
    require_good_answers(manager, model)


def test_closed_handlers_at_the_end_keep_no_other_request_waiting(model):
    manager = model.init_continuous_batching()
    waiting = manager.add_request([7], max_new_tokens=100)

    async def ask():
        for _ in range(3):
            manager.register_result_handler(manager.add_request([1], max_new_tokens=100), lambda output: None)

    asyncio.run(ask())
    manager.start()
    manager.stop(hard_stop=True)
    assert manager.get_result(waiting).error == "the manager was stopped"
    assert manager.stats.num_free_pages == SETTINGS["num_pages"]
    manager.start()
    manager.stop()


def test_a_callback_that_raises_is_the_event_loops_affair(manager, model):
    async def ask():
        errors = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context["exception"]))
        request_id = manager.add_request([1, 2], max_new_tokens=3, streaming=True)
        manager.register_result_handler(request_id, lambda output: 1 / 0)
        while len(errors) < 3:
            await asyncio.sleep(0.01)

    asyncio.run(ask())
    require_good_answers(manager, model)


def test_a_tokenizer_that_raises_fails_its_own_request_with_its_error(manager, model):
    def decode(ids):
        raise UnicodeError("no text")

    bad = manager.add_request([1], max_new_tokens=9, stop_strings=["x"], tokenizer=SimpleNamespace(decode=decode))
    output = manager.get_result(bad, timeout=60)
    assert (output.status, output.error) == (RequestStatus.FAILED, "UnicodeError: no text")
    require_good_answers(manager, model)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"stop_strings": ["x"], "tokenizer": "llama"}, "tokenizer must be a transformers tokenizer, got str"),
        ({"min_new_tokens": "3"}, "min_new_tokens='3' must be"),
        ({"min_length": 2.5}, "min_length=2.5 must be"),
        ({"max_new_tokens": "3"}, "max_new_tokens='3' must be"),
        ({"max_length": "9"}, "max_length='9' must be"),
        ({"eos_token_id": "2"}, "eos_token_id='2' must be"),
        ({"do_sample": True, "temperature": "hot"}, "temperature='hot' must be"),
        ({"do_sample": True, "top_k": "7"}, "top_k='7' must be"),
        ({"do_sample": True, "top_p": None, "repetition_penalty": "2"}, "repetition_penalty='2' must be"),
        ({"seed": "1"}, "seed='1' must be"),
        ({"request_id": 5}, "request_id=5 must be a text"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_at_once_by_name(manager, keywords, message):
    with pytest.raises((TypeError, ValueError)) as error:
        manager.add_request([1, 2], **keywords)
    assert message in str(error.value)


def test_a_late_cancel_does_nothing_to_the_next_request_of_that_name(manager):
    for _ in range(20):
        manager.add_request([1], request_id="c", max_new_tokens=1)
        assert manager.get_result("c", timeout=60).status == RequestStatus.FINISHED
        manager.cancel_request("c")
        manager.add_request([1], request_id="c", max_new_tokens=3)
        assert manager.get_result("c", timeout=60).error is None


def test_cancelling_an_id_that_never_was_does_nothing_to_a_request_that_gets_it(manager):
    for _ in range(20):
        manager.cancel_request("later")
        manager.add_request([1], request_id="later", max_new_tokens=2)
        assert manager.get_result("later", timeout=60).error is None


def test_an_id_whose_answer_nobody_has_read_is_not_given_to_another_request(manager):
    manager.add_request([1], request_id="mine", max_new_tokens=2)
    while manager.stats.num_finished < 1:
        pass
    with pytest.raises(ValueError, match="request_id='mine' is the id of a request whose answer has not been read"):
        manager.add_request([1], request_id="mine")
    assert manager.get_result("mine").error is None
    manager.add_request([1], request_id="mine", max_new_tokens=1)
    assert manager.get_result("mine", timeout=60).error is None


def test_a_client_that_takes_the_next_automatic_id_does_not_stop_the_others(manager):
    first = manager.add_request([1], max_new_tokens=1)
    taken = f"req_{int(first.removeprefix('req_')) + 2}"
    manager.add_request([1], request_id=taken, max_new_tokens=50)
    ids = manager.add_requests([[2], [3]], max_new_tokens=1)
    assert taken not in ids
    assert all(manager.get_result(request_id, timeout=60).error is None for request_id in (first, taken, *ids))


# ---- Steps that fail ----------------------------------------------------------------------------------------------


def test_a_step_that_fails_once_fails_its_own_requests_and_the_others_get_the_same_tokens(model):
    prompts = make_prompts(5, 20, 3, 30, 12, 9, seed=3)
    expected = plain_greedy(make_model(), prompts, 8)
    faults, manager = Faults(model), model.init_continuous_batching()
    ids = manager.add_requests(prompts, max_new_tokens=8)
    faults.left = 1  # the first step
    manager.start()
    outputs = [manager.get_result(request_id, timeout=60) for request_id in ids]
    failed = [output.error == "ValueError: broken" for output in outputs]
    assert failed[0]
    assert not failed[-1]
    assert [o.generated_tokens for o, f in zip(outputs, failed, strict=True) if not f] == [
        answer for answer, f in zip(expected, failed, strict=True) if not f
    ]
    assert manager.stats.num_failed == sum(failed)
    assert manager.stats.num_free_pages == SETTINGS["num_pages"]
    manager.stop()


def test_running_requests_that_were_not_in_a_failed_step_are_computed_again(manager, model):
    """Two long prompts fill the step's budget, so a third waits its turn when the step fails."""
    prompts = make_prompts(60, 60, 60, seed=5)
    expected = plain_greedy(make_model(), prompts, 4)
    faults = Faults(model)
    with manager.pause():
        ids = manager.add_requests(prompts, max_new_tokens=4)
        faults.left = 1
    outputs = [manager.get_result(request_id, timeout=60) for request_id in ids]
    survivors = [index for index, output in enumerate(outputs) if output.error is None]
    assert survivors
    assert [outputs[index].generated_tokens for index in survivors] == [expected[index] for index in survivors]


def test_no_prefix_of_a_lost_cache_is_shared(manager, model):
    (prompt,) = make_prompts(40)
    expected = plain_greedy(make_model(), [prompt], 4)[0]
    assert manager.get_result(manager.add_request(prompt, max_new_tokens=4), timeout=60).generated_tokens == expected
    faults = Faults(model)
    faults.left = 1
    assert manager.get_result(manager.add_request([9], max_new_tokens=4), timeout=60).error == "ValueError: broken"
    hits = manager.stats.prefix_hit_rate
    assert manager.get_result(manager.add_request(prompt, max_new_tokens=4), timeout=60).generated_tokens == expected
    assert manager.stats.prefix_hit_rate < hits or hits == 0


def test_three_failed_steps_in_a_row_end_the_manager_with_that_error(model):
    faults, manager = Faults(model), model.init_continuous_batching()
    faults.left = 3
    manager.start()
    for number in range(3):
        output = manager.get_result(manager.add_request([number], max_new_tokens=2), timeout=60)
        assert output.error == "ValueError: broken"
    manager.join(timeout=30)
    assert manager.fatal_error is manager.background_thread_status.fatal_error is faults.error
    with pytest.raises(RuntimeError, match="has failed") as error:
        manager.add_request([1])
    assert error.value.__cause__ is faults.error
    manager.start()  # a new session
    assert manager.fatal_error is None
    require_good_answers(manager, model)
    manager.stop()


def test_a_step_that_succeeds_forgives_the_failed_ones(manager, model):
    faults = Faults(model)
    for _ in range(3):
        faults.left = 2
        errors = [manager.get_result(manager.add_request([1], max_new_tokens=1), timeout=60).error for _ in range(3)]
        assert errors == ["ValueError: broken"] * 2 + [None]
    require_good_answers(manager, model)


def test_requests_that_wait_when_the_manager_ends_fail_with_its_error(model):
    faults, manager = Faults(model), model.init_continuous_batching()
    faults.left = 3
    ids = manager.add_requests(make_prompts(*[60] * 12), max_new_tokens=3)
    manager.start()
    errors = {manager.get_result(request_id, timeout=60).error for request_id in ids}
    assert errors == {"ValueError: broken"}
    manager.join(timeout=30)
    assert manager.stats.num_free_pages == SETTINGS["num_pages"]


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()])
def test_what_is_no_exception_of_a_step_ends_the_manager_and_nobody_waits(model, error):
    faults, manager = Faults(model, error), model.init_continuous_batching()
    faults.left = 1
    ids = manager.add_requests([[1], [2]], max_new_tokens=3)
    manager.start()
    assert all(type(error).__name__ in manager.get_result(request_id, timeout=60).error for request_id in ids)
    manager.join(timeout=30)
    assert manager.fatal_error is error
    assert model.generate_batch([[1]], max_new_tokens=1)


def test_an_attention_that_is_no_longer_ours_fails_requests_and_says_so(model):
    manager = model.init_continuous_batching()
    manager.start()
    model.set_attn_implementation("sdpa")
    assert "its attention is 'sdpa' now" in manager.get_result(manager.add_request([1]), timeout=60).error
    model.set_attn_implementation("torch_rpa")
    require_good_answers(manager, model)
    manager.stop()


def interrupt(model, times: int) -> None:
    """A forward hook that does what another thread's programs do to a step, so many times after the second one."""
    calls = itertools.count()

    def hook(*_):
        if 2 <= next(calls) < 2 + times:
            raise Interrupted("by others")

    model.register_forward_hook(hook)


def test_a_step_that_others_interrupt_runs_again_with_the_same_tokens_sampled_ones_too(manager, model):
    prompts = make_prompts(5, 20, 3, seed=3)
    sampled = {"do_sample": True, "temperature": 2.0, "seed": 5}

    def ask():
        greedy = manager.add_requests(prompts, max_new_tokens=8)
        ids = [*greedy, *manager.add_requests(prompts, max_new_tokens=8, **sampled)]
        outputs = [manager.get_result(request_id, timeout=60) for request_id in ids]
        assert [output.error for output in outputs] == [None] * len(ids)
        return [output.generated_tokens for output in outputs]

    expected = ask()
    interrupt(model, 3)
    assert ask() == expected
    assert manager.stats.num_failed == 0


def test_a_step_that_is_interrupted_again_and_again_fails_and_says_so(manager, model):
    interrupt(model, 12)
    output = manager.get_result(manager.add_request([1, 2], max_new_tokens=8), timeout=60)
    assert output.error == "Interrupted: by others"
    require_good_answers(manager, model)


# ---- One engine for each model ------------------------------------------------------------------------------------


def test_threads_that_make_the_first_manager_share_one_engine():
    model = hf.patch(make_model(), **SETTINGS)
    barrier, managers = threading.Barrier(8), []

    def make():
        barrier.wait()
        managers.append(model.init_continuous_batching())

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    managers[0].start()
    for other in managers[1:]:
        with pytest.raises(RuntimeError, match="a manager runs on this model"):
            other.start()
    assert managers[0].get_result(managers[0].add_request([1], max_new_tokens=1), timeout=60).error is None
    assert len({manager.stats.num_steps for manager in managers}) == 1
    managers[0].stop()


def test_a_manager_made_before_the_model_was_patched_anew_uses_the_new_engine():
    model = hf.patch(make_model(), **SETTINGS)
    manager = model.init_continuous_batching()
    hf.patch(model, page_size=16, num_pages=9, token_buckets=(8, 32))
    manager.start()
    require_good_answers(manager, model)
    assert manager.stats.num_pages == 9
    manager.stop()


@pytest.mark.parametrize("way", ["patch", "unpatch", "patch the class", "unpatch the class"])
def test_patching_is_refused_while_a_manager_runs_and_changes_nothing(way):
    model_class = type("LlamaForCausalLM", (type(make_model()),), {})
    model = make_model()
    model.__class__ = model_class
    if "class" in way:
        hf.patch(model_class, **SETTINGS)
    else:
        hf.patch(model, **SETTINGS)
    manager = model.init_continuous_batching()
    manager.start()
    target = model_class if "class" in way else model
    with pytest.raises(RuntimeError, match="unpatch: a manager runs on this model"):
        (hf.unpatch if way.startswith("unpatch") else hf.patch)(target)
    require_good_answers(manager, model)
    manager.stop()
    hf.unpatch(target)


@pytest.mark.parametrize(
    "name", ["pause", "start", "stop", "join", "get_result", "warmup", "unpatch", "patch", "generate_batch", "generate"]
)
@pytest.mark.parametrize("runs", [True, False], ids=["running", "not running"])
def test_what_would_wait_for_its_own_pause_is_an_error_at_once(model, name, runs):
    manager = model.init_continuous_batching()
    if runs:
        manager.start()
    calls = {
        "pause": lambda: manager.pause().__enter__(),
        "start": model.init_continuous_batching().start,
        "stop": manager.stop,
        "join": manager.join,
        "get_result": manager.get_result,
        "warmup": manager.warmup,
        "unpatch": lambda: hf.unpatch(model),
        "patch": lambda: hf.patch(model),
        "generate_batch": lambda: model.generate_batch([[1]], max_new_tokens=1),
        "generate": lambda: model.generate(torch.tensor([[1]]), max_new_tokens=1),
    }
    if not runs and name in ("stop", "join", "get_result"):
        with manager.pause():
            assert calls[name]() is None  # there is nothing to wait for
        return
    with manager.pause():
        with pytest.raises(RuntimeError, match=r"a manager runs|would wait for ever"):
            calls[name]()
    if runs:
        require_good_answers(manager, model)
        manager.stop()


def test_a_pause_that_ends_with_an_error_forgets_the_prefixes_too(manager, model):
    (prompt,) = make_prompts(40)
    manager.get_result(manager.add_request(prompt, max_new_tokens=4), timeout=60)
    other = make_model(seed=1)

    def change_and_fail():
        with manager.pause():
            model.load_state_dict(other.state_dict())
            raise KeyError

    with pytest.raises(KeyError):
        change_and_fail()
    answer = manager.get_result(manager.add_request(prompt, max_new_tokens=4), timeout=60).generated_tokens
    assert answer == plain_greedy(other, [prompt], 4)[0]


def test_an_interrupted_wait_for_a_pause_holds_nobody(manager, model, monkeypatch):
    """As by Ctrl-C, in this thread alone."""
    this, wait_for = threading.get_ident(), threading.Condition.wait_for

    def interrupted(self, *args):
        if threading.get_ident() == this:
            raise KeyboardInterrupt
        return wait_for(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Condition, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            manager.pause().__enter__()
    require_good_answers(manager, model)


def test_a_hook_that_calls_the_engine_from_inside_a_step_fails_its_step_only(manager, model):
    model.register_forward_hook(lambda *_: manager.get_result() if asking else None)
    asking = True
    output = manager.get_result(manager.add_request([1], max_new_tokens=1), timeout=60)
    asking = False
    assert "inside a step" in output.error
    require_good_answers(manager, model)
