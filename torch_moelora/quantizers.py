"""Rounding to nearest, one function for each rule; the rows of `formats.FORMATS` name theirs. Piece by piece
in threads: beyond the result they need memory for a few pieces in float32, and fp8 and nvfp4 for an expert's
scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .weight_checks import RUN, either, text

if TYPE_CHECKING:
    from .formats import Format

E4M3 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# bitsandbytes' least absmax to divide by.
LEAST = 1e-38
# The largest E4M3 and E2M1, and the least E4M3 that is not zero.
MOST_E4M3, MOST_E2M1, LEAST_E4M3 = 448.0, 6.0, 2.0**-9

# Elements that a thread takes at once: its caches hold a few copies, and calls cost little beside them.
PIECE = 1 << 17

# codes, scale, scale2
Parts = tuple[Tensor, Tensor, Tensor | None]


def check(row: Format, weight: Tensor, group_size: int | None, nested: bool, zeros: bool) -> None:
    """Raises RuntimeError for what `formats.quantize` does not take."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise RuntimeError(f"quantize: {message}")

    require(weight.dim() == 3, f"weight must be a 3-D tensor [E, N, K], got shape {text(weight.shape)}")
    require(weight.dtype in DTYPES, f"weight must have dtype {either(DTYPES)}, got {weight.dtype}")
    require(min(weight.shape) >= 1, f"weight must have E, N and K of at least 1, got {text(weight.shape)}")
    require(
        not nested or row.nested,
        f"nested must be False when format is {row.name}, got True",
    )
    require(not zeros or row.zero, f"zeros must be False when format is {row.name}, got True")
    groups, k = row.groups, weight.shape[2]
    if groups is None:
        require(group_size is None, f"group_size must be None when format is {row.name}, got {group_size}")
    else:
        group = groups.default if group_size is None else group_size
        if groups.kind == "grid":
            allowed = group in (0, groups.least)
        else:
            allowed = groups.allow(group or (k if groups.kind == "multiple" else 0), k)
        rule = {
            "power": f"a power of 2 of at least {groups.least} that divides K={k}",
            "multiple": f"0, K={k} or a multiple of {groups.least} that divides it",
            "fixed": f"{groups.least}, and divide K={k}",
            "grid": f"0 or {groups.least}",
        }[groups.kind]
        require(allowed, f"group_size must be {rule}, got {group}")
        require(k % row.per_byte == 0, f"weight must have an even K, got shape {text(weight.shape)}")


def _pieces(weight: Tensor, each: int = 1) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end): a multiple of `each` rows or the last; elsewhere than on CPU all."""
    experts, n, k = weight.shape
    rows = max(each, PIECE * torch.get_num_threads() // k // each * each) if weight.is_cpu else n
    return ((e, i, min(i + rows, n)) for e in range(experts) for i in range(0, n, rows))


def check_finite(weight: Tensor) -> None:
    """The one check that has to look at every number; what packs makes it on the way."""
    for e, start, stop in _pieces(weight):
        _absmax(weight[e, start:stop])


def _absmax(groups: Tensor) -> Tensor:
    """The largest size along the last dimension. Raises RuntimeError unless all are finite."""
    absmax = torch.maximum(groups.amax(-1), groups.amin(-1).neg_()).abs_()
    if not torch.isfinite(absmax).all():
        raise RuntimeError("quantize: weight must be finite, got an infinity or a NaN")
    return absmax


def _divided(values: Tensor, number: float) -> Tensor:
    """values / number, rounded once on every device: CUDA multiplies by a number's reciprocal."""
    return values / torch.full((), number, dtype=values.dtype, device=values.device)


def _or_one(scale: Tensor) -> Tensor:
    """1 for a group of zeros, or of numbers too small for a scale."""
    return torch.where(scale == 0, 1.0, scale)


def _packed(row: Format, codes: Tensor) -> Tensor:
    """uint8 codes [..., K] → [..., K/2]."""
    pairs = codes.contiguous().view(torch.int16)  # the even one in the low half
    moved = pairs << 4 | pairs >> 8 if row.high_first else pairs >> 4 | pairs
    return moved.to(torch.uint8)


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """The code of the nearest of the values in `table`; of two the lower one."""
    order = torch.argsort(table, stable=True)
    ascending = table[order]
    at = torch.bucketize(values, (ascending[:-1] + ascending[1:]) / 2, out_int32=True)
    return order.to(torch.uint8)[at]


def _e2m1(values: Tensor) -> Tensor:
    """The code of the nearest E2M1, of two the even one; what is larger gets the largest."""
    size = values.abs().clamp(max=MOST_E2M1)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    # round() takes the even one, and so does the mantissa, whose last bit counts steps.
    units = torch.round(size / step)
    code = torch.where(size < 2, units, torch.where(size < 4, units + 2, units + 4))
    return code.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)


