"""Sixty-four chats through the engine and through transformers, side by side: tokens per second, time to first token.

    python -m benchmarks.bench_hf [--requests 64] [--scale 0.2] [--batch 16] [--only WAY ...]

SmolLM2-135M-Instruct in float32. Prompt and answer lengths are log-normal with the means of ShareGPT that the vLLM
paper gives (161 and 338 tokens), times --scale; all requests are there from the start; greedy, no stop token, so that
every way writes the same number of tokens. Only tokens that were asked for count. Each way has a process of its own;
compiling is done before the clock starts (the engine's warm-up, one short call otherwise), and counted while it runs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch

MEAN_PROMPT, MEAN_ANSWER, SIGMA = 161, 338, 0.8
MAX_TOKENS = 1024
MARK = "measured: "


@dataclass
class Measurement:
    """One line of the table. cpu_seconds: of all threads of the process, which a busy machine does not stretch as it
    does the seconds; first_token_seconds: the median over the requests."""

    way: str
    num_tokens: int
    seconds: float
    cpu_seconds: float
    first_token_seconds: float
    compilations: int | None = None
    host_ms_per_step: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--scale", type=float, default=0.2, help="of ShareGPT's lengths (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="requests in a step (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="default: all of them")
    parser.add_argument("--here", action="store_true", help="measure in this process")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    if args.here:
        for way in args.only:
            print(MARK + json.dumps(asdict(WAYS[way](way, chats(args.requests, args.scale), args.batch))))
        return
    requests = chats(args.requests, args.scale)
    prompts, answers = [sum(lengths) for lengths in zip(*((len(p), n) for p, n in requests), strict=True)]
    print(f"{len(requests)} requests, {prompts} prompt and {answers} answer tokens, {args.batch} at a time", end=", ")
    print(f"SmolLM2-135M, float32, {os.cpu_count()} cores")
    print(
        f"{'':20} {'tokens/s':>9} {'tokens/CPU s':>13} {'first token s':>14} {'compilations':>13} {'host ms/step':>13}"
    )
    for way in args.only:
        _print_row(_in_a_process(way, args))


def chats(num_requests: int, scale: float) -> list[tuple[list[int], int]]:
    """(prompt, number of answer tokens) of each request, the same for the same arguments."""
    rng = np.random.default_rng(0)

    def lengths(mean: float) -> np.ndarray:
        drawn = rng.lognormal(np.log(mean * scale) - SIGMA**2 / 2, SIGMA, num_requests)
        return drawn.round().astype(int).clip(2, MAX_TOKENS // 2 - 1)

    prompts = [rng.integers(100, 40_000, length).tolist() for length in lengths(MEAN_PROMPT)]
    return list(zip(prompts, lengths(MEAN_ANSWER).tolist(), strict=True))


def _in_a_process(way: str, args: argparse.Namespace) -> Measurement:
    command = [sys.executable, "-m", "benchmarks.bench_hf", "--here", "--only", way, "--requests", str(args.requests)]
    command += ["--scale", str(args.scale), "--batch", str(args.batch)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = [line.removeprefix(MARK) for line in process.stdout.splitlines() if line.startswith(MARK)]
    return Measurement(**json.loads(line))


def _print_row(row: Measurement) -> None:
    compilations = "-" if row.compilations is None else row.compilations
    host = "-" if row.host_ms_per_step is None else f"{row.host_ms_per_step:.1f}"
    speed, cpu_speed = row.num_tokens / row.seconds, row.num_tokens / row.cpu_seconds
    first = row.first_token_seconds
    print(f"{row.way:20} {speed:9.1f} {cpu_speed:13.1f} {first:13.2f} {compilations:>13} {host:>13}", flush=True)


def engine(device: str, xla_step: str = "replay") -> Callable:
    def measure(way: str, requests: list, batch: int) -> Measurement:
        from torch_rpa import hf
        from torch_rpa.hf.api.gate import engine_of

        model = _load(device)
        # One request is left, all decode, prompts beside them.
        buckets = (1, batch, 2 * batch, 4 * batch, 8 * batch, 16 * batch) if device == "xla" else None
        num_pages = batch * MAX_TOKENS // 16
        hf.patch(model, max_num_seqs=batch, token_buckets=buckets, num_pages=num_pages, xla_step=xla_step)
        engine = engine_of(model)
        engine.warm_up(progress_bar=False)
        sequences = []
        clock, host_started = Clock(), time.thread_time()
        for index, (prompt, num_tokens) in enumerate(requests):
            sequences.append(engine.add(prompt, request_id=str(index), max_new_tokens=num_tokens))
        for _ in engine.run():
            pass
        spent = clock.spent()
        # While the device computes, this thread waits, and its clock stands still. CPU tensors are computed by itself.
        host_ms = (time.thread_time() - host_started) / engine.num_steps * 1e3
        first = np.median([sequence.timestamps[0] - clock.started for sequence in sequences])
        num_tokens = sum(len(sequence.generated_tokens) for sequence in sequences)
        if device == "cpu":
            return Measurement(way, num_tokens, *spent, first)
        return Measurement(way, num_tokens, *spent, first, engine.stats.compilations_after_warm_up, host_ms)

    return measure


def padded_generate(way: str, requests: list, batch: int) -> Measurement:
    """transformers' generate, a batch after the other, each padded on the left and run to its longest answer."""
    model = _load("cpu")
    model.set_attn_implementation("eager")
    _generate(model, requests[:1], 2, [])
    first_tokens: list[float] = []
    clock = Clock()
    for index in range(0, len(requests), batch):
        rows = requests[index : index + batch]
        times: list[float] = []
        _generate(model, rows, max(num_tokens for _, num_tokens in rows), times)
        first_tokens += [times[0] - clock.started] * len(rows)
    spent = clock.spent()
    return Measurement(way, sum(num_tokens for _, num_tokens in requests), *spent, np.median(first_tokens))


