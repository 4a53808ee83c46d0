"""Block sizes follow from the chip and the shape, and give way to what the caller asks for."""

from dataclasses import replace

import pytest

from torch_rpa.aot.op import OpCase, kernel_config
from torch_rpa.chips import CHIPS
from torch_rpa.workloads import MODELS

LLAMA = OpCase("v6e", MODELS["llama-3-8b"].heads, page_size=64)


def test_key_blocks_are_longer_where_a_token_is_narrow_beside_the_bandwidth():
    one_kv_head = replace(LLAMA, heads=MODELS["llama-3-70b-on-8-chips"].heads)
    assert kernel_config(one_kv_head).block_keys == 4 * kernel_config(LLAMA).block_keys
    two_kv_heads = replace(LLAMA, heads=(8, 2, 128))
    assert kernel_config(two_kv_heads).block_keys > kernel_config(replace(two_kv_heads, chip="v5e")).block_keys


def test_key_blocks_are_longer_for_8_bit_pages_where_their_fetch_would_be_too_short():
    assert kernel_config(replace(LLAMA, kv_dtype="int8")).block_keys == 2 * kernel_config(LLAMA).block_keys
    on_v5e = replace(LLAMA, chip="v5e")
    assert kernel_config(replace(on_v5e, kv_dtype="int8")).block_keys == kernel_config(on_v5e).block_keys


@pytest.mark.parametrize(("window", "keys"), [(1, 128), (128, 128), (200, 128), (1024, 256), (None, 256)])
def test_key_blocks_are_no_longer_than_a_sliding_window(window, keys):
    assert kernel_config(replace(LLAMA, options={"sliding_window": window})).block_keys == keys


def test_what_the_caller_asks_for_overrides_the_rule():
    asked = {"num_kv_pages_per_block": 3, "num_queries_per_block": 48}
    config = kernel_config(replace(LLAMA, options=asked))
    assert (config.block_pages, config.block_rows) == (3, 48)


@pytest.mark.parametrize("chip", [*CHIPS, None])
@pytest.mark.parametrize("num_tokens", [1, 48, 80, 112, 200])
def test_row_blocks_are_whole_tiles_however_many_tokens_there_are(chip, num_tokens):
    for model in MODELS.values():
        for page_size in (16, 128):
            case = OpCase(chip, model.heads, page_size, num_tokens=num_tokens, dtype="float32", update=True)
            assert kernel_config(case).block_rows % 16 == 0


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("page_size", [32, 128])
def test_every_model_fits_into_the_vector_memory_of_every_chip(chip, model, page_size):
    config = kernel_config(OpCase(chip, MODELS[model].heads, page_size=page_size, update=True))
    assert config.vmem_bytes < config.vmem_limit_bytes
