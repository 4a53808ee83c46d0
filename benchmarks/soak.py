"""Serve thousands of random requests from several threads, with faults among them: nothing is lost, wrong or compiled.

    python -m benchmarks.soak [--requests 5000] [--device xla] [--clients 8] [--output FILE]

A tiny random Llama behind the manager, warmed up, with so few pages that requests are preempted. Each request is one
of a few hundred: random lengths, prompts with common beginnings, greedy or sampled with random parameters. All requests
of one kind must be answered alike, whatever else happens: clients cancel, go away, leave streams unread, raise in
callbacks, bring tokenizers that raise, and ask for what is refused; forwards raise; the model is put into train mode;
other programs run on the device. Then, in processes of their own, the same with a cache of programs that is too small,
and leaving in the middle.

The exit code is 1 if a request was lost or answered otherwise, failed for another reason than its own fault or that of
its step, if a page was lost, memory grew, or anything was compiled after the warm-up.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from torch_rpa import hf

VOCAB_SIZE = 512
NUM_KINDS = 300
SETTINGS = {"page_size": 8, "num_pages": 60, "max_num_seqs": 8, "token_buckets": (8, 64)}
SMALL_PROGRAM_CACHE = "4"  # of the five programs that there are
MAX_GROWTH_MIB = 32  # of resident memory (`Memory`)
# Forwards raise in the first part of the time, other programs run in the second, and both happen in the last.
FIRST, SECOND, LAST = (0.0, 0.4), (0.5, 0.9), (0.9, 1.0)
WAIT = 300.0  # seconds after which an answer counts as lost


@dataclass
class Counts:
    """What the clients saw.

    different    answers unlike the first one to the same request
    failed       with the error of a forward that was made to raise
    broken       with any other error that was not the request's own fault
    """

    answered: int = 0
    cancelled: int = 0
    refused: int = 0
    own_fault: int = 0
    unread: int = 0
    failed: int = 0
    broken: int = 0
    lost: int = 0
    different: int = 0
    tokens: int = 0
    answers: dict = field(default_factory=dict, repr=False)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, name: str, bar: tqdm) -> None:
        with self.lock:
            setattr(self, name, getattr(self, name) + 1)
            bar.update()


class Fault(Exception):
    """Put in on purpose."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--device", choices=["xla", "cpu"], default="xla", help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=8, help="threads that ask (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the report there, too")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    logging.getLogger("torch_rpa").setLevel(logging.CRITICAL)  # it says what fails, which is on purpose here
    if args.part:
        return PARTS[args.part](args)
    started = time.perf_counter()
    report, problems = soak(args.device, args.requests, args.clients)
    problems += [problem for part in PARTS for problem in in_a_process(part, args)]
    lines = [f"{args.requests} requests from {args.clients} threads on {args.device}, "
             f"{time.perf_counter() - started:.0f} s"]  # fmt: skip
    for name, value in report.items():
        lines.append(f"{name:28} {value:10.3f}" if isinstance(value, float) else f"{name:28} {value!s:>10}")
    lines += problems or ["nothing lost, nothing wrong, nothing compiled"]
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
    return 1 if problems else 0


# ---- The service ----------------------------------------------------------------------------------------------------


