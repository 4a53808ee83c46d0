"""What an 8-bit cache costs: the perplexity of SmolLM2-135M-Instruct on real text, for each dtype of the cache.

    python -m benchmarks.bench_perplexity [--tokens 8192] [--window 512]

The text is the Python language reference, as the standard library carries it for `help()` (pydoc_data.topics). Each
window is read from its first token, a chunk at a time, as the engine prefills; every key and value is written to the
pages in the cache's dtype and read back from there. The first line of each model dtype is plain transformers, without
pages.
"""

import argparse
import math
import os
from pydoc_data.topics import topics

import torch
from tqdm import tqdm

from torch_rpa import hf
from torch_rpa.hf.engine.batch import BatchLayout
from torch_rpa.hf.engine.page_allocator import pages_for
from torch_rpa.hf.engine.scheduler import Chunk
from torch_rpa.hf.engine.sequence import Sequence
from torch_rpa.hf.model.cache import PagedKVCache

PAGE_SIZE = 16
CHUNK_TOKENS = 128
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--window", type=int, default=512, help="tokens that see each other (default: %(default)s)")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from torch_rpa.hf import smollm2

    model, tokenizer = smollm2.load()
    windows = text_windows(tokenizer, args.tokens, args.window)
    print(f"{len(windows)} windows of {args.window} tokens of pydoc_data.topics")
    print(f"{'model':10} {'cache':16} {'perplexity':>11}")
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        plain = perplexity(plain_losses(model, windows), len(windows))
        print(f"{_name(dtype):10} {'none, plain':16} {plain:11.4f}")
        for kv_dtype in (dtype, *FP8):
            hf.patch(model, page_size=PAGE_SIZE, kv_dtype=kv_dtype)
            paged = perplexity(paged_losses(model, windows, kv_dtype), len(windows))
            hf.unpatch(model)
            print(f"{_name(dtype):10} {_name(kv_dtype):16} {paged:11.4f} {paged / plain - 1:+9.3%}", flush=True)


def text_windows(tokenizer, num_tokens: int, window: int) -> list[list[int]]:
    ids = tokenizer("\n".join(topics[name] for name in sorted(topics)))["input_ids"][:num_tokens]
    return [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]


def perplexity(losses, num_windows: int) -> float:
    """exp of the mean loss; losses: one [tokens] for each window."""
    values = torch.cat(list(tqdm(losses, total=num_windows, leave=False, unit="window")))
    return math.exp(values.double().mean())


@torch.no_grad()
def plain_losses(model, windows: list[list[int]]):
    for window in windows:
        ids = torch.tensor([window])
        yield _losses(model(ids, use_cache=False).logits[0], window, 0)


@torch.no_grad()
def paged_losses(model, windows: list[list[int]], kv_dtype: torch.dtype):
    pages_per_seq = pages_for(len(windows[0]), PAGE_SIZE)
    cache = PagedKVCache(model, pages_per_seq, PAGE_SIZE, kv_dtype)
    layout = BatchLayout(CHUNK_TOKENS, 1, pages_per_seq)
    for window in windows:
        sequence = Sequence("", window, 1, pages=list(range(pages_per_seq)))
        losses = []
        for start in range(0, len(window), CHUNK_TOKENS):
            chunk = Chunk(sequence, start, min(CHUNK_TOKENS, len(window) - start))
            step = layout.unpack(torch.from_numpy(layout.pack([chunk])), cache)
            logits = model(
                step.input_ids, position_ids=step.position_ids, use_cache=False, rpa_batch=step.rpa_batch
            ).logits
            losses.append(_losses(logits[0, : chunk.num_tokens], window, start))
        yield torch.cat(losses)


def _losses(logits: torch.Tensor, window: list[int], start: int) -> torch.Tensor:
    """-log p of each token after those at `start` and on; the window's last row predicts nothing."""
    targets = torch.tensor(window[start + 1 : start + 1 + len(logits)])
    return torch.nn.functional.cross_entropy(logits[: len(targets)].float(), targets, reduction="none")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