class _Rounding(NamedTuple):
    """A function from float32 to codes, by the upper 16 bits of the number: with these given, the code
    changes once at most.

    limits: int32, bits from which on it is another one; at 32769 + the upper bits. codes: uint8, that before
    and that from there on, at twice as much - 1 and twice as much.
    """

    limits: Tensor
    codes: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """float32 values → uint8 codes."""
        bits = values.reshape(-1).view(torch.int32)
        at = (bits >> 16).add_(32769)
        limit = _look_up(self.limits, at)
        before = torch.sub(bits, limit, out=limit).bitwise_right_shift_(31)  # -1, else 0
        return _look_up(self.codes, before.add_(at, alpha=2)).view(values.shape)


def _look_up(table: Tensor, at: Tensor) -> Tensor:
    """table[at]. torch is quick with a vector, but only shares out a matrix."""
    if torch.get_num_threads() < 4:
        return table.index_select(0, at)
    return table.unsqueeze(1).index_select(0, at).squeeze(1)


def _rounding(nearest: Callable[[Tensor], Tensor], device: torch.device) -> _Rounding:
    """The same as `nearest`, and fast."""

    def code(bits: Tensor) -> Tensor:
        return nearest(bits.view(torch.float32))

    first = torch.arange(-32768, 32768, dtype=torch.int32) << 16
    last = first | 0xFFFF
    before, behind = code(first), code(last)
    changes = (before != behind).nonzero().view(-1)
    low, high, same = first[changes], last[changes], before[changes]
    for _ in range(16):
        middle = low + (high - low >> 1)
        is_same = code(middle) == same
        low, high = torch.where(is_same, middle, low), torch.where(is_same, high, middle)
    limits = first.index_copy(0, changes, high)
    padding = limits.new_zeros(1)
    codes = torch.cat((padding.to(torch.uint8), torch.stack((before, behind), 1).flatten()))
    return _Rounding(torch.cat((padding, limits)).to(device), codes.to(device))


@cache
def _codebook_rounding(codes: tuple[float, ...], device: torch.device) -> _Rounding:
    table = torch.tensor(codes, dtype=torch.float32)
    return _rounding(lambda values: _nearest(values.clamp(-1, 1), table), device)


@cache
def _e2m1_rounding(device: torch.device) -> _Rounding:
    return _rounding(_e2m1, device)


