"""Weights that only exist packed: the table of formats, `PackedWeight`, `stack` and `quantize`.

A weight is [E, N, K] numbers; of a packed one a code, a scale and for some formats more is stored, and

    W[e, n, k] = round((value(code[e, n, k]) - zero) * scale)

in float32, where every operation rounds by itself, and rounded once more to the dtype that is asked for.

G is the number of successive k that share a scale. Byte b of 4-bit codes holds two of them: `nf4` and `fp4`
have the even k in the high nibble, the others in the low one.

| format | codes | scale | scale2 | zero |
|---|---|---|---|---|
| dense | [E, N, K], a dtype that torch computes with | | | |
| nf4, fp4 | uint8 [E, N, K/2] | float32 [E, N, K/G]; nested uint8 | nested float32 [⌈E·N·K/G / 256⌉, 2] | |
| int4 | uint8 [E, N, K/2] | float32, bfloat16, float16 [E, N, K/G] | | uint8 [E, N, K/G], or none: 8 |
| mxfp4 | uint8 [E, N, K/2], E2M1 | uint8 E8M0 [E, N, K/32] | | |
| nvfp4 | uint8 [E, N, K/2], E2M1 | float8_e4m3fn [E, N, K/16] | float32 [E, P], P equal parts of N | |
| int8 | int8 [E, N, K] | float32, bfloat16, float16 [E, N, K/G] | | |
| fp8 | float8_e4m3fn [E, N, K] | float32, bfloat16 [E, r, c]: r of N, ⌈N/128⌉, 1; c of ⌈K/128⌉, 1 | | |

Nested: scale i, counted through [E, N, K/G], is code2[u8]·absmax2 + offset, with (absmax2, offset) in row
i // 256 of scale2 and code2 the 256 values of `nested_values`. E8M0 is 2^(s - 127), and 255 is NaN.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from . import quantizers, weight_checks

E4M3 = torch.float8_e4m3fn
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Scales of a nested weight share (absmax2, offset) in runs of so many.
NESTED_RUN = weight_checks.RUN


@dataclass(frozen=True)
class Groups:
    """How many successive k share a scale, G. `kind`: "power" (least·2^i), "multiple" (of least, or the whole
    row), "fixed" (least) or "grid" (blocks of least × least, rows, columns or all). default: `quantize`'s; 0
    is the row.
    """

    kind: str
    least: int
    default: int

    def allow(self, group: int, size: int) -> bool:
        """Whether a row of `size` may have groups of `group`."""
        if group < 1 or size % group:
            return False
        if self.kind == "power":
            return any(group == self.least << i for i in range(32))
        if self.kind == "multiple":
            return group == size or group % self.least == 0
        return self.kind == "fixed" and group == self.least


@dataclass(frozen=True)
class Format:
    """One weight format.

    bits: of a code; None for `dense`, whose numbers are their own codes.
    codes: the value of each code, 2^bits of them; of 8-bit codes by their byte.
    storage: dtype of the tensor of codes. high_first: the high nibble is the even k.
    scale_dtypes: those that scale may have. nested: with uint8 scales it is nested, and scale2 is needed.
    scale2, zero: what else it has: "" (nothing), "optional" or "parts", a multiplier for each part of N.
    rounding: what `quantize` does.
    """

    name: str
    bits: int | None = None
    codes: tuple[float, ...] = ()
    storage: torch.dtype | None = None
    groups: Groups | None = None
    scale_dtypes: tuple[torch.dtype, ...] = ()
    high_first: bool = False
    nested: bool = False
    scale2: str = ""
    zero: str = ""
    rounding: Callable[..., quantizers.Parts] | None = None

    @property
    def per_byte(self) -> int:
        """Codes in an element of the tensor of codes."""
        return 1 if self.bits is None else 8 // self.bits


# Dettmers et al. 2023 (QLoRA), as bitsandbytes has them.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
1.0, )  # fmt: skip
# bitsandbytes' own order; in twelfths, rounded to float32. Code 8 is a zero without a sign.
_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)
_FP4 = tuple(torch.tensor(_TWELFTHS, dtype=torch.float32).div(12).tolist())
# Open Compute Project, Microscaling formats 1.0.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Micikevicius et al. 2022 (FP8 formats): no infinities, 0x7f and 0xff are NaN.
_E4M3 = tuple(torch.arange(256, dtype=torch.uint8).view(E4M3).float().tolist())
_FLOAT_SCALES = (torch.float32, torch.bfloat16, torch.float16)

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("dense"),
        Format("nf4", 4, _NF4, torch.uint8, Groups("power", 32, 64), (torch.float32, torch.uint8),
               high_first=True, nested=True, rounding=quantizers.codebook),
        Format("fp4", 4, _FP4, torch.uint8, Groups("power", 32, 64), (torch.float32, torch.uint8),
               high_first=True, nested=True, rounding=quantizers.codebook),
        Format("int4", 4, tuple(map(float, range(16))), torch.uint8, Groups("multiple", 32, 128),
               _FLOAT_SCALES, zero="optional", rounding=quantizers.integers),
        Format("mxfp4", 4, _E2M1, torch.uint8, Groups("fixed", 32, 32), (torch.uint8,),
               rounding=quantizers.exponents),
        Format("nvfp4", 4, _E2M1, torch.uint8, Groups("fixed", 16, 16), (E4M3,), scale2="parts",
               rounding=quantizers.two_levels),
        Format("int8", 8, (*map(float, range(128)), *map(float, range(-128, 0))), torch.int8,
               Groups("multiple", 32, 0), _FLOAT_SCALES, rounding=quantizers.integers),
        Format("fp8", 8, _E4M3, E4M3, Groups("grid", 128, 128), (torch.float32, torch.bfloat16),
               rounding=quantizers.floats),
    )
}  # fmt: skip
# The zero of `int4` where none is stored.
MIDDLE = 8


def lookup(op: str, name: str, argument: str = "format") -> Format:
    """The row of `name`. Raises RuntimeError, headed by `op`, for one that is not there."""
    if name not in FORMATS:
        raise RuntimeError(f"{op}: {argument} must be {weight_checks.either(FORMATS)}, got {name}")
    return FORMATS[name]


def _dynamic_map() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for i in range(7):
        steps = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (steps[:-1] + steps[1:]) / 2
        for sign in (1, -1):
            values += (sign * 10 ** (i - 6) * middles).tolist()
    return tuple(sorted(values))


# bitsandbytes' map for scales of scales (Dettmers 2015, 8-bit approximations for parallelism in deep
# learning): of each power of ten the middles of equal steps from 0.1 to 1, of the next one twice as many,
# with both signs; and 0 and 1.
_NESTED = _dynamic_map()


def nested_values(device: torch.device | str = "cpu") -> Tensor:
    """code2: the values of the 256 codes of a nested scale, ascending, float32."""
    return torch.tensor(_NESTED, dtype=torch.float32, device=device)


def byte_values(row: Format, device: torch.device | str = "cpu") -> Tensor:
    """The values that a byte of codes stands for, in the order of k: float32 [256, codes a byte]."""
    codes = row.codes
    if row.bits == 8:
        pairs = [(value,) for value in codes]
    elif row.high_first:
        pairs = [(codes[b >> 4], codes[b & 15]) for b in range(256)]
    else:
        pairs = [(codes[b & 15], codes[b >> 4]) for b in range(256)]
    return torch.tensor(pairs, dtype=torch.float32, device=device)


def e8m0_values(scale: Tensor) -> Tensor:
    """uint8 exponents → 2^(s - 127) in float32, subnormals included; 255 is NaN."""
    bits = torch.where(scale == 0, 0x00400000, scale.int() << 23)
    return torch.where(scale == 255, torch.nan, bits.view(torch.float32))


class PackedWeight(NamedTuple):
    """A weight [E, N, K] in a format of `FORMATS`; the module says which tensors that takes.

    transposed: codes, scale, scale2 and zero are those of [E, K, N], in every shape, with groups along N; the
    weight is still [E, N, K]. Not with `dense`, where strides say it.

    A tuple of tensors, and for pytree a namedtuple, so that torch.compile, torch.export and its files take
    it. What the tuple holds is checked where it is used; float8_e8m0fnu scales count as their bytes.
    """

    codes: Tensor
    scale: Tensor | None = None
    scale2: Tensor | None = None
    zero: Tensor | None = None
    format: str = "dense"
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        experts, rows, columns = self.codes.shape
        columns = columns * lookup("PackedWeight", self.format).per_byte
        return (experts, columns, rows) if self.transposed else (experts, rows, columns)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there, in the order of the fields."""
        return tuple(t for t in self[:4] if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors)

    def operands(self) -> dict[str, Tensor | str | bool | None]:
        """The arguments of `torch.ops.moelora.scatter_lora` that are this weight, by their names."""
        codes, scale, scale2, zero, name, transposed = self._as_bytes()
        return {
            "weight": codes, "weight_scale": scale, "weight_scale2": scale2, "weight_zero": zero,
            "weight_format": name, "weight_transposed": transposed,
        }  # fmt: skip

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same on another device."""
        return PackedWeight(*(t if t is None else t.to(device) for t in self[:4]), *self[4:])

    def turned(self) -> PackedWeight:
        """The transpose [E, K, N] of this weight, on the same memory: W.transpose(1, 2)."""
        if self.format == "dense":
            return self._replace(codes=self.codes.transpose(1, 2))
        return self._replace(transposed=not self.transposed)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The numbers, rounded once to `dtype` (bfloat16, float16, float32, float64): a new [E, N, K],
        contiguous unless the weight is transposed or dense. Works expert by expert: beyond the result it
        needs memory for a few copies of one expert in float32.

        Raises:
            RuntimeError: a tensor that the format needs is missing, one that it does not take is there, or
                one has a wrong dtype, shape, device or last stride; the message names it.
        """
        op = "dequantize"
        if dtype not in FLOATS:
            raise RuntimeError(f"{op}: dtype must be {weight_checks.either(FLOATS)}, got {dtype}")
        weight = self.checked(op)
        if self.format == "dense":
            return self.codes.to(dtype, copy=True)
        columns = weight.codes.shape[2] * FORMATS[self.format].per_byte
        out = torch.empty((*weight.codes.shape[:2], columns), dtype=dtype, device=self.device)
        for e, numbers in enumerate(weight.each_in_float32()):
            out[e] = numbers.T if self.transposed else numbers
        return out.transpose(1, 2) if self.transposed else out

    def each_in_float32(self) -> Iterator[Tensor]:
        """The numbers [N, K] of each expert in turn, in float32. Raises as `dequantize`, at the first one."""
        weight = self.checked("dequantize")
        if self.format == "dense":
            yield from (codes.float() for codes in weight.codes)
            return
        scales = _scales(weight)
        table = byte_values(FORMATS[self.format], self.device)
        for e, codes in enumerate(weight.codes):
            values = torch.nn.functional.embedding(codes.view(torch.uint8).int(), table).flatten(1)
            numbers = scales.apply(values, e)
            yield numbers.T if self.transposed else numbers

    def experts(self, start: int, stop: int) -> PackedWeight:
        """Experts start … stop-1, on the same memory.

        A nested weight whose expert `start` begins inside of a run of 256 scales, which scale2 could not say,
        comes back with float32 scales instead, and a UserWarning says so.

        Raises:
            RuntimeError: not 0 ≤ start < stop ≤ E; and as `dequantize`.
        """
        weight = self.checked("experts")
        count = weight.codes.shape[0]
        if not 0 <= start < stop <= count:
            raise RuntimeError(f"experts: start and stop must be within [0, {count}], got {start} and {stop}")
        parts = [t if t is None else t[start:stop] for t in weight[:4]]
        if weight.is_nested:
            scales = math.prod(weight.scale.shape[1:])
            if start * scales % NESTED_RUN:
                return weight.unnested("experts").experts(start, stop)
            parts[2] = weight.scale2[start * scales // NESTED_RUN : -(-stop * scales // NESTED_RUN)]
        return PackedWeight(*parts, *weight[4:])

    @property
    def is_nested(self) -> bool:
        """Whether scale2 holds the scales of scales."""
        nested = lookup("PackedWeight", self.format).nested
        return nested and self.scale is not None and self.scale.dtype == torch.uint8

    def unnested(self, why: str) -> PackedWeight:
        """The same numbers with float32 scales. Warns, headed by `why`."""
        message = f"{why}: nested scales became float32, because a part is no multiple of {NESTED_RUN} scales"
        warnings.warn(message, UserWarning, stacklevel=3)
        return self._replace(scale=_scales(self).values, scale2=None)

    def checked(self, op: str) -> PackedWeight:
        """This weight, float8_e8m0fnu viewed as bytes. Raises as `dequantize` does, headed by `op`."""
        weight = self._as_bytes()
        weight_checks.packed(op, lookup(op, self.format), weight)
        return weight

    def _as_bytes(self) -> PackedWeight:
        if self.scale is not None and self.scale.dtype == torch.float8_e8m0fnu:
            return self._replace(scale=self.scale.view(torch.uint8))
        return self


_pytree._register_namedtuple(PackedWeight, serialized_type_name="torch_moelora.formats.PackedWeight")
torch.serialization.add_safe_globals([PackedWeight])


class _Scales(NamedTuple):
    """values: float32 [E, r, c]. rows, columns: those of the stored matrix. block: what a scale covers, or
    None where that divides the matrix evenly.
    """

    values: Tensor
    zero: Tensor | None
    rows: int
    columns: int
    block: int | None

    def apply(self, values: Tensor, e: int) -> Tensor:
        """(values - zero)·scale of expert e, for values [rows, columns] in float32."""
        if self.zero is not None:
            values = values - self._spread(self.zero[e].float())
        return values * self._spread(self.values[e])

    def _spread(self, t: Tensor) -> Tensor:
        """[r, c] → each element for the block that it covers; what covers all stays one."""
        for dim, size in enumerate((self.rows, self.columns)):
            count = t.shape[dim]
            if count not in (1, size):
                t = t.repeat_interleave(self.block or size // count, dim).narrow(dim, 0, size)
        return t


def _scales(weight: PackedWeight) -> _Scales:
    """What the codes of a checked weight are multiplied with, after what is taken off them."""
    row = FORMATS[weight.format]
    _, rows, columns = weight.codes.shape
    columns *= row.per_byte
    scale, scale2 = weight.scale, weight.scale2
    if weight.is_nested:
        runs = scale2.repeat_interleave(NESTED_RUN, 0)[: scale.numel()].view(*scale.shape, 2)
        values = nested_values(scale.device)[scale.int()] * runs[..., 0] + runs[..., 1]
    elif scale.dtype == torch.uint8:
        values = e8m0_values(scale)
    else:
        values = scale.float()
    if row.scale2 == "parts":
        values = values * scale2.repeat_interleave(rows // scale2.shape[1], 1)[:, :, None]
    zero = weight.zero
    if row.zero and zero is None:
        zero = torch.full((), MIDDLE, device=scale.device).expand(scale.shape)
    return _Scales(values, zero, rows, columns, row.groups.least if row.groups.kind == "grid" else None)


def stack(parts: list[PackedWeight]) -> PackedWeight:
    """The experts of all parts, in their order, as one weight. Copies.

    Parts have one format, one `transposed`, and but for E the same shapes and dtypes. A nested part but the
    last that is no multiple of 256 scales would leave a run unfinished: then all parts get float32 scales,
    and a UserWarning says so.

    Raises:
        RuntimeError: no parts, or parts that differ; and as `PackedWeight.dequantize`.
    """
    if not parts:
        raise RuntimeError("stack: parts must have at least 1 weight, got none")
    parts = [part.checked("stack") for part in parts]
    if any(part.is_nested for part in parts):
        whole = all(part.scale.numel() % NESTED_RUN == 0 for part in parts[:-1])
        if not whole or not all(part.is_nested for part in parts):
            parts = [part.unnested("stack") if part.is_nested else part for part in parts]
    for part in parts[1:]:
        if _kind(part) != _kind(parts[0]):
            raise RuntimeError(f"stack: parts must be alike, got {_kind(parts[0])} and {_kind(part)}")
    return PackedWeight(*map(_joined, zip(*(part[:4] for part in parts), strict=True)), *parts[0][4:])


def _kind(part: PackedWeight) -> tuple:
    """What parts must have in common."""
    scale2 = None if part.scale2 is None else part.scale2.shape[1]
    dtypes = tuple(t if t is None else str(t.dtype) for t in part[:4])
    scale = None if part.scale is None else tuple(part.scale.shape[1:])
    return part.format, part.transposed, tuple(part.shape[1:]), dtypes, scale, scale2, str(part.device)


def _joined(tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    """Along the experts; float8 by its bytes, which every backend can copy."""
    if tensors[0] is None:
        return None
    dtype = tensors[0].dtype
    if dtype == E4M3:
        return torch.cat([t.view(torch.uint8) for t in tensors]).view(dtype)
    return torch.cat(tensors)


@torch.no_grad()
def nested_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """float32 scales [E, N, K/G] of a whole weight → (scale, scale2), nested as `quantize` nests them."""
    return quantizers._nested(scale, nested_values(scale.device))


@torch.no_grad()
def quantize(
    weight: Tensor, format: str, group_size: int | None = None, nested: bool = False, zeros: bool = False
) -> PackedWeight:
    """Packs a weight, each number rounded to the nearest that its format has at its group's scale.

    `nf4` and `fp4` are those of bitsandbytes 0.50.2's torch implementation to the bit, nested too (one offset
    for the whole weight, the mean of its scales). The other scales are absmax / 7.5 (int4: codes 0 … 15
    around 8), absmax / 127 (int8), absmax / 448 (fp8), 2^(⌊log2 absmax⌋ - 2) (mxfp4) and, for nvfp4, scale2 =
    absmax / (6·448) of the expert, P = 1, and absmax / (6·scale2) rounded to E4M3. A group of zeros gets the
    scale 1, or bitsandbytes' 0.

    Args:
        weight: [E, N, K], bfloat16, float16 or float32, finite, any strides.
        format: a name of `FORMATS`; `dense` keeps the tensor as it is.
        group_size: G; None for 64 (nf4, fp4), 128 (int4; fp8: blocks of 128 × 128), 32 (mxfp4), 16 (nvfp4) or
            the row (int8). 0 is the row for int4, int8 and fp8.
        nested: 8-bit scales with scales of their own; nf4 and fp4.
        zeros: int4 with zero points: the 16 codes from the least number of the group to the largest.

    Returns:
        Contiguous tensors on weight's device, not transposed.

    Raises:
        RuntimeError: an unknown format, a weight of another shape or dtype or that is not finite, a group
            size that the format does not have or that does not divide K, `nested` or `zeros` of another
            format.
    """
    row = lookup("quantize", format)
    quantizers.check(row, weight, group_size, nested, zeros)
    if row.bits is None:
        quantizers.check_finite(weight)
        return PackedWeight(weight)
    group = row.groups.default if group_size is None else group_size
    if row.groups.kind != "grid":  # whose rules tell a row from a block that is as long
        group = group or weight.shape[2]
    if zeros:
        codes, scale, zero = quantizers.integers_with_zeros(row, weight, group)
        return PackedWeight(codes, scale, None, zero, format)
    nested_codes = nested_values(weight.device) if nested else None
    codes, scale, scale2 = row.rounding(row, weight, group, nested_codes)
    return PackedWeight(codes, scale, scale2, None, format)
