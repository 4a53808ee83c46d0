"""Serve thousands of random requests from several threads, and see that nothing is compiled, lost or wrong.

    python -m benchmarks.soak [--requests 5000] [--device xla] [--clients 8]

A tiny random Llama behind the manager, warmed up, with so few pages that requests are preempted. Each request is one of
a few hundred: random lengths, prompts with common beginnings, greedy or sampled with random parameters. Some are
cancelled on their way, some stream. All requests of one kind must be answered alike, whatever else is in the batch. The
exit code is 1 if a request was lost or answered otherwise, a page was lost, or anything was compiled after the warm-up.
"""

import argparse
import os
import random
import sys
import threading
import time
from dataclasses import asdict, dataclass, field

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from torch_rpa import hf

VOCAB_SIZE = 512
NUM_KINDS = 300
SETTINGS = {"page_size": 8, "num_pages": 60, "max_num_seqs": 8, "token_buckets": (8, 64)}


@dataclass
class Counts:
    """What the clients saw. `different`: answers unlike the first one to the same request."""

    answered: int = 0
    cancelled: int = 0
    failed: int = 0
    lost: int = 0
    different: int = 0
    tokens: int = 0
    answers: dict = field(default_factory=dict, repr=False)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--device", choices=["xla", "cpu"], default="xla", help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=8, help="threads that ask (default: %(default)s)")
    args = parser.parse_args()
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    started = time.perf_counter()
    report, problems = soak(args.device, args.requests, args.clients)
    print(f"{args.requests} requests from {args.clients} threads on {args.device}", end=", ")
    print(f"{time.perf_counter() - started:.0f} s")
    for name, value in report.items():
        print(f"{name:28} {value:10.3f}" if isinstance(value, float) else f"{name:28} {value:>10}")
    print("\n".join(problems) or "nothing lost, nothing wrong, nothing compiled")
    return 1 if problems else 0


def soak(device: str, num_requests: int, num_clients: int) -> tuple[dict, list[str]]:
    """Run it: the counters by name, and what went wrong."""
    model = hf.patch(tiny_model().to(device), **SETTINGS)
    counts, todo = Counts(), iter(range(num_requests))
    with model.continuous_batching_context_manager() as manager, tqdm(total=num_requests, unit="request") as bar:
        clients = [
            threading.Thread(target=client, args=(manager, random.Random(seed), todo, counts, bar))
            for seed in range(num_clients)
        ]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        stats = manager.stats
    counted = {name: value for name, value in vars(counts).items() if isinstance(value, int)}
    return {**counted, **asdict(stats)}, problems_of(counts, stats, num_requests)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def request_of(kind: int) -> dict:
    """The keywords of add_request for one kind of request."""
    rng = random.Random(kind)
    common = [random.Random(kind % 5).randrange(VOCAB_SIZE) for _ in range(40)]
    prompt = common[: rng.choice([0, 0, 16, 40])] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 60))]
    request = {"input_ids": prompt, "max_new_tokens": rng.randint(1, 60)}
    if rng.random() < 0.3:
        request["eos_token_id"] = [rng.randrange(VOCAB_SIZE) for _ in range(20)]
        request["min_new_tokens"] = rng.randint(0, 10)
    if rng.random() < 0.2:
        request["repetition_penalty"] = rng.uniform(1.0, 1.5)
    if rng.random() < 0.4:
        sampling = {"temperature": rng.uniform(0.2, 2.0), "top_k": rng.choice([0, 1, 50]), "top_p": rng.uniform(0.3, 1)}
        request.update(sampling, do_sample=True, seed=kind)
    return request


def client(manager, rng: random.Random, todo, counts: Counts, bar: tqdm) -> None:
    """Ask one request after the other, with a few under way at a time."""
    under_way: list[tuple[int, str]] = []
    for _ in todo:
        kind = rng.randrange(NUM_KINDS)
        request_id = manager.add_request(**request_of(kind), streaming=rng.random() < 0.2)
        if rng.random() < 0.1:
            time.sleep(rng.random() * 0.02)
            manager.cancel_request(request_id)
        under_way.append((kind, request_id))
        if len(under_way) > 3:
            take(manager, *under_way.pop(0), counts, bar)
    for one in under_way:
        take(manager, *one, counts, bar)


def take(manager, kind: int, request_id: str, counts: Counts, bar: tqdm) -> None:
    output = None
    for output in manager.request_id_iter(request_id):  # noqa: B007  the last one counts
        pass
    with counts.lock:
        bar.update()
        if output is None or not output.is_finished():
            counts.lost += 1
        elif output.error == "cancelled":
            counts.cancelled += 1
        elif output.error is not None:
            counts.failed += 1
        else:
            counts.answered += 1
            counts.tokens += len(output.generated_tokens)
            counts.different += counts.answers.setdefault(kind, output.generated_tokens) != output.generated_tokens


def problems_of(counts: Counts, stats, num_requests: int) -> list[str]:
    checks = {
        "requests were lost": counts.lost + abs(num_requests - counts.answered - counts.cancelled - counts.failed),
        "requests failed": counts.failed,
        "answers differ from the first one to the same request": counts.different,
        "pages are missing": stats.num_pages - stats.num_free_pages,
        "programs were compiled after the warm-up": stats.compilations_after_warm_up,
    }
    return [f"{number} {what}" for what, number in checks.items() if number]


if __name__ == "__main__":
    sys.exit(main())
