"""The command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .layer import DTYPES
from .peers import DEFAULT, MODULES
from .peers.packings import FORMATS
from .peers.quantised import contestants_of
from .registry import SHAPES, Shape, find_shape
from .routing import ROUTINGS

RESULTS = Path(__file__).parent / "results"


def _listed(parse: Callable[[str], object]) -> Callable[[str], list]:
    """A comma-separated list, without repetitions."""

    def parse_list(text: str) -> list:
        items = [item.strip() for item in text.split(",") if item.strip()]
        if not items:
            raise argparse.ArgumentTypeError("at least one value is needed")
        return list(dict.fromkeys(parse(item) for item in items))

    return parse_list


def _one_of(names) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {text!r}: one of {', '.join(names)}")
        return text

    return parse


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number greater than 0")
    return value


def _shapes(text: str) -> list[Shape]:
    if text == "all":
        return list(SHAPES.values())

    def parse(name: str) -> Shape:
        try:
            return find_shape(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    # By name: two shapes may be equal as values only by accident.
    return list({shape.name: shape for shape in map(parse, _listed(str)(text))}.values())


def _format(text: str) -> str:
    if text == "all":
        return text
    return _one_of(FORMATS)(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        usage="%(prog)s [options]",
        description="Times one mixture-of-experts layer with LoRA, forward and backward, beside other "
        "implementations and beside what this machine can do at most. Lists are comma-separated.",
    )
    add = parser.add_argument
    what = parser.add_argument_group("what is timed").add_argument
    what("--shape", type=_shapes, default="qwen3-30b-a3b", metavar="NAMES",
         help=f"{', '.join(SHAPES)}, all, or local directories with a config.json")  # fmt: skip
    what("--tokens", type=_listed(_count), metavar="T", help="default 2048,256,32; 512,4096,16384 with cuda")
    what("--rank", type=_listed(_count), default="16", metavar="R", help="LoRA ranks")
    what("--dtype", type=_one_of(DTYPES), default="bf16", help=", ".join(DTYPES))
    what("--lora-dtype", type=_one_of(DTYPES), help="of A and B; that of the weights unless given")
    what("--routing", type=_listed(_one_of(ROUTINGS)), default="random", metavar="KINDS",
         help=f"{', '.join(ROUTINGS)}: several are interleaved and compared at equal FLOPs")  # fmt: skip
    what("--contestants", type=_listed(_one_of(MODULES)), metavar="NAMES",
         help=f"{', '.join(MODULES)}; with --format ours alone unless given; those that cannot run here are "
         "left out, with the reason")  # fmt: skip
    what("--format", type=_listed(_format), metavar="NAMES",
         help="packed weights beside the dense ones: ours-NAME, what bitsandbytes and kt-kernel have of it, "
         "and bytes and errors of each; "
         f"{', '.join(FORMATS)}, or all")  # fmt: skip
    what("--batch-invariant", action="store_true",
         help="ours also with torch_moelora.set_batch_invariant(True), as ours-batch-invariant")  # fmt: skip
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--layer", action="store_true", help="the whole layer only")
    part.add_argument("--operators", action="store_true", help="the single operators only")
    how = parser.add_argument_group("how").add_argument
    how("--device", choices=("cpu", "cuda"), default="cpu")
    how("--threads", type=_count, help="default: torch's")
    how("--repeats", type=_count, default=7)
    how("--warmups", type=_count, default=2)
    how("--seed", type=int, default=0)
    how("--rate", type=_positive, metavar="GF/s", help="use this as the machine's peak, do not measure it")
    how("--bandwidth", type=_positive, metavar="GB/s", help="use this as the machine's bandwidth")
    how("--limit", type=_positive, default=120.0, metavar="S",
         help="seconds that a contestant may take to load a layer, and for one step, in the process where it "
         "is tried out; beyond that it is not timed (default 120; CPU)")  # fmt: skip
    how("--fresh-memory", action="store_true",
         help="let malloc give freed memory back to the system, as it does by default")  # fmt: skip
    how("--no-memory", action="store_true", help="do not measure peak memory")
    add("--output", type=Path, default=RESULTS, metavar="DIR", help="where JSON and PNG are written")
    add("--no-save", action="store_true", help="write neither")
    add("--json", action="store_true", help="print the JSON on stdout; tables then go to stderr")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Exits with status 2 and one clear line on a mistake."""
    parser = make_parser()
    options = parser.parse_args(argv)
    options.arguments = sys.argv[1:] if argv is None else argv
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    given = options.contestants is not None
    options.contestants = options.contestants or list(DEFAULT[options.device])
    if options.batch_invariant and "ours-batch-invariant" not in options.contestants:
        options.contestants.append("ours-batch-invariant")
    if options.format and options.operators:
        parser.error("--format: the whole layer only, not --operators")
    if options.format:
        options.layer = True
        named = FORMATS if "all" in options.format else options.format
        options.contestants = (options.contestants if given else ["ours"]) + contestants_of(named)
    options.tokens = options.tokens or ([512, 4096, 16384] if options.device == "cuda" else [2048, 256, 32])
    options.lora_dtype = options.lora_dtype or options.dtype
    options.threads = options.threads or torch.get_num_threads()
    for shape in options.shape:
        if shape.top_k > shape.experts:
            parser.error(f"--shape {shape.name}: top_k {shape.top_k} exceeds {shape.experts} experts")
    return options