def _codes(row: Format, weight: Tensor) -> Tensor:
    """Room for them, as bytes."""
    experts, n, k = weight.shape
    return torch.empty((experts, n, k // row.per_byte), dtype=torch.uint8, device=weight.device)


def codebook(row: Format, weight: Tensor, group: int, nested_codes: Tensor | None) -> Parts:
    """bitsandbytes' 4-bit types: the nearest of 16 values of x / absmax."""
    nearest = _codebook_rounding(row.codes, weight.device)
    codes, scale = _codes(row, weight), _room(weight, group, torch.float32)

    for e, start, stop in _pieces(weight):
        groups = weight[e, start:stop].float().unflatten(1, (-1, group))
        scale[e, start:stop] = absmax = _absmax(groups)
        scaled = groups * (1.0 / absmax.clamp(min=LEAST)).unsqueeze(2)
        codes[e, start:stop] = _packed(row, nearest(scaled).flatten(1))

    if nested_codes is None:
        return codes, scale, None
    return codes, *_nested(scale, nested_codes)


def _room(weight: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """For a number of every group."""
    experts, n, k = weight.shape
    return torch.empty((experts, n, k // group), dtype=dtype, device=weight.device)


def _nested(scale: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [E, N, K/G] → their uint8 codes, and (absmax2, offset) of each run of 256."""
    flat = scale.flatten()
    offset = flat.mean()
    whole, rest = (flat - offset).split((flat.numel() // RUN * RUN, flat.numel() % RUN))
    runs = whole.view(-1, RUN)
    absmax = runs.abs().amax(1)
    scaled = [(runs * (1.0 / absmax.clamp(min=LEAST)).unsqueeze(1)).flatten()]
    if rest.numel():
        # A last, shorter run is divided where the others are multiplied.
        last = rest.abs().max().clamp(min=LEAST)
        scaled.append(rest / last)
        absmax = torch.cat((absmax, last.view(1)))
    codes = torch.cat([_nearest(part.clamp(-1, 1), table) for part in scaled])
    return codes.view(scale.shape), torch.stack((absmax, offset.expand_as(absmax)), 1)


def integers(row: Format, weight: Tensor, group: int, nested_codes: None) -> Parts:
    """int4 around its middle, and int8."""
    most, middle, low, high = (7.5, 8, 0, 15) if row.bits == 4 else (127.0, 0, -127, 127)
    codes, scales = _codes(row, weight).view(row.storage), _room(weight, group, torch.float32)

    for e, start, stop in _pieces(weight):
        groups = weight[e, start:stop].float().unflatten(1, (-1, group))
        scales[e, start:stop] = scale = _or_one(_divided(_absmax(groups), most))
        code = (
            (groups / scale.unsqueeze(2)).round_().add_(middle).clamp_(low, high).flatten(1).to(row.storage)
        )
        codes[e, start:stop] = _packed(row, code) if row.bits == 4 else code

    return codes, scales, None


def integers_with_zeros(row: Format, weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """int4 from a group's least number, or 0, to its largest: codes, scale, and the code of 0."""
    codes, scales = _codes(row, weight), _room(weight, group, torch.float32)
    zeros, most = _room(weight, group, torch.uint8), 2**row.bits - 1

    for e, start, stop in _pieces(weight):
        groups = weight[e, start:stop].float().unflatten(1, (-1, group))
        _absmax(groups)  # they are finite
        least = groups.amin(-1).clamp_(max=0)
        scales[e, start:stop] = scale = _or_one(_divided(groups.amax(-1).clamp_(min=0) - least, most))
        zeros[e, start:stop] = zero = (-least / scale).round_().clamp_(0, most)
        code = (groups / scale.unsqueeze(2)).round_().add_(zero.unsqueeze(2)).clamp_(0, most)
        codes[e, start:stop] = _packed(row, code.flatten(1).to(torch.uint8))

    return codes, scales, zeros


def exponents(row: Format, weight: Tensor, group: int, nested_codes: None) -> Parts:
    """mxfp4: the scale is a power of two."""
    nearest = _e2m1_rounding(weight.device)
    codes, scales = _codes(row, weight), _room(weight, group, torch.uint8)

    for e, start, stop in _pieces(weight):
        groups = weight[e, start:stop].float().unflatten(1, (-1, group))
        absmax = _absmax(groups)
        # frexp's mantissa is in [0.5, 1); the largest E2M1 has the exponent 2.
        exponent = (torch.frexp(absmax).exponent - 3).clamp(-127, 127)
        exponent = torch.where(absmax == 0, 0, exponent)
        inverse = ((127 - exponent) << 23).view(torch.float32)
        codes[e, start:stop] = _packed(row, nearest(groups * inverse.unsqueeze(2)).flatten(1))
        scales[e, start:stop] = exponent + 127

    return codes, scales, None


def two_levels(row: Format, weight: Tensor, group: int, nested_codes: None) -> Parts:
    """nvfp4: E4M3 scales below one multiplier for the expert."""
    nearest = _e2m1_rounding(weight.device)
    codes, scales = _codes(row, weight), _room(weight, group, torch.uint8)
    multipliers = torch.empty((len(weight), 1), dtype=torch.float32, device=weight.device)
    absmax = _room(weight[:1], group, torch.float32)[0]
    for expert in range(len(weight)):
        matrix = weight[expert : expert + 1]
        for _, start, stop in _pieces(matrix):
            absmax[start:stop] = _absmax(matrix[0, start:stop].unflatten(1, (-1, group)))
        multipliers[expert] = multiplier = _or_one(_divided(absmax.max(), MOST_E2M1 * MOST_E4M3))
        for _, start, stop in _pieces(matrix):
            groups, most = matrix[0, start:stop].float().unflatten(1, (-1, group)), absmax[start:stop]
            scale = (_divided(most, MOST_E2M1) / multiplier).clamp(LEAST_E4M3, MOST_E4M3).to(E4M3)
            scale = torch.where(most == 0, 1.0, scale.float()).to(E4M3)
            scaled = groups / (scale.float() * multiplier).unsqueeze(2)
            codes[expert, start:stop] = _packed(row, nearest(scaled).flatten(1))
            scales[expert, start:stop] = scale.view(torch.uint8)
    return codes, scales.view(E4M3), multipliers


def floats(row: Format, weight: Tensor, group: int, nested_codes: None) -> Parts:
    """fp8: a scale for blocks of `group` × `group`, or for a row if that is 0."""
    experts, n, k = weight.shape
    down, width = (group, min(group, k)) if group else (1, k)
    whole = k // width * width  # columns of whole blocks
    codes = _codes(row, weight)
    shape = (experts, -(-n // down), -(-k // width))
    scales = torch.empty(shape, dtype=torch.float32, device=weight.device)

    def parts(rows: Tensor) -> tuple[Tensor, ...]:
        """[rows, K] → [rows, blocks, columns]: of whole blocks, then of the rest."""
        found = rows[:, :whole].unflatten(1, (-1, width)), rows[:, whole:].unsqueeze(1)
        return found[: 1 + (whole < k)]

    for e, start, stop in _pieces(weight, down):
        rows = weight[e, start:stop].float()
        absmax = torch.cat([_absmax(part) for part in parts(rows)], 1)
        if down > 1:
            absmax = torch.stack([some.amax(0) for some in absmax.split(down)])
        scale = scales[e, start // down : -(-stop // down)] = _or_one(_divided(absmax, MOST_E4M3))
        wide = scale.repeat_interleave(down, 0)[: len(rows)].split(whole // width, 1)
        for part, factor, to in zip(parts(rows), wide, parts(codes[e, start:stop]), strict=True):
            code = (part / factor.unsqueeze(2)).clamp_(-MOST_E4M3, MOST_E4M3).to(E4M3)
            to.copy_(code.view(torch.uint8))
    return codes.view(E4M3), scales, None
