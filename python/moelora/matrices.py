"""The packed matrices of other projects' files as weights of `torch_moelora.formats`.

None of their packages is needed.

Each function takes the name of a weight and its tensors, by what follows the name in the file, and returns a
PackedWeight with E = 1 (`gpt_oss`: all experts). Codes that can stay as they are stay where they are. What no
format has is a MoeloraError that names the tensor, what was expected and what came.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from moelora.errors import MoeloraError, one_line
from torch_moelora.formats import E4M3, FORMATS, NESTED_RUN, PackedWeight, e8m0_values, nested_values

Parts = dict[str, Tensor]
_E8M0 = (torch.uint8, torch.float8_e8m0fnu)
_BLOCK = FORMATS["fp8"].groups.least
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that has column 8j + o


def need(name: str, parts: Parts, *wanted: str) -> list[Tensor]:
    """The parts of these names. Raises: MoeloraError if one is missing."""
    for part in wanted:
        if part not in parts:
            there = ", ".join(sorted(parts)) or "nothing"
            raise MoeloraError(
                f"{name}: expected the tensors {', '.join(wanted)}, {part} is missing (found {there})"
            )
    return [parts[part] for part in wanted]


def typed(name: str, part: str, tensor: Tensor, *dtypes: torch.dtype, ndim: int = 2) -> Tensor:
    """The tensor. Raises: MoeloraError unless it has one of the dtypes and so many dimensions."""
    if tensor.dtype not in dtypes:
        expected = " or ".join(map(_named, dtypes))
        raise MoeloraError(f"{name}: {part} is {_named(tensor.dtype)}, expected {expected}")
    if tensor.ndim != ndim:
        raise MoeloraError(f"{name}: {part} is {list(tensor.shape)}, expected {ndim} dimensions")
    return tensor


def checked(name: str, weight: PackedWeight) -> PackedWeight:
    """The weight. Raises: MoeloraError that names it, if its tensors do not belong together."""
    try:
        return weight.checked(name)
    except RuntimeError as error:
        raise MoeloraError(one_line(error)) from None


def gpt_oss(name: str, parts: Parts, settings: dict) -> PackedWeight:
    """_blocks uint8 [E, N, K/32, 16], _scales uint8 [E, N, K/32]."""
    codes, scale = need(name, parts, "_blocks", "_scales")
    codes = typed(name, "_blocks", codes, torch.uint8, ndim=4)
    return checked(name, PackedWeight(codes.flatten(2), scale, None, None, "mxfp4"))


def fp8(name: str, parts: Parts, settings: dict) -> PackedWeight:
    """weight float8_e4m3fn [N, K], scales of blocks, rows or the whole; or two E2M1 a byte, DeepSeek-V4's."""
    spelling = next((part for part in ("weight_scale_inv", "weight_scale", "scale") if part in parts), None)
    codes, scale = need(name, parts, "weight", spelling or "weight_scale_inv")
    if codes.dtype == torch.int8 and scale.dtype in _E8M0:
        return _mxfp4(name, codes.view(torch.uint8), scale)
    codes = typed(name, "weight", codes, E4M3)
    grid, block = _grid(scale), settings.get("weight_block_size") or (_BLOCK, _BLOCK)
    for size, scales, each in zip(codes.shape, grid.shape[1:], block, strict=False):
        if scales not in (1, size) and each != _BLOCK:
            raise MoeloraError(f"{name}: blocks of {block}, expected {[_BLOCK, _BLOCK]}: {OF_FP8}")
    return checked(name, PackedWeight(codes[None], grid, None, None, "fp8"))


def _grid(scale: Tensor) -> Tensor:
    """[1, r, c] in float32 or bfloat16."""
    if scale.dtype in _E8M0:
        scale = e8m0_values(scale.view(torch.uint8))
    elif scale.dtype == torch.float16:
        scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(1, 1, 1)
    return scale[None, :, None] if scale.ndim == 1 else scale[None]


def compressed_tensors(name: str, parts: Parts, settings: dict) -> PackedWeight:
    """By what is there: integers of 4 or 8 bits in weight_packed, NVFP4, MXFP4, or 8-bit codes in weight."""
    _check_order(name, parts)
    if "weight_packed" not in parts:
        codes, scale = need(name, parts, "weight", "weight_scale")
        if codes.dtype != torch.int8:
            return fp8(name, parts, settings)
        if "weight_zero_point" in parts and bool(parts["weight_zero_point"].any()):
            raise MoeloraError(f"{name}: int8 with zero points, which no format has: {OTHER_WAY}")
        return checked(name, PackedWeight(codes[None], _per_row(scale)[None], None, None, "int8"))
    codes, scale = need(name, parts, "weight_packed", "weight_scale")
    if codes.dtype == torch.int32:
        return _packed_integers(name, parts, settings)
    if scale.dtype in _E8M0:
        return _mxfp4(name, codes, scale)
    return _nvfp4(name, codes, scale, 1 / need(name, parts, "weight_global_scale")[0].float())


