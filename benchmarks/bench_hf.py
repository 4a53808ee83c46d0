"""The same prompts through the patched model and through plain `model.generate`, on XLA and on the CPU.

    python -m benchmarks.bench_hf [--max-new-tokens 32] [--time-limit 180]

SmolLM2-135M-Instruct answers 8 prompts of different lengths, greedily, with no stop token, so that every way writes
the same number of tokens. Each way runs in a process of its own, which is stopped after the time limit: plain
generate on an XLA device compiles for each new length and would go on for a long time.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from torch_rpa.demo import FIRST_QUESTIONS, SECOND_QUESTIONS, compilations

NUM_PROMPTS = 8
MARK = "measured: "


@dataclass
class Measurement:
    """One line of the table; seconds include compiling."""

    name: str
    device: str
    num_tokens: int = 0
    seconds: float = 0.0
    compilations: int = 0
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--time-limit", type=float, default=180.0, help="seconds for each way (default: 180)")
    parser.add_argument("--only", choices=WAYS, help="measure one way in this process")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.only:
        WAYS[args.only](args.max_new_tokens, args.time_limit)
        return
    print(
        f"{NUM_PROMPTS} prompts x {args.max_new_tokens} tokens, SmolLM2-135M-Instruct, float32, {os.cpu_count()} cores"
    )
    print(f"\n{'':40} {'tokens/s':>9} {'seconds':>8} {'compilations':>13}")
    for name in WAYS:
        command = [sys.executable, "-m", "benchmarks.bench_hf", "--only", name]
        command += ["--max-new-tokens", str(args.max_new_tokens), "--time-limit", str(args.time_limit)]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        lines = [line.removeprefix(MARK) for line in process.stdout.splitlines() if line.startswith(MARK)]
        for line in lines:
            _print_row(Measurement(**json.loads(line)))
        if process.returncode:
            print(f"{name:40} failed with exit code {process.returncode}")


def _print_row(row: Measurement) -> None:
    speed = row.num_tokens / row.seconds
    compilations = row.compilations if row.device == "xla" else "-"
    print(f"{row.name:40} {speed:9.1f} {row.seconds:8.1f} {compilations:>13}  {row.note}", flush=True)


def patched(device: str) -> Callable[[int, float], None]:
    """Two batches of the patched model; the second has other prompts, of other lengths."""

    def run(max_new_tokens: int, time_limit: float) -> None:
        from torch_rpa import hf

        model, tokenizer = _load(device)
        hf.patch(model)
        for title, questions in (("first batch", FIRST_QUESTIONS), ("second batch", _second_questions())):
            prompts = _prompts(tokenizer, questions)
            with _Measured(Measurement(f"patched, {device.upper()}, {title}", device), time_limit) as row:
                outputs = model.generate_batch(prompts, max_new_tokens=max_new_tokens)
                row.num_tokens = sum(len(output.generated_tokens) for output in outputs.values())

    return run


def plain(device: str) -> Callable[[int, float], None]:
    """transformers' own generate with eager attention, the prompts padded on the left to one length."""

    def run(max_new_tokens: int, time_limit: float) -> None:
        model, tokenizer = _load(device)
        model.set_attn_implementation("eager")
        prompts = _prompts(tokenizer, FIRST_QUESTIONS)
        padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
        with _Measured(Measurement(f"plain generate, {device.upper()}, padded", device), time_limit) as row:

            def count_tokens(input_ids: torch.Tensor, scores) -> torch.Tensor:
                row.num_tokens = NUM_PROMPTS * (input_ids.shape[1] - padded["input_ids"].shape[1])
                return torch.zeros(NUM_PROMPTS, dtype=torch.bool, device=device)

            model.generate(
                **padded, max_new_tokens=max_new_tokens, do_sample=False, stopping_criteria=[count_tokens]
            ).cpu()

    return run


WAYS = {
    "patched-xla": patched("xla"),
    "patched-cpu": patched("cpu"),
    "plain-cpu": plain("cpu"),
    "plain-xla": plain("xla"),
}


class _Measured:
    """Prints the measurement at the end of the block, or when the time is up and the process is stopped."""

    def __init__(self, row: Measurement, time_limit: float) -> None:
        self.row = row
        self.timer = threading.Timer(time_limit, self._stop)
        self.timer.daemon = True

    def __enter__(self) -> Measurement:
        self.before, _ = compilations(self.row.device)
        self.started = time.perf_counter()
        self.timer.start()
        return self.row

    def __exit__(self, *exception) -> None:
        self.timer.cancel()
        self._print()

    def _stop(self) -> None:
        self.row.note = "stopped at the time limit"
        self._print()
        os._exit(0)

    def _print(self) -> None:
        self.row.seconds = time.perf_counter() - self.started
        self.row.compilations = compilations(self.row.device)[0] - self.before
        print(MARK + json.dumps(asdict(self.row)), flush=True)


def _load(device: str):
    from torch_rpa.hf import smollm2

    model, tokenizer = smollm2.load()
    model.config.eos_token_id = model.generation_config.eos_token_id = None  # every way writes all its tokens
    model.to(device).tie_weights()
    return model, tokenizer


def _prompts(tokenizer, questions: list[str]) -> list[list[int]]:
    messages = [[{"role": "user", "content": question}] for question in questions[:NUM_PROMPTS]]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def _second_questions() -> list[str]:
    return [*SECOND_QUESTIONS, "Say yes.", "Count from one to seven and then back again to one, please."]


if __name__ == "__main__":
    main()
