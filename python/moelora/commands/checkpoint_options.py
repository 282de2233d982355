"""The options of the commands that write checkpoints."""

from __future__ import annotations

import argparse

_GOES = "OUT appears when it is complete; interrupted, the same command goes on. Nothing is overwritten."
_READ = "dense, packed in moelora's own layout, or gpt-oss's MXFP4 as it is published"
COMMANDS = ("synthesize", "quantize", "merge")
GO_ON = "the same command goes on from the files that are finished"


def _number(low: int, high: int = 2**63 - 1):
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, got {text!r}")
        return int(text)

    return parse


def add(commands: argparse._SubParsersAction) -> None:
    """Adds their parsers."""
    _add_synthesize(commands)
    _add_quantize(commands)
    _add_merge(commands)


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--linears",
        metavar="FORMAT",
        help="pack the linear layers beside the experts, too: attention and shared experts; router, norms, "
        "embeddings and head stay as they are (default: they all do)",
    )
    parser.add_argument(
        "--threads", metavar="N", type=_number(1, 1024), help="how many (default: a thread for each CPU)"
    )


def _packing(parser: argparse.ArgumentParser, formats: str, default: str | None = None) -> None:
    parser.add_argument("--format", metavar="FORMAT", required=default is None, default=default, help=formats)
    parser.add_argument("--nested", action="store_true", help="8-bit scales with scales of their own")
    parser.add_argument(
        "--group-size",
        metavar="G",
        type=_number(0),
        help="how many weights of a row share a scale, 0 for all (default: the format's own)",
    )


def _add_synthesize(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "synthesize",
        help="write a checkpoint of a known model's shape with random weights, without a download",
        description="Writes a checkpoint of a known model's exact shape, with random weights of a realistic "
        "scale and a tokenizer of bytes: dense in the model's own file layout, packed in moelora's. For "
        "tests, benchmarks and to plan a machine. " + _GOES,
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="qwen3-30b-a3b, gpt-oss-20b, qwen3.5-35b-a3b, deepseek-v2-lite, mixtral-8x7b, olmoe-1b-7b and "
        "others, or a directory with a config.json",
    )
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    _packing(parser, "bf16 for a dense checkpoint, or what the experts are packed in, such as nf4 or mxfp4")
    parser.add_argument("--layers", metavar="N", type=_number(1), help="its first N layers only")
    parser.add_argument("--seed", metavar="N", type=_number(0), default=0, help="of the weights (default: 0)")
    _shared(parser)


def _add_quantize(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "quantize",
        help="pack the experts of a checkpoint, and say how large the error is",
        description="Packs the experts of a checkpoint, some at a time in at most 2 GB of memory, reads back "
        "what it wrote and compares: a table of errors at the end, and the error of each tensor in "
        "quantization_errors.json. " + _GOES,
    )
    parser.add_argument("model_dir", metavar="DIR", help=f"a local checkpoint, {_READ}")
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    _packing(parser, "what to pack the experts in: nf4, fp4, int4, int8, fp8, mxfp4 or nvfp4")
    _shared(parser)


def _add_merge(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "merge",
        help="add a LoRA adapter to its base, and say how much of it survives the rounding",
        description="Adds a LoRA adapter of PEFT to the checkpoint that it was trained on, a layer at a "
        "time, and tells how much of its change is in what was written: rounding to 4 bits can take most of "
        "it. " + _GOES,
    )
    parser.add_argument("model_dir", metavar="DIR", help=f"a local checkpoint, {_READ}")
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter of it in PEFT's format")
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    what = "same: as the base is; bfloat16, float16 or float32: dense; or what to pack the experts in"
    _packing(parser, f"{what}, such as nf4 (default: same)", "same")
    _shared(parser)
