"""What generate_batch refuses before anything runs, and that it always gives its pages back."""

import threading

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, make_model, make_prompts, plain_greedy, tokens
from transformers import BatchEncoding, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from torch_rpa import hf
from torch_rpa.hf.api.gate import engine_of


@pytest.fixture
def model():
    return hf.patch(make_model(), page_size=8, num_pages=10, token_buckets=(8, 32))


@pytest.fixture(autouse=True)
def _all_pages_free_in_the_end(model):
    yield
    assert engine_of(model).allocator.num_free == 10
    assert not engine_of(model).has_work


def test_no_input_gives_no_result(model):
    assert model.generate_batch([]) == {}


def test_requests_that_can_never_run_are_all_listed_with_their_numbers(model):
    prompts = [[1, 2], [], [3] * 90, [4, VOCAB_SIZE, -1]]
    with pytest.raises(ValueError, match="the prompt is empty") as error:
        model.generate_batch(prompts, max_new_tokens=10)
    message = str(error.value)
    assert "inputs[0]" not in message
    assert "inputs[1]: the prompt is empty" in message
    assert "inputs[2]: 90 prompt tokens + max_new_tokens=10 are 100 tokens, which need 13 pages of 8" in message
    assert f"inputs[3]: token ids [{VOCAB_SIZE}, -1] are outside the vocabulary of {VOCAB_SIZE}" in message


def test_request_past_the_models_positions_is_refused():
    model = hf.patch(make_model(max_position_embeddings=64), num_pages=100)
    with pytest.raises(ValueError, match=r"are 66 tokens, but the model's max_position_embeddings is 64"):
        model.generate_batch([[1] * 60], max_new_tokens=6)


def test_request_past_max_seq_len_is_refused_and_the_page_table_has_room_for_no_more():
    model = hf.patch(make_model(max_position_embeddings=256), num_pages=100, page_size=16, max_seq_len=64)
    assert engine_of(model).runner.pages_per_seq == 4
    with pytest.raises(ValueError, match=r"are 66 tokens, but max_seq_len is 64"):
        model.generate_batch([[1] * 60], max_new_tokens=6)
    assert len(tokens(model.generate_batch([[1] * 60], max_new_tokens=5))[0]) == 5


def test_request_that_just_fits_runs(model):
    """80 slots: the last token needs none."""
    assert len(tokens(model.generate_batch([[1] * 70], max_new_tokens=11))[0]) == 11


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be an integer of at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be an integer of at least 1"),
        ({"generation_config": GenerationConfig(max_length=2)}, "3 prompt tokens leave none of max_length=2"),
        ({"max_new_tokens": 3, "seed": -1}, "seed=-1 must be an integer of at least 0"),
    ],
)
def test_bad_limit_or_seed_is_a_value_error(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.generate_batch([[1, 2, 3]], **kwargs)


def test_without_a_limit_an_answer_may_fill_the_cache(model):
    answer = tokens(model.generate_batch([[1] * 70, [2]]))[0]
    assert len(answer) == 11


def test_unknown_keyword_is_refused_by_name(model):
    message = r"know the keywords max_tokens \(write max_new_tokens\), temprature \(did you mean temperature\?\)"
    with pytest.raises(TypeError, match=message):
        model.generate_batch([[1]], max_tokens=1, temprature=0.5)


def test_batching_settings_that_patch_takes_are_refused_with_a_hint(model):
    config = ContinuousBatchingConfig(page_size=128, num_blocks=7, scheduler_type="prefill_first")
    with pytest.raises(NotImplementedError) as error:
        model.generate_batch([[1]], None, config)
    for part in ("page_size=128 (torch_rpa.hf.patch has page_size=)", "num_pages=", "scheduler_type='prefill_first'"):
        assert part in str(error.value)


def test_generation_settings_that_are_not_supported_are_all_listed(model):
    config = GenerationConfig(max_new_tokens=3, do_sample=True, num_beams=4, no_repeat_ngram_size=2, min_p=0.1)
    with pytest.raises(NotImplementedError) as error:
        model.generate_batch([[1]], config)
    for part in ("num_beams=4", "no_repeat_ngram_size=2", "min_p=0.1"):
        assert part in str(error.value)


def test_stop_strings_need_a_tokenizer(model):
    with pytest.raises(ValueError, match=r"stop_strings=\['x'\] need the keyword tokenizer="):
        model.generate_batch([[1]], max_new_tokens=1, stop_strings=["x"])


def test_generation_settings_that_are_off_are_accepted(model):
    config = GenerationConfig(
        max_new_tokens=3, num_beams=1, repetition_penalty=1.0, use_cache=True, num_return_sequences=1, pad_token_id=0
    )
    assert len(model.generate_batch([[1]], config)) == 1


def test_unset_fields_come_from_the_models_generation_config(model):
    model.generation_config.max_new_tokens = 4
    assert len(tokens(model.generate_batch([[1]], GenerationConfig(do_sample=False)))[0]) == 4
    assert len(tokens(model.generate_batch([[1]], GenerationConfig(max_new_tokens=2)))[0]) == 2


def test_eos_comes_from_the_generation_configs_only(model):
    """As in generate: a model's own config is read once, when its generation config is made."""
    free_running = tokens(model.generate_batch([[1, 2]], max_new_tokens=6))[0]
    model.config.eos_token_id = free_running[1]
    assert tokens(model.generate_batch([[1, 2]], max_new_tokens=6))[0] == free_running
    stopped = model.generate_batch([[1, 2]], GenerationConfig(eos_token_id=np.int64(free_running[1])), max_new_tokens=6)
    assert tokens(stopped)[0] == free_running[: free_running.index(free_running[1]) + 1]


def test_a_generation_config_of_another_type_is_refused(model):
    with pytest.raises(TypeError, match=r"must be a transformers\.GenerationConfig, got dict"):
        model.generate_batch([[1]], {"do_sample": True}, max_new_tokens=1)


@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        ("text", "got 'text'"),
        (["12"], "one of them is '12'"),
        ([1, 2], "one of them is 1"),
        ([["a"]], r"one of them is \['a'\]"),
        ([[1.9]], r"one of them is \[1\.9\]"),
        (BatchEncoding({"input_ids": [[1, 2]]}), "got a BatchEncoding"),
    ],
)
def test_inputs_that_are_no_lists_of_ids_say_how_to_get_them(model, inputs, got):
    with pytest.raises(
        TypeError, match=rf'list of lists of token ids, such as tokenizer\(texts\)\["input_ids"\].* {got}'
    ):
        model.generate_batch(inputs, max_new_tokens=1)


