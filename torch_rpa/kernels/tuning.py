"""Block sizes for a chip and a shape, by a few rules from hardware facts. What a caller asks for overrides them.

- Rows: enough that the products over a key block outlast its fetch, and few enough that the first rows come soon.
- Keys: enough that the fetch of a block outlasts what decode does for each block, whatever its length, but no more than
  a sliding window has: decode computes most of a block for the few keys of a window that are in it.
- What does not fit into VMEM is halved, first what is largest beside the least that is of use.

``benchmarks/sweep_blocks.py`` compares the choice with others.
"""

from dataclasses import replace
from typing import NamedTuple

from torch_rpa.chips import Chip
from torch_rpa.options import AttentionOptions

# Row blocks are whole tiles of the narrowest q dtype.
_TILE_ROWS = 16
# A 128-row block of 4 query heads for each KV head does 512 FLOP for each byte of bfloat16 keys and values: more than
# any chip has FLOP/s for a byte/s of HBM.
_BLOCK_ROWS = 128
_STEP_ROWS = 512
# Half of what a prefill step takes at once, and more. Longer ones would keep short sequences waiting.
_BLOCK_KEYS = 256, 512, 1024
# Keys of one register of scores.
_LEAST_KEYS = 128
# What decode needs for each block beside its keys: the scalar core to work out and start a fetch and to find the block
# again, the vector units to begin. 400 to 600 cycles.
_BLOCK_SECONDS = 0.33e-6
# Slots of the ring: those that the other sizes leave room for, so that the pages of decode rows come in while a prefill
# tile computes.
_NUM_SLOTS, _MOST_SLOTS = 8, 24
_GROUP_ITEMS = 4
_ROW_BATCHES = 16
# VMEM that is the compiler's own, for values that do not fit into registers.
_SPILLED_BYTES = 5 * 2**20
# The least of each that is of use; halves are whole multiples of it.
_LEAST = {"row_batches": 2, "num_slots": 4, "step_rows": 32, "block_rows": 16, "block_pages": 1, "group_items": 2}


class Blocks(NamedTuple):
    """Those fields of ``KernelConfig`` that are chosen and do not follow from a call."""

    block_rows: int
    block_pages: int
    num_slots: int
    group_items: int
    row_batches: int
    step_rows: int


def choose(
    chip: Chip, num_tokens: int, group: int, page_size: int, token_bytes: int, options: AttentionOptions
) -> Blocks:
    """The blocks that would be best if VMEM had no end.

    Args:
        group: query heads that share a KV head.
        token_bytes: of one token's keys and values in a page.
    """
    block_rows = min(options.num_queries_per_block or _BLOCK_ROWS, num_tokens)
    block_rows = -(-block_rows // _TILE_ROWS) * _TILE_ROWS
    block_keys = _block_keys(chip, token_bytes, options.sliding_window)
    return Blocks(
        block_rows=block_rows,
        block_pages=options.num_kv_pages_per_block or max(1, block_keys // page_size),
        num_slots=_NUM_SLOTS,
        group_items=_GROUP_ITEMS,
        row_batches=_ROW_BATCHES,
        step_rows=min(_STEP_ROWS, block_rows * group),
    )


def fit(config):
    """The ``KernelConfig`` with its blocks halved, those first that cost least, until it fits into VMEM.

    What is left of VMEM gets more slots.
    """
    given = {"block_rows": config.options.num_queries_per_block, "block_pages": config.options.num_kv_pages_per_block}
    while not _fits(config):
        too_big = [name for name, least in _LEAST.items() if not given.get(name) and getattr(config, name) > least]
        if not too_big:
            break
        name = max(too_big, key=lambda name: getattr(config, name) / _LEAST[name])
        config = replace(config, **{name: _half(getattr(config, name), _LEAST[name])})
    # Keys and values that are widened without being taken apart spill more than ``vmem_bytes`` knows.
    most = _MOST_SLOTS if config.splits_kv or not config.widens else _NUM_SLOTS
    while config.num_slots < most and _fits(more := replace(config, num_slots=config.num_slots + 1)):
        config = more
    return config


def _half(count: int, least: int) -> int:
    return max(1, count // 2 // least) * least


def _fits(config) -> bool:
    return config.vmem_bytes <= config.vmem_limit_bytes - _SPILLED_BYTES


def _block_keys(chip: Chip, token_bytes: int, window: int | None) -> int:
    outlasting = (keys for keys in _BLOCK_KEYS if keys * token_bytes > _BLOCK_SECONDS * chip.hbm_bytes_per_s)
    keys = next(outlasting, _BLOCK_KEYS[-1])
    return keys if window is None else min(keys, max(_LEAST_KEYS, 1 << window.bit_length() - 1))
