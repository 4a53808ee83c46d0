"""Outputs that nobody has read: bounded, found at once, and gone with their session."""

import asyncio
import gc
import threading
import time

import pytest
from tiny_models import make_model

from torch_rpa import hf
from torch_rpa.hf.api.mailboxes import MAX_GIVEN_UP, MAX_HANDLERS, Mailboxes
from torch_rpa.hf.api.request_state import Handler, RequestState
from torch_rpa.hf.api.requests import Request, RequestStatus
from torch_rpa.hf.engine.sequence import Sequence


def make_state(request_id="a", *, streaming=False, prompt=(1,)) -> RequestState:
    state = RequestState(Request(request_id, list(prompt), params=None), streaming=streaming)
    state.sequence = Sequence(request_id, list(prompt), max_new_tokens=3)
    return state


def generate(mailboxes, state, num_tokens) -> None:
    for token in range(num_tokens):
        state.sequence.append(token, 0.0)
        with mailboxes.update(state):
            state.progress()


@pytest.fixture
def mailboxes():
    return Mailboxes()


def test_a_stream_that_is_read_late_gives_every_output_and_keeps_none_until_then(mailboxes):
    state = make_state(streaming=True)
    mailboxes.add(state)
    generate(mailboxes, state, 3)
    outputs = [mailboxes.take("a", 0) for _ in range(4)]
    assert [output and output.generated_tokens for output in outputs] == [[0], [0, 1], [0, 1, 2], None]
    assert [output.is_finished() for output in outputs[:3]] == [False, False, True]


def test_of_a_cancelled_stream_only_the_last_output_is_left(mailboxes):
    state = make_state(streaming=True)
    mailboxes.add(state)
    generate(mailboxes, state, 2)
    with mailboxes.update(state):
        state.given_up = "cancelled"
        state.fail("cancelled")
    output = mailboxes.take("a", 0)
    assert (output.generated_tokens, output.error) == ([0, 1], "cancelled")
    assert mailboxes.take("a", 0) is None


def test_cancelled_requests_that_nobody_reads_are_forgotten_the_oldest_first(mailboxes):
    def num_states():
        gc.collect()
        return sum(isinstance(each, RequestState) for each in gc.get_objects())

    before = num_states()  # of other tests
    for number in range(MAX_GIVEN_UP + 10):
        state = make_state(str(number))
        mailboxes.add(state)
        with mailboxes.update(state):
            state.given_up = "cancelled"
            state.fail("cancelled")
    assert mailboxes.take("0", 0) is None
    assert mailboxes.take("10", 0).error == "cancelled"
    assert num_states() - before <= MAX_GIVEN_UP + 1


def test_the_oldest_output_comes_first_where_any_is_asked_for(mailboxes):
    first, second = make_state("first", streaming=True), make_state("second")
    for state in (first, second):
        mailboxes.add(state)
    generate(mailboxes, first, 1)
    generate(mailboxes, second, 3)
    generate(mailboxes, first, 2)
    outputs = [mailboxes.take(None, 0) for _ in range(5)]
    assert [output and (output.request_id, len(output.generated_tokens)) for output in outputs] == [
        ("first", 1), ("second", 3), ("first", 2), ("first", 3), None
    ]  # fmt: skip


def test_a_reader_of_a_request_that_is_still_to_come_gets_its_output(mailboxes):
    outputs = []
    reader = threading.Thread(target=lambda: outputs.append(mailboxes.take("a", 30)))
    reader.start()
    time.sleep(0.05)
    state = make_state()
    mailboxes.add(state)
    generate(mailboxes, state, 3)
    reader.join()
    assert outputs[0].generated_tokens == [0, 1, 2]


def test_closing_wakes_up_every_reader_and_what_is_there_can_still_be_read(mailboxes):
    state = make_state("there")
    mailboxes.add(state)
    outputs = {}

    def read(request_id):
        outputs[request_id] = mailboxes.take(request_id, None)

    mailboxes.add(make_state("slow"))
    readers = [threading.Thread(target=read, args=(request_id,)) for request_id in ("slow", "unknown")]
    for reader in readers:
        reader.start()
    generate(mailboxes, state, 3)
    mailboxes.close()
    for reader in readers:
        reader.join(timeout=30)
    assert outputs == {"slow": None, "unknown": None}
    assert mailboxes.take(None, None).request_id == "there"
    assert mailboxes.take(None, None) is None


@pytest.mark.parametrize("request_id", ["1999", None])
def test_finding_a_result_looks_at_none_of_the_others(mailboxes, request_id, monkeypatch):
    for number in range(2000):
        state = make_state(str(number))
        mailboxes.add(state)
        generate(mailboxes, state, 3)
    looked_at, has_output = [], RequestState.has_output.fget
    monkeypatch.setattr(RequestState, "has_output", property(lambda self: looked_at.append(self) or has_output(self)))
    output = mailboxes.take(request_id, None)
    assert {state.request_id for state in looked_at} == {output.request_id}


def test_handlers_of_requests_that_never_come_are_bounded(mailboxes):
    async def register():
        loop = asyncio.get_running_loop()
        for number in range(MAX_HANDLERS + 5):
            mailboxes.register(str(number), Handler(print, loop))

    async def one_more():
        mailboxes.register("last", Handler(print, asyncio.get_running_loop()))

    def num_handlers():
        gc.collect()
        return sum(isinstance(each, Handler) for each in gc.get_objects())

    before = num_handlers()  # of other tests
    asyncio.run(register())
    assert num_handlers() - before == MAX_HANDLERS
    asyncio.run(one_more())  # the loop of the others is closed
    assert num_handlers() - before == 1


# ---- Through the manager ------------------------------------------------------------------------------------------


def test_cancelled_streams_that_nobody_reads_keep_no_prompts_and_a_session_starts_empty():
    model = hf.patch(make_model(max_position_embeddings=2048), page_size=16, num_pages=300, max_num_seqs=4)
    manager = model.init_continuous_batching()
    manager.start()
    ids = [manager.add_request([1 + n] * 300, max_new_tokens=200, streaming=True) for n in range(4)]
    while manager.stats.num_steps < 20:
        time.sleep(0.001)
    for request_id in ids:
        manager.cancel_request(request_id)
    while manager.stats.num_cancelled < 4:
        time.sleep(0.001)
    manager.stop()
    gc.collect()
    prompts = [[1 + n] * 300 for n in range(4)]
    kept = [each for each in gc.get_objects() if isinstance(each, list) and len(each) == 300 and each in prompts]
    assert len(kept) <= 3 * len(ids)  # the request's, the sequence's, and this test's own
    manager.start()
    assert manager.get_result(timeout=0.05) is None
    request_id = manager.add_request([5], max_new_tokens=2)
    assert next(iter(manager)).request_id == request_id
    manager.stop()


def test_a_refused_request_leaves_no_handler_behind():
    model = hf.patch(make_model(), page_size=8, num_pages=8)
    manager = model.init_continuous_batching()
    manager.start()

    async def ask():
        called = []
        for number in range(50):
            manager.register_result_handler(f"r{number}", called.append)
            with pytest.raises(ValueError, match="the prompt is empty"):
                manager.add_request([], request_id=f"r{number}")
        manager.add_request([1], request_id="r7", max_new_tokens=1)
        return await asyncio.to_thread(manager.get_result, "r7", 30), called

    output, called = asyncio.run(ask())
    assert output.status == RequestStatus.FINISHED
    assert called == []
    manager.stop()