@pytest.mark.parametrize("prompt", ["text", ["a"], [[1, 2]], BatchEncoding({"input_ids": [1, 2]})], ids=str)
def test_a_prompt_that_is_no_list_of_ids_says_how_to_get_it(model, prompt):
    with pytest.raises(
        TypeError, match=r'input_ids must be a list of token ids, such as tokenizer\(text\)\["input_ids"'
    ):
        model.init_continuous_batching().add_request(prompt, max_new_tokens=1)


def test_rows_of_a_tensor_are_accepted(model):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert tokens(model.generate_batch(ids, max_new_tokens=2)) == tokens(
        model.generate_batch(ids.tolist(), max_new_tokens=2)
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_after_an_interruption_the_next_call_starts_afresh(model, error, monkeypatch):
    prompts = make_prompts(5, 20, 3, 30)
    runner = engine_of(model).runner
    real_run, num_runs = runner.run, 0

    def run(chunks, rows):
        nonlocal num_runs
        num_runs += 1
        if num_runs == 3:
            raise error
        return real_run(chunks, rows)

    monkeypatch.setattr(runner, "run", run)
    with pytest.raises(error):
        model.generate_batch(prompts, max_new_tokens=8)
    assert engine_of(model).allocator.num_free == 10
    answers = tokens(model.generate_batch(prompts, max_new_tokens=8))
    assert answers == plain_greedy(make_model(), prompts, 8)


def test_an_error_in_the_progress_bar_frees_the_pages_too(model, monkeypatch):
    import torch_rpa.hf.api.generate as module

    class BrokenBar(module.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "tqdm", BrokenBar)
    with pytest.raises(KeyboardInterrupt) as caught:
        model.generate_batch(make_prompts(5, 20), max_new_tokens=3)
    assert engine_of(model).allocator.num_free == 10, caught  # while the traceback is still alive


def test_calls_from_two_threads_take_turns(model):
    prompts = [make_prompts(5, 9, seed=1), make_prompts(12, 3, seed=2)]
    expected = [plain_greedy(make_model(), batch, 6) for batch in prompts]
    answers = {}

    def call(index):
        answers[index] = tokens(model.generate_batch(prompts[index], max_new_tokens=6))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {0: expected[0], 1: expected[1]}
