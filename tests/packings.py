"""Packed weights for tests: how one is packed, its tensors with any codes and scales, and a strategy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from torch_moelora.formats import FORMATS, PackedWeight

BF16, FP16, FP32, E4M3, U8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8
NAMES = tuple(name for name in FORMATS if name != "dense")
BLOCK = 128  # of fp8


@dataclass(frozen=True)
class Packing:
    """How a weight is stored. Sizes are those of the stored matrix: N by K, or K by N if `transposed`.

    group: G; 0 is the whole row. rows: what an fp8 scale covers: "one" row, a "block" of 128 or "all".
    scales: "usual" (numbers of about 1/√K), "subnormal", "extreme" (up to overflow) or "special" (0, NaN, Inf
    and codes that are NaN among usual ones). layout of scales: "contiguous", "strided" or "shared" (stride
    0).
    """

    format: str
    group: int = 0
    scale_dtype: torch.dtype = FP32
    zero: bool = False
    parts: int = 1
    rows: str = "one"
    transposed: bool = False
    scales: str = "usual"
    layout: str = "contiguous"

    def sizes(self, n: int, k: int) -> tuple[int, int]:
        """Rows and columns as stored."""
        return (k, n) if self.transposed else (n, k)


def like(t: Tensor, layout: str) -> Tensor:
    """The same values behind other strides; "shared" repeats the first expert."""
    if layout == "contiguous":
        return t
    if layout == "shared":
        return t[:1].expand(t.shape)
    out = torch.zeros(tuple(2 * s for s in t.shape), dtype=t.dtype)
    view = out[tuple(slice(1, None, 2) for _ in t.shape)]
    view.view(U8 if t.itemsize == 1 else t.dtype).copy_(t.view(U8 if t.itemsize == 1 else t.dtype))
    return view


def _codes(packing: Packing, shape: tuple, gen: torch.Generator) -> Tensor:
    row = FORMATS[packing.format]
    codes = torch.randint(0, 256, (*shape[:2], shape[2] // row.per_byte), generator=gen).to(U8)
    flat = codes.view(-1)
    flat[: min(256, len(flat))] = torch.arange(min(256, len(flat))).to(U8)  # all of them, where there is room
    if packing.format == "fp8" and packing.scales != "special":
        codes[(codes & 0x7F) == 0x7F] = 0x01
    return codes.view(row.storage)


def _spread(packing: Packing, shape: tuple, gen: torch.Generator, typical: float) -> Tensor:
    """fp32 scales around `typical`, or where `packing.scales` wants them."""
    size = torch.randn(shape, generator=gen)
    if packing.scales == "subnormal":
        return torch.exp2(-140 + 8 * size).clamp(max=2.0**-120)
    if packing.scales == "extreme":
        sign = torch.where(torch.rand(shape, generator=gen) < 0.5, -1.0, 1.0)
        return sign * torch.exp2((60 * size).clamp(-149, 127.9))
    scale = typical * torch.exp(size / 2)
    if packing.scales == "special":
        for value in (0.0, math.nan, math.inf, -math.inf):
            scale[torch.rand(shape, generator=gen) < 0.05] = value
    return scale


def scale_shape(packing: Packing, e: int, rows: int, columns: int) -> tuple[int, int, int]:
    if packing.format == "fp8":
        down = {"one": rows, "block": -(-rows // BLOCK), "all": 1}[packing.rows]
        return e, down, -(-columns // BLOCK) if packing.group == BLOCK else 1
    return e, rows, columns // (packing.group or columns)


def build(packing: Packing, e: int, n: int, k: int, gen: torch.Generator) -> PackedWeight:
    """A weight [e, n, k] with every code and scales of all sizes."""
    rows, columns = packing.sizes(n, k)
    row = FORMATS[packing.format]
    shape = scale_shape(packing, e, rows, columns)
    codes = _codes(packing, (e, rows, columns), gen)
    values = torch.tensor(row.codes)
    size = values[values.isfinite()].square().mean().sqrt().item() if packing.format != "int4" else 4.6
    typical = k**-0.5 / size
    scale2 = zero = None
    if packing.format == "mxfp4":
        centre, width = {"usual": (math.log2(typical) + 127, 1), "subnormal": (2, 2)}.get(
            packing.scales, (127, 50)
        )
        scale = (centre + width * torch.randn(shape, generator=gen)).round().clamp(0, 254).to(U8)
        if packing.scales == "special":
            scale[torch.rand(shape, generator=gen) < 0.1] = 255
            scale[torch.rand(shape, generator=gen) < 0.1] = 0
    elif packing.format == "nvfp4":
        bytes_ = torch.randint(0, 0x7F if packing.scales == "usual" else 256, shape, generator=gen).to(U8)
        if packing.scales != "special":
            bytes_[(bytes_ & 0x7F) == 0x7F] = 0x01
        scale = bytes_.view(E4M3)
        scale2 = _spread(packing, (e, packing.parts), gen, typical / 100)
    elif packing.scale_dtype == U8:
        scale = torch.randint(0, 256, shape, generator=gen).to(U8)
        runs = -(-scale.numel() // 256)
        scale2 = _spread(packing, (runs, 2), gen, typical)
    else:
        scale = _spread(packing, shape, gen, typical).to(packing.scale_dtype)
    if packing.zero:
        zero = torch.randint(0, 256 if packing.scales == "extreme" else 16, shape, generator=gen).to(U8)
    parts = (t if t is None else like(t, packing.layout) for t in (scale, scale2, zero))
    return PackedWeight(codes, *parts, packing.format, packing.transposed)


@st.composite
def packings(draw, scales: tuple[str, ...] = ("usual",), most: int = 4) -> tuple[Packing, int, int]:
    """(packing, N, K), sizes around what the format divides by: rows of one group, and of up to `most`."""
    name = draw(st.sampled_from(NAMES))
    row = FORMATS[name]
    few = st.sampled_from((1, 2, 3, 5, 8, 17, 33, 48))
    odd = st.sampled_from((2, 6, 10, 30, 34, 66, 130)) if row.per_byte == 2 else few
    group, parts, rows = 0, 1, "one"
    count = draw(st.integers(1, most))
    height = draw(few)
    kind = row.groups.kind
    if kind == "grid":
        group = draw(st.sampled_from((0, BLOCK)))
        rows = draw(st.sampled_from(("one", "block", "all")))
        height = draw(st.sampled_from((1, 3, 17, 127, 128, 130)))
        width = draw(st.sampled_from((1, 7, 64, 127, 128, 129, 200)))
    elif kind == "multiple" and draw(st.booleans()):
        width = draw(odd)
    else:
        steps = {"power": (1, 2, 4), "multiple": (1, 2, 3), "fixed": (1,)}[kind]
        group = row.groups.least * draw(st.sampled_from(steps))
        width = group * count
    if row.scale2 == "parts":
        parts = draw(st.sampled_from([p for p in (1, 2, 3, 17) if height % p == 0]))
    transposed = draw(st.booleans())
    packing = Packing(
        name,
        group,
        draw(st.sampled_from(row.scale_dtypes)),
        zero=bool(row.zero) and draw(st.booleans()),
        parts=parts,
        rows=rows,
        transposed=transposed,
        scales=draw(st.sampled_from(scales)),
        layout=draw(st.sampled_from(("contiguous", "strided", "shared"))),
    )
    n, k = packing.sizes(height, width)
    return packing, n, k


def constant(packed: PackedWeight, code: int) -> PackedWeight:
    """The same scales with one code everywhere."""
    row = FORMATS[packed.format]
    byte = code | code << 4 if row.per_byte == 2 else code
    return packed._replace(codes=torch.full_like(packed.codes.view(U8), byte).view(row.storage))
