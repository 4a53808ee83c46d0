"""How many pages the cache gets when nobody says."""

import logging

import torch
from tiny_models import make_model

from torch_rpa.hf.engine import pool
from torch_rpa.hf.engine.config import EngineConfig
from torch_rpa.hf.model.cache import PagedKVCache

CONFIG = EngineConfig(page_size=16, max_num_seqs=4, token_buckets=(8,))


def test_a_device_that_does_not_tell_gets_pages_for_every_sequence(caplog, device):
    caplog.set_level(logging.INFO, logger="torch_rpa.hf.engine.pool")
    assert pool.pool_pages(make_model().to(device), CONFIG) == 4 * 256 // 16
    assert "chose 64 pages of 16 tokens, 4 sequences of 256 tokens" in caplog.text


def test_free_memory_is_filled_up_to_a_fraction_and_what_can_be_used(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="torch_rpa.hf.engine.pool")
    model = make_model()
    one = pool.page_bytes(model.config, 16, torch.float32)
    assert one == sum(layer.nbytes for layer in PagedKVCache(model, 1, 16, torch.float32).layers)
    monkeypatch.setattr(pool, "_free_bytes", lambda device: 50 * one)
    assert pool.pool_pages(model, CONFIG) == 40
    assert "chose 40 pages of 16 tokens" in caplog.text
    assert "GiB that are free on cpu" in caplog.text
    monkeypatch.setattr(pool, "_free_bytes", lambda device: 10**12)
    assert pool.pool_pages(model, CONFIG) == 64  # more could never be used at once


def test_an_8_bit_cache_gets_more_pages(monkeypatch):
    model = make_model()
    monkeypatch.setattr(pool, "_free_bytes", lambda device: 10 * pool.page_bytes(model.config, 16, torch.float32))
    config = EngineConfig(page_size=16, max_num_seqs=4, token_buckets=(8,), kv_dtype=torch.float8_e4m3fn)
    assert pool.pool_pages(model, config) == 32
