"""Will my model fit, and how fast will it be? What libtpu makes of a model's attention, on a machine without a TPU.

    python -m torch_rpa.aot --chip v6e --model llama-3-8b
    python -m torch_rpa.aot --chip v5e --model path/to/folder --num-chips 4 --kv-dtype float8_e4m3fn
    python -m torch_rpa.aot --chip v6e --heads 32/8/128 --layers 32 --json

A model is a folder with a config.json, such a file, or a name in torch_rpa.workloads.MODELS; no weights are read.
Exits with 0 if everything fits and compiles, the op without a copy and a whole model without one of weights or cache,
otherwise with 1.
"""

import argparse
import os
import sys

from torch_rpa import chips, workloads
from torch_rpa.aot import models
from torch_rpa.aot.plan import DEFAULT_CONTEXT, KV_DTYPES, Plan
from torch_rpa.extras import from_extra, require
from torch_rpa.validation import PAGE_SIZES


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m torch_rpa.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    nicknames = ", ".join(f"{nickname} is {chip}" for nickname, chip in chips.NICKNAMES.items())
    parser.add_argument("--chip", required=True, type=_chip, help=f"one of {', '.join(chips.CHIPS)}; {nicknames}")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help=f"a folder, a config.json, or one of {', '.join(workloads.MODELS)}")
    model.add_argument("--heads", type=_heads, help="instead of a model: query heads/KV heads/head_dim, as 32/8/128")
    parser.add_argument("--layers", type=_count, default=1, help="with --heads (default: 1)")
    parser.add_argument(
        "--page-size", type=int, choices=PAGE_SIZES, default=128, help="tokens in a page (default: 128)"
    )
    parser.add_argument("--max-tokens", type=_count, default=512, help="rows of a step (default: 512)")
    parser.add_argument("--max-seqs", type=_count, default=64, help="sequences at a time (default: 64)")
    parser.add_argument(
        "--max-context", type=_count, help=f"tokens of a sequence (default: {DEFAULT_CONTEXT}, or the model's limit)"
    )
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="bfloat16", help="of the cache")
    parser.add_argument("--num-chips", type=_count, help="that share the heads (default: 1, or what --model says)")
    parser.add_argument("--tune", action="store_true", help="try other block sizes, too: 8 more compiles at most")
    parser.add_argument("--whole-model", action="store_true", help="compile a step of the whole model: minutes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def plan_of(args: argparse.Namespace) -> Plan:
    """Raises ValueError or NotImplementedError for a model that cannot be read or served."""
    if args.whole_model and args.heads:
        raise ValueError("--whole-model needs --model, not --heads")
    if args.whole_model and args.tune:
        raise ValueError("--tune is about the ops alone: leave out --whole-model")
    model = models.of_name(args.model) if args.model else models.of_heads(args.heads, args.layers)
    known = workloads.MODELS.get(args.model)
    num_chips = args.num_chips or (known.num_chips if known else 1)
    return Plan(
        chip=args.chip,
        model=model,
        page_size=args.page_size,
        max_tokens=args.max_tokens,
        max_seqs=args.max_seqs,
        max_context=args.max_context or min(DEFAULT_CONTEXT, model.longest or DEFAULT_CONTEXT),
        kv_dtype=args.kv_dtype,
        num_chips=num_chips,
    )


def main(argv=None) -> int:
    """The exit code. What takes seconds to import waits until the command line is known to make sense."""
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    args = parse_args(argv)
    try:
        plan = plan_of(args)
        require("jax", "libtpu", *["torch_xla"] * args.whole_model, extra="aot", needed_for="compiling for a TPU")
        with from_extra("aot", "torch_rpa.aot"):
            from torch_rpa.aot import answer, table, tune
    except (ImportError, ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = answer.whole_model_answer(plan) if args.whole_model else answer.answer(plan)
    tried = tune.tune_most_called(found) if args.tune else []
    print(table.as_json(found, tried) if args.json else table.text(found, tried))
    return 1 if found.problems else 0


def _chip(text: str) -> str:
    try:
        return chips.named(text).name
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(chips.CHIPS)}, got {text!r}") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _heads(text: str) -> tuple[int, int, int]:
    numbers = text.split("/")
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"must be query heads/KV heads/head_dim, such as 32/8/128, got {text!r}")
    return tuple(_count(number) for number in numbers)


if __name__ == "__main__":
    sys.exit(main())
