"""Rounding to nearest, one function for each rule; the rows of `formats.FORMATS` name theirs. Matrix by
matrix: beyond the result they need memory for a few copies of one expert in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

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

# codes, scale, scale2
Parts = tuple[Tensor, Tensor, Tensor | None]


def check(row: Format, weight: Tensor, group_size: int | None, nested: bool) -> None:
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
    finite = all(torch.isfinite(matrix).all() for matrix in weight)
    require(finite, "weight must be finite, got an infinity or a NaN")


def _matrices(weight: Tensor) -> Iterator[Tensor]:
    """Each expert's [N, K] in float32."""
    return (matrix.float() for matrix in weight)


def _or_one(scale: Tensor) -> Tensor:
    """1 for a group of zeros, or of numbers too small for a scale."""
    return torch.where(scale == 0, 1.0, scale)


def _packed(row: Format, codes: Tensor) -> Tensor:
    """uint8 codes [..., K] → [..., K/2]."""
    even, odd = codes[..., ::2], codes[..., 1::2]
    return even << 4 | odd if row.high_first else odd << 4 | even


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


def codebook(row: Format, weight: Tensor, group: int, nested_codes: Tensor | None) -> Parts:
    """bitsandbytes' 4-bit types: the nearest of 16 values of x / absmax."""
    table = torch.tensor(row.codes, dtype=torch.float32, device=weight.device)
    codes, scales = [], []
    for matrix in _matrices(weight):
        blocks = matrix.reshape(-1, group)
        absmax = blocks.abs().amax(1)
        scaled = (blocks * (1.0 / absmax.clamp(min=LEAST)).unsqueeze(1)).clamp(-1, 1)
        codes.append(_packed(row, _nearest(scaled, table).view(matrix.shape)))
        scales.append(absmax.view(matrix.shape[0], -1))
    scale = torch.stack(scales)
    if nested_codes is None:
        return torch.stack(codes), scale, None
    return torch.stack(codes), *_nested(scale, nested_codes)


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
    codes, scales = [], []
    for matrix in _matrices(weight):
        groups = matrix.unflatten(1, (-1, group))
        scale = _or_one(groups.abs().amax(2) / most)
        rounded = torch.round(groups / scale.unsqueeze(2)) + middle
        code = rounded.clamp(low, high).flatten(1).to(row.storage)
        codes.append(_packed(row, code) if row.bits == 4 else code)
        scales.append(scale)
    return torch.stack(codes), torch.stack(scales), None


def exponents(row: Format, weight: Tensor, group: int, nested_codes: None) -> Parts:
    """mxfp4: the scale is a power of two."""
    codes, scales = [], []
    for matrix in _matrices(weight):
        groups = matrix.unflatten(1, (-1, group))
        absmax = groups.abs().amax(2)
        # frexp's mantissa is in [0.5, 1); the largest E2M1 has the exponent 2.
        exponent = (torch.frexp(absmax).exponent - 3).clamp(-127, 127)
        exponent = torch.where(absmax == 0, 0, exponent)
        inverse = ((127 - exponent) << 23).view(torch.float32)
        scaled = groups * inverse.unsqueeze(2)
        codes.append(_packed(row, _e2m1(scaled).flatten(1)))
        scales.append((exponent + 127).to(torch.uint8))
    return torch.stack(codes), torch.stack(scales), None


def two_levels(row: Format, weight: Tensor, group: int, nested_codes: None) -> Parts:
    """nvfp4: E4M3 scales below one multiplier for the expert."""
    codes, scales, multipliers = [], [], []
    for matrix in _matrices(weight):
        groups = matrix.unflatten(1, (-1, group))
        absmax = groups.abs().amax(2)
        multiplier = _or_one(absmax.max() / (MOST_E2M1 * MOST_E4M3))
        scale = (absmax / MOST_E2M1 / multiplier).clamp(LEAST_E4M3, MOST_E4M3).to(E4M3)
        scale = torch.where(absmax == 0, 1.0, scale.float()).to(E4M3)
        codes.append(_packed(row, _e2m1(groups / (scale.float() * multiplier).unsqueeze(2)).flatten(1)))
        scales.append(scale.view(torch.uint8))
        multipliers.append(multiplier.view(1))
    return torch.stack(codes), torch.stack(scales).view(E4M3), torch.stack(multipliers)


def floats(row: Format, weight: Tensor, group: int, nested_codes: None) -> Parts:
    """fp8: a scale for blocks of 128 × 128, or for a row."""
    block = row.groups.least
    whole_rows = group != block
    codes, scales = [], []
    for matrix in _matrices(weight):
        n, k = matrix.shape
        if whole_rows:
            scale = wide = _or_one(matrix.abs().amax(1, keepdim=True) / MOST_E4M3)
        else:
            pad = (0, -k % block, 0, -n % block)
            blocks = torch.nn.functional.pad(matrix.abs(), pad).unflatten(1, (-1, block))
            scale = _or_one(blocks.unflatten(0, (-1, block)).amax((1, 3)) / MOST_E4M3)
            wide = scale.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]
        code = (matrix / wide).clamp(-MOST_E4M3, MOST_E4M3).to(E4M3)
        codes.append(code.view(torch.uint8))
        scales.append(scale)
    return torch.stack(codes).view(E4M3), torch.stack(scales), None