def soak(device: str, num_requests: int, num_clients: int, *, disturbed: bool = True) -> tuple[dict, list[str]]:
    """Run it: the counters by name, and what went wrong."""
    model = hf.patch(tiny_model().to(device), **SETTINGS)
    counts, todo, memory = Counts(), iter(range(num_requests)), Memory()
    with model.continuous_batching_context_manager() as manager, tqdm(total=num_requests, unit="request") as bar:
        clients = [
            threading.Thread(target=client, args=(manager, random.Random(seed), todo, counts, bar))
            for seed in range(num_clients)
        ]

        def done() -> float:
            return bar.n / num_requests

        with disturbances(model, device, done) if disturbed else contextlib.nullcontext():
            for thread in clients:
                thread.start()
            while any(thread.is_alive() for thread in clients):
                memory.look(done())
                time.sleep(0.1)
        stats = manager.stats
    counted = {name: value for name, value in vars(counts).items() if isinstance(value, int)}
    report = {**counted, **asdict(stats), "memory_growth_mib": memory.growth_mib}
    return report, problems_of(counts, stats, num_requests, memory)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, eos_token_id=None, pad_token_id=None,
        attention_dropout=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Memory:
    """Resident memory of this process in two parts of the time, each once its kind of trouble has begun.

    Where both kinds come together, in the last part, it is not looked at: half of a trace that another thread's sync
    runs is a program, too, and PyTorch/XLA keeps it.
    """

    PARTS = (0.2, FIRST[1]), (0.6, SECOND[1])

    def __init__(self) -> None:
        self._seen: dict[tuple, list[float]] = {part: [] for part in self.PARTS}

    def look(self, done: float) -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        for (begin, end), seen in self._seen.items():
            if begin <= done < end:
                seen.append(resident)

    @property
    def growth_mib(self) -> float:
        """In the part where it grew most."""
        return max((seen[-1] - seen[0] for seen in self._seen.values() if seen), default=0.0)


