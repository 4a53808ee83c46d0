"""Ask a real language model several questions at once, on the XLA device: `python -m torch_rpa.demo`.

SmolLM2-135M-Instruct answers two batches of questions of different lengths. Every step is one launch over all
sequences, prompts and half-written answers alike; the second batch shows that new lengths compile nothing.
"""

import argparse
import logging
import os
import sys
import textwrap
import time

from torch_rpa.extras import from_extra

with from_extra("demo", "torch_rpa.demo"):
    from tqdm import tqdm

FIRST_QUESTIONS = [
    "What is the capital of France?",
    "Name three things that are made of copper.",
    "Why is the sky blue? Answer in one sentence.",
    "Translate into Spanish: Good morning, how are you?",
    "My sister has two cats and a dog, and her neighbour has three parrots. What would be a good name for a club "
    "that all of these animals could join?",
    "Write one sentence about the sea.",
    "I have flour, eggs, milk, sugar and a little butter at home, but no oven, only a stove and a pan. It is Sunday "
    "morning and four hungry friends are about to arrive. What should I cook for them?",
    "Hello!",
]
SECOND_QUESTIONS = [
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
    "Give me a short tip for someone who learns to play the guitar and whose fingers hurt after ten minutes.",
    "Name the largest planet of the solar system and say one thing about it that most people do not know.",
    "Is water wet?",
    "Please write a friendly reply to this message from a colleague: Hi, I am sorry, but I cannot come to the meeting "
    "tomorrow because my train was cancelled. Could you tell me afterwards what you have decided?",
]
# Two programs serve any batch: one for steps with a prompt in them, one for steps that only decode.
TOKEN_BUCKETS = (8, 128)
MAX_NEW_TOKENS = 512


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, load the model, answer two batches. Gives the exit code."""
    args = _parse(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is local: nothing may wait for a network
    loaded = _load(args.device)
    if loaded is None:
        return 1
    model, tokenizer = loaded
    model.to(args.device).tie_weights()  # moving to an XLA device takes tied weights apart
    print(f"Running on {_describe(args.device)}. Ctrl-C stops.")
    if args.device == "xla":
        print(
            f"At first XLA compiles a program for each of {len(TOKEN_BUCKETS)} step sizes: about half a minute in all."
        )
    print()
    _patch_and_answer(model, tokenizer, args)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torch_rpa.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", action="append", help="a question of your own; may be given several times")
    parser.add_argument("--device", choices=["xla", "cpu"], default="xla", help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)")
    args = parser.parse_args(argv)
    if not 1 <= args.max_new_tokens <= MAX_NEW_TOKENS:
        parser.error(f"--max-new-tokens {args.max_new_tokens}: a number from 1 to {MAX_NEW_TOKENS} is needed")
    return args


def _load(device: str):
    """The model and its tokenizer, or None after saying what is missing."""
    try:
        smollm2 = _quiet_imports(device)
    except ModuleNotFoundError as error:  # of an extra's package
        print(error, file=sys.stderr)
        return None
    try:
        if not smollm2.is_converted():
            print("Reading SmolLM2-135M-Instruct from its package; this takes about a minute, once.")
        return smollm2.load()
    except smollm2.ModelPackageMissing as error:
        print(error, file=sys.stderr)
        return None


def _quiet_imports(device: str):
    from torch_rpa import bridges

    # torch_xla picks a TPU if there is one and the CPU otherwise, and warns about either; it comes with
    # transformers' accelerate even if it is not asked for. We print the device ourselves.
    logging.disable(logging.WARNING)
    try:
        if device == "xla":
            bridges.of("xla")
        from torch_rpa.hf import smollm2
    finally:
        logging.disable(logging.NOTSET)
    return smollm2


def _describe(device: str) -> str:
    if device == "cpu":
        return "CPU tensors"
    import torch_xla
    import torch_xla.runtime

    return f"XLA device {torch_xla.device()} (PJRT {torch_xla.runtime.device_type()})"


def _patch_and_answer(model, tokenizer, args: argparse.Namespace) -> None:
    from torch_rpa import hf
    from torch_rpa.hf.api.gate import engine_of

    hf.patch(model, token_buckets=TOKEN_BUCKETS)
    engine = engine_of(model)
    for title, questions in (
        ("First batch", args.prompt or FIRST_QUESTIONS),
        ("Second batch, other lengths", SECOND_QUESTIONS),
    ):
        prompts = [_chat_prompt(tokenizer, question) for question in questions]
        lengths = sorted(map(len, prompts))
        print(f"{title}: {len(prompts)} questions of {lengths[0]} to {lengths[-1]} tokens")
        count_before, seconds_before = compilations(args.device)
        started = time.perf_counter()
        num_tokens = answer(engine, tokenizer, questions, prompts, args.max_new_tokens)
        seconds = time.perf_counter() - started
        count, compile_seconds = compilations(args.device)
        _report(num_tokens, seconds, count - count_before, compile_seconds - seconds_before, args.device)


def _chat_prompt(tokenizer, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


def answer(engine, tokenizer, questions: list[str], prompts: list[list[int]], max_new_tokens: int) -> int:
    """Run one batch to its end, printing each answer as soon as it is complete. Gives the tokens generated."""
    for index, prompt in enumerate(prompts):
        engine.add(
            prompt,
            request_id=str(index),
            max_new_tokens=max_new_tokens,
            stop_token_ids=frozenset([tokenizer.eos_token_id]),
        )
    num_tokens = num_finished = 0
    with _progress_bar() as bar:
        for event in engine.run():
            num_tokens += 1
            num_finished += event.is_finished
            bar.set_description_str(f"  {num_finished} of {len(prompts)} answered, ", refresh=False)
            bar.update(1)
            if event.is_finished:
                text = tokenizer.decode(event.sequence.generated_tokens, skip_special_tokens=True).strip()
                cut = "" if event.token == tokenizer.eos_token_id else " ..."
                tqdm.write(_indented(questions[int(event.sequence.request_id)], text + cut), file=sys.stdout)
    return num_tokens


def _progress_bar() -> tqdm:
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file needs no animation
    return tqdm(
        desc="  reading the prompts, ",
        bar_format="{desc}{n_fmt} tokens, {elapsed}",
        mininterval=interval,
        leave=False,
    )


def _indented(question: str, answer_text: str) -> str:
    paragraphs = [("\n  Q: ", question)]
    for index, line in enumerate(answer_text.split("\n")):
        paragraphs.append(("     " if index else "  A: ", line))
    return "\n".join(
        textwrap.fill(text, width=100, initial_indent=indent, subsequent_indent="     ") for indent, text in paragraphs
    )


def compilations(device: str) -> tuple[int, float]:
    """What XLA has compiled so far: programs, and seconds. Nothing for CPU tensors, which need no torch_xla."""
    if device == "cpu":
        return 0, 0.0
    from torch_rpa import bridges

    return bridges.of("xla").compilations()


def _report(num_tokens: int, seconds: float, compiled: int, compile_seconds: float, device: str) -> None:
    running = seconds - compile_seconds
    print(f"\n  {num_tokens} tokens in {running:.1f} s, {num_tokens / running:.1f} tokens per second", end="")
    if device == "cpu":
        print("\n")
    elif compiled:
        print(f", after {compiled} XLA compilations in {compile_seconds:.1f} s\n")
    else:
        print("; 0 XLA compilations\n")


if __name__ == "__main__":
    sys.exit(main())
