"""`python -m torch_moelora formats`: what each weight format runs on, as docs/formats.md has it."""

from __future__ import annotations

from . import _C
from .formats import FORMATS, Format

CUDA = "Triton (CUDA)"
# Of `tl.load`ed codes the Triton kernels make what the product takes: every dtype that packed weights have.
CUDA_DTYPES = ("bf16", "fp16", "fp32")


def _bits(row: Format) -> str:
    """Of a weight as `quantize` packs it by default, with its scales; rows of scales cost next to nothing."""
    group, scale = row.groups.default, row.scale_dtypes[0].itemsize * 8
    shared = 0 if group == 0 else group * group if row.groups.kind == "grid" else group
    return f"{row.bits + (scale / shared if shared else 0):.4g}"


def columns() -> dict[str, dict[str, tuple[str, ...]]]:
    """Instruction set (of those that this machine can use) or Triton → format → dtypes of x."""
    report = {
        isa: {name: tuple(found) for name, found in of.items()} for isa, of in _C.format_report().items()
    }
    packed = [name for name, row in FORMATS.items() if row.bits is not None]
    return {**report, CUDA: dict.fromkeys(packed, CUDA_DTYPES)}


def matrix() -> str:
    """The table in Markdown. A set without a dtype leaves it to the next one to the right."""
    found = columns()
    lines = [["format", "bits a weight", *(isa if isa == CUDA else f"`{isa}`" for isa in found)]]
    lines.append(["---", "---:", *["---"] * len(found)])
    for name, row in FORMATS.items():
        if row.bits is not None:
            cells = [", ".join(of.get(name, ())) or "–" for of in found.values()]
            lines.append([f"`{name}`", _bits(row), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