@contextlib.contextmanager
def disturbances(model, device: str, done: Callable[[], float]):
    """What others do to the model and to the device while it serves, each in its part of the time (`done`)."""
    ends = threading.Event()

    def disturb(work: Callable, pause: float, part: tuple[float, float]) -> None:
        while not ends.wait(pause):
            if part[0] <= done() < part[1]:
                work(model, ends)

    works = [(training_mode, 0.2, (0.0, 1.0)), (raising_forward, 3.0, FIRST), (raising_forward, 3.0, LAST)]
    if device == "xla":
        works += [(other_program, 0.01, SECOND), (other_program, 0.01, LAST)]
    threads = [threading.Thread(target=disturb, args=work) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join()


def raising_forward(model, ends: threading.Event) -> None:
    """A hook that raises once; on an XLA device its coming and its going change the program."""
    left = [Fault("a forward")]

    def hook(*_):
        if left:
            raise left.pop()

    handle = model.register_forward_hook(hook)
    ends.wait(0.5)
    handle.remove()


def training_mode(model, ends: threading.Event) -> None:
    model.train(not model.training)


def other_program(model, ends: threading.Event) -> None:
    """One of forty, with all that is pending in the process."""
    import torch_xla

    size = random.randint(1, 40)
    (torch.ones(size, device="xla") * size).sum()
    torch_xla.sync()


# ---- Clients --------------------------------------------------------------------------------------------------------


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
    """Ask one request after the other, with a few under way at a time; some of them go wrong on purpose."""
    under_way: list[tuple[int, str]] = []
    for _ in todo:
        kind = rng.randrange(NUM_KINDS)
        if rng.random() < 0.15:
            counts.add(rng.choice(FAULTS)(manager, rng, kind), bar)
            continue
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
    """Read an answer to its end, and say how it ended."""
    deadline = time.monotonic() + WAIT
    output = manager.get_result(request_id, timeout=WAIT)
    while output is not None and not output.is_finished():
        output = manager.get_result(request_id, timeout=deadline - time.monotonic())
    if output is None:
        counts.add("lost", bar)
    elif output.error is not None:
        kinds = {"cancelled": "cancelled", "Fault: a forward": "failed"}
        counts.add(kinds.get(output.error, "broken"), bar)
        if output.error not in kinds:
            bar.write(f"request {request_id}: {output.error}")
    else:
        counts.add("answered", bar)
        with counts.lock:
            counts.tokens += len(output.generated_tokens)
            counts.different += counts.answers.setdefault(kind, output.generated_tokens) != output.generated_tokens


def unread_stream(manager, rng: random.Random, kind: int) -> str:
    """A client that goes away, and says so."""
    request_id = manager.add_request(**request_of(kind), streaming=True)
    time.sleep(rng.random() * 0.05)
    manager.cancel_request(request_id)
    return "unread"


def closed_event_loop(manager, rng: random.Random, kind: int) -> str:
    """A client whose event loop is closed before its answer comes."""

    async def ask() -> None:
        request_id = manager.add_request(**request_of(kind), streaming=True)
        manager.register_result_handler(request_id, lambda output: None)

    asyncio.run(ask())
    return "unread"


def raising_callback(manager, rng: random.Random, kind: int) -> str:
    async def ask() -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.set_exception_handler(lambda loop, context: ended.set())

        def handle(output):
            raise Fault("a callback")

        manager.register_result_handler(f"callback {id(ended)}", handle)
        manager.add_request(**request_of(kind), request_id=f"callback {id(ended)}")
        await asyncio.wait_for(ended.wait(), WAIT)

    asyncio.run(ask())
    return "own_fault"


def raising_tokenizer(manager, rng: random.Random, kind: int) -> str:
    def decode(ids):
        raise Fault("a tokenizer")

    request_id = manager.add_request(
        request_of(kind)["input_ids"], max_new_tokens=9, stop_strings=["x"], tokenizer=SimpleNamespace(decode=decode)
    )
    error = manager.get_result(request_id, timeout=WAIT).error
    return "own_fault" if error in ("Fault: a tokenizer", "Fault: a forward") else "broken"


def refused_request(manager, rng: random.Random, kind: int) -> str:
    wrong = rng.choice([{"min_new_tokens": "3"}, {"input_ids": []}, {"max_new_tokens": 10**6}, {"temprature": 1}])
    try:
        manager.add_request(**{**request_of(kind), **wrong})
    except (TypeError, ValueError):
        return "refused"
    return "broken"


FAULTS = [unread_stream, closed_event_loop, raising_callback, raising_tokenizer, refused_request]


# ---- Parts with a process of their own ------------------------------------------------------------------------------


def in_a_process(part: str, args: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.soak", "--part", part, "--device", args.device]
    environment = {**os.environ, "XLA_COMPILATION_CACHE_SIZE": SMALL_PROGRAM_CACHE}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return [] if process.returncode == EXPECTED[part] else [f"{part}: exit code {process.returncode}\n{process.stderr}"]


def evicted_programs(args: argparse.Namespace) -> int:
    """A hundred requests while PyTorch/XLA keeps too few programs: made again, and all right."""
    _, problems = soak(args.device, 100, 4, disturbed=False)
    problems = [problem for problem in problems if "compiled" not in problem]
    print("\n".join(problems), file=sys.stderr)
    return EXPECTED["evicted programs"] if not problems else 1


def leaving_early(args: argparse.Namespace) -> int:
    """The process ends while requests run."""
    manager = hf.patch(tiny_model().to(args.device), **SETTINGS).init_continuous_batching()
    manager.start()
    manager.add_requests([[1, 2, 3]] * 20, max_new_tokens=200)
    while manager.stats.num_steps < 5:
        time.sleep(0.001)
    return EXPECTED["leaving early"]


PARTS = {"evicted programs": evicted_programs, "leaving early": leaving_early}
EXPECTED = {"evicted programs": 0, "leaving early": 3}


def problems_of(counts: Counts, stats, num_requests: int, memory: Memory) -> list[str]:
    ended = (counts.answered, counts.cancelled, counts.failed, counts.refused, counts.own_fault, counts.unread)
    checks = {
        "requests were lost": counts.lost + abs(num_requests - sum(ended) - counts.lost - counts.broken),
        "requests failed through the fault of others": counts.broken,
        "answers differ from the first one to the same request": counts.different,
        "pages are missing": stats.num_pages - stats.num_free_pages,
        "programs were compiled after the warm-up": stats.compilations_after_warm_up,
        f"MiB of memory more than {MAX_GROWTH_MIB} were taken": max(0, round(memory.growth_mib) - MAX_GROWTH_MIB),
    }
    return [f"{number} {what}" for what, number in checks.items() if number]


if __name__ == "__main__":
    sys.exit(main())