def _check_order(name: str, parts: Parts) -> None:
    """Groups must be of successive columns. With a -1 in weight_g_idx they are."""
    g_idx, scale = parts.get("weight_g_idx"), parts.get("weight_scale")
    if g_idx is None or scale is None or bool((g_idx == -1).any()):
        return
    if not _in_order(g_idx, g_idx.numel(), scale.shape[1] if scale.ndim == 2 else 1):
        raise MoeloraError(f"{name}: weight_g_idx permutes the columns: {NOT_PERMUTED}")


def _packed_integers(name: str, parts: Parts, settings: dict) -> PackedWeight:
    """weight_packed int32 [N, K·bits/32], low bits first; zero points the same along N."""
    codes, scale, shape = need(name, parts, "weight_packed", "weight_scale", "weight_shape")
    if shape.numel() != 2:
        raise MoeloraError(f"{name}: weight_shape is {list(shape.shape)}, expected two numbers")
    codes, (rows, columns) = typed(name, "weight_packed", codes, torch.int32), map(int, shape.flatten())
    bits = 32 * codes.shape[-1] // max(columns, 1)
    if bits not in (4, 8) or tuple(codes.shape) != (rows, columns * bits // 32):
        raise MoeloraError(
            f"{name}: weight_packed is {list(codes.shape)} for a weight_shape of {[rows, columns]}, expected "
            f"{[rows, columns // 8]} (4 bits) or {[rows, columns // 4]} (8 bits)"
        )
    scale, zero = _per_row(scale), parts.get("weight_zero_point")
    if bits == 8:
        if zero is not None:
            raise MoeloraError(f"{name}: 8 bits with zero points, which no format has: {OTHER_WAY}")
        signed = (codes.contiguous().view(torch.uint8) ^ 0x80).view(torch.int8)  # stored with 128 added
        return checked(name, PackedWeight(signed[None], scale[None], None, None, "int8"))
    if zero is not None:  # both have 8 added
        zero = _nibbles(typed(name, "weight_zero_point", zero, torch.int32), 0)[:rows]
        zero = zero.contiguous()[None]
    packed = codes.contiguous().view(torch.uint8)
    return checked(name, PackedWeight(packed[None], scale[None], None, zero, "int4"))


def modelopt(name: str, parts: Parts, settings: dict) -> PackedWeight:
    """NVFP4: weight uint8, weight_scale float8_e4m3fn, weight_scale_2 a multiplier; or FP8."""
    codes, scale = need(name, parts, "weight", "weight_scale")
    if codes.dtype == E4M3:
        return fp8(name, parts, settings)
    return _nvfp4(name, codes, scale, need(name, parts, "weight_scale_2")[0].float())


def _nvfp4(name: str, codes: Tensor, scale: Tensor, scale2: Tensor) -> PackedWeight:
    codes, scale = typed(name, "codes", codes, torch.uint8), typed(name, "weight_scale", scale, E4M3)
    if scale2.numel() != 1:
        raise MoeloraError(f"{name}: its global scale is {list(scale2.shape)}, expected one number")
    return checked(name, PackedWeight(codes[None], scale[None], scale2.reshape(1, 1), None, "nvfp4"))


def _mxfp4(name: str, codes: Tensor, scale: Tensor) -> PackedWeight:
    codes = typed(name, "codes", codes, torch.uint8)
    return checked(name, PackedWeight(codes[None], scale.view(torch.uint8)[None], None, None, "mxfp4"))


def bitsandbytes(name: str, parts: Parts, settings: dict) -> PackedWeight:
    """weight uint8 [N·K/2, 1], absmax of each block of the flat weight, and the rest in a JSON of bytes."""
    state_name = next((part for part in parts if part.startswith(_STATE)), _STATE + "nf4")
    codes, absmax, raw = need(name, parts, "weight", "weight.absmax", state_name)
    state = _json(name, state_name, raw)
    kind, block, shape = state.get("quant_type"), state.get("blocksize"), state.get("shape")
    sizes = [block, *shape] if isinstance(shape, list) else []
    whole = len(sizes) == 3 and all(isinstance(size, int) and size > 0 for size in sizes)
    if kind not in ("nf4", "fp4") or not whole:
        raise MoeloraError(
            f"{name}: {state_name} says {state}, expected nf4 or fp4 with a blocksize and a shape"
        )
    rows, columns = shape
    if columns % block:
        raise MoeloraError(
            f"{name}: blocks of {block} across rows of {columns}, which no format has: {OTHER_WAY}"
        )
    if (codes.numel(), absmax.numel()) != (rows * columns // 2, rows * columns // block):
        raise MoeloraError(
            f"{name}: {codes.numel()} bytes of codes and {absmax.numel()} of absmax for {rows}×{columns} in "
            f"blocks of {block}, expected {rows * columns // 2} and {rows * columns // block}"
        )
    _same_map(name, "weight.quant_map", parts, torch.tensor(FORMATS[kind].codes, dtype=torch.float32))
    scale2 = None
    if "nested_blocksize" in state or "weight.nested_absmax" in parts:
        scale2 = _nested(name, parts, state)
    scale = absmax.view(1, rows, columns // block)
    return checked(name, PackedWeight(codes.view(1, rows, columns // 2), scale, scale2, None, kind))


_STATE = "weight.quant_state.bitsandbytes__"


def _nested(name: str, parts: Parts, state: dict) -> Tensor:
    (absmax2,) = need(name, parts, "weight.nested_absmax")
    if state.get("nested_blocksize") != NESTED_RUN:
        raise MoeloraError(f"{name}: nested blocks of {state.get('nested_blocksize')}, expected {NESTED_RUN}")
    _same_map(name, "weight.nested_quant_map", parts, nested_values())
    offset = state.get("nested_offset", 0)
    if not isinstance(offset, int | float):
        raise MoeloraError(f"{name}: its nested_offset is {offset!r}, expected a number")
    absmax2 = typed(name, "weight.nested_absmax", absmax2, torch.float32, ndim=1)
    offset = torch.tensor(offset, dtype=torch.float32)
    return torch.stack((absmax2, offset.expand_as(absmax2)), 1)


def _same_map(name: str, part: str, parts: Parts, own: Tensor) -> None:
    found = parts.get(part)
    if found is not None and not torch.equal(found.float(), own):
        raise MoeloraError(f"{name}: {part} is another map of codes than the operators have: {OTHER_WAY}")


def _json(name: str, part: str, raw: Tensor) -> dict[str, Any]:
    try:
        found = json.loads(bytes(typed(name, part, raw, torch.uint8, ndim=1).tolist()))
    except ValueError as error:
        raise MoeloraError(f"{name}: {part} is no JSON: {one_line(error)}") from None
    return found if isinstance(found, dict) else {}


def gptq(name: str, parts: Parts, settings: dict) -> PackedWeight:
    """qweight int32 [K/8, N], scales [K/g, N], qzeros int32 [K/g, N/8], g_idx [K]."""
    qweight, scales, qzeros = need(name, parts, "qweight", "scales", "qzeros")
    codes = _nibbles(typed(name, "qweight", qweight, torch.int32), 0)
    zero = _nibbles(typed(name, "qzeros", qzeros, torch.int32), 1)
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zero = zero + 1  # it stores one less
    weight, g_idx = _transposed(name, codes, scales, zero), parts.get("g_idx")
    if g_idx is not None and not _in_order(g_idx, codes.shape[0], scales.shape[0]):
        raise MoeloraError(f"{name}: g_idx permutes the columns (desc_act): {NOT_PERMUTED}")
    return weight


def awq(name: str, parts: Parts, settings: dict) -> PackedWeight:
    """qweight int32 [K, N/8], columns in an order of their own, as qzeros [K/g, N/8]; scales [K/g, N]."""
    qweight, scales, qzeros = need(name, parts, "qweight", "scales", "qzeros")
    codes, zero = (
        _nibbles(typed(name, part, t, torch.int32), 1).unflatten(1, (-1, 8))[:, :, _AWQ_ORDER].flatten(1)
        for part, t in (("qweight", qweight), ("qzeros", qzeros))
    )
    return _transposed(name, codes, scales, zero)


def _nibbles(words: Tensor, dim: int) -> Tensor:
    """int32 with 8 nibbles, low ones first → uint8, 8 times as long along `dim`."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    spread = (words.unsqueeze(-1) >> shifts) & 15
    return (spread.flatten(-2) if dim else spread.transpose(-1, -2).flatten(0, 1)).to(torch.uint8)


def _transposed(name: str, codes: Tensor, scales: Tensor, zero: Tensor) -> PackedWeight:
    """codes uint8 [K, N] of a nibble each, scales and zero [K/g, N] → int4 [1, N, K]."""
    (columns, rows), groups = codes.shape, len(scales) if scales.ndim else 0
    if scales.shape != (groups, rows) or zero.shape != (groups, rows) or columns % 2:
        raise MoeloraError(
            f"{name}: qweight of {columns}×{rows} with scales {list(scales.shape)} and zeros "
            f"{list(zero.shape)}, expected both to be {[groups, rows]}"
        )
    codes = codes.t()
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).contiguous()
    symmetric = bool((zero == 8).all())
    zero = None if symmetric else zero.t().contiguous()[None]
    return checked(name, PackedWeight(packed[None], scales.t().contiguous()[None], None, zero, "int4"))


def _in_order(g_idx: Tensor, columns: int, groups: int) -> bool:
    """Whether column k is in group k // (columns // groups)."""
    plain = torch.arange(columns) // max(columns // max(groups, 1), 1)
    return g_idx.numel() == columns and torch.equal(g_idx.long(), plain)


def _per_row(scale: Tensor) -> Tensor:
    return scale[:, None] if scale.ndim == 1 else scale


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


OTHER_WAY = "take the dense checkpoint and `python -m moelora quantize` it"
OF_FP8 = (
    f"{OTHER_WAY}, which AutoModelForCausalLM.from_pretrained(DIR, quantization_config="
    "FineGrainedFP8Config(dequantize=True)).save_pretrained(OUT) writes"
)
NOT_PERMUTED = f"use one quantised without act-order (desc_act: false), or {OTHER_WAY}"