def _generate(model, rows: list, max_new_tokens: int, times: list[float]) -> None:
    longest = max(len(prompt) for prompt, _ in rows)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in rows])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in rows])

    def note_time(input_ids, scores) -> torch.Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(rows), dtype=torch.bool)

    model.generate(
        ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, stopping_criteria=[note_time]
    )


def continuous_batching(way: str, requests: list, batch: int) -> Measurement:
    """transformers' own continuous batching, with as many requests and tokens at a time as the engine has."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _load("cpu")
    model.set_attn_implementation("sdpa")
    config = ContinuousBatchingConfig(
        page_size=16, num_blocks=batch * MAX_TOKENS // 16, max_requests_per_batch=batch, max_batch_tokens=256,
        use_cuda_graph=False, use_async_batching=False,
    )  # fmt: skip
    generation_config = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=8)
    with model.continuous_batching_context_manager(
        generation_config, continuous_batching_config=config, warmup=False
    ) as manager:
        manager.add_request(requests[0][0], max_new_tokens=2)
        while manager.get_result(timeout=1) is None:
            pass
        clock = Clock()
        for prompt, num_tokens in requests:
            manager.add_request(prompt, max_new_tokens=num_tokens, record_timestamps=True)
        outputs = []
        while len(outputs) < len(requests):
            if (output := manager.get_result(timeout=1)) is not None:
                outputs.append(output)
        spent = clock.spent()
    if errors := [output.error for output in outputs if output.error is not None]:
        raise RuntimeError(f"transformers' continuous batching failed: {errors[0]}")
    num_tokens = sum(len(output.generated_tokens) for output in outputs)
    first = np.median([output.timestamps[0] - clock.started for output in outputs])
    return Measurement(way, num_tokens, *spent, first)


class Clock:
    """Starts when it is made."""

    def __init__(self) -> None:
        self.started, self._cpu_started = time.perf_counter(), time.process_time()

    def spent(self) -> tuple[float, float]:
        """Seconds since then, and CPU seconds of this process."""
        return time.perf_counter() - self.started, time.process_time() - self._cpu_started


def _load(device: str):
    from torch_rpa.hf import smollm2

    model, _ = smollm2.load()
    model.config.eos_token_id = model.generation_config.eos_token_id = None  # every way writes all its tokens
    model.generation_config.pad_token_id = 0
    model.to(device).tie_weights()
    return model


WAYS = {
    "engine-cpu": engine("cpu"),
    "padded-generate-cpu": padded_generate,
    "transformers-cb-cpu": continuous_batching,
    "engine-xla": engine("xla"),
    "engine-xla-lazy": engine("xla", "lazy"),
    "engine-xla-openxla": engine("xla", "openxla"),
}


if __name__ == "__main__":
    main()
