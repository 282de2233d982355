"""What operators say of a packed weight that its format does not take, as csrc/ops/weight_checks.cpp does:
(changes of valid arguments, message).
"""

from __future__ import annotations

import packings
import torch
from packings import BF16, E4M3, FP32, U8, Packing

FP64 = torch.float64
NF4 = "when weight_format is nf4"


def e(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


FORMAT = "weight_format"
SCALE, SCALE2, ZERO = "weight_scale", "weight_scale2", "weight_zero"


def packed(name: str, k: int = 64, n: int = 5, **changes) -> dict:
    """A valid weight [3, n, k] of a format, with changes."""
    scale_dtype = U8 if name == "nested" else FP32
    name = "nf4" if name == "nested" else name
    group = {"nvfp4": 16, "mxfp4": 32}.get(name, 0)
    weight = packings.build(Packing(name, group, scale_dtype), 3, n, k, torch.Generator().manual_seed(0))
    return weight.operands() | changes


def codes(lead: str) -> list[tuple[dict, str]]:
    half = "torch.bfloat16, torch.float16 or torch.float32"
    return [
        ({FORMAT: "nf5"}, "weight_format must be dense, nf4, fp4, int4, mxfp4, nvfp4, int8 or fp8, got nf5"),
        ({SCALE: e(3, 5, 1)}, "weight_scale must be None when weight_format is dense, got shape [3, 5, 1]"),
        ({SCALE2: e(3, 1)}, "weight_scale2 must be None when weight_format is dense, got shape [3, 1]"),
        ({ZERO: e(3, 5, 1)}, "weight_zero must be None when weight_format is dense, got shape [3, 5, 1]"),
        (
            {"weight_transposed": True},
            "weight_transposed must be False when weight_format is dense, got True",
        ),
        (
            packed("nf4") | {lead: lambda t: t.to(FP64)},
            f"{lead} must have dtype {half} {NF4}, got torch.float64",
        ),
        (
            packed("nf4", weight=e(5, 32, dtype=U8)),
            "weight must be a 3-D tensor [E, N, K/2], got shape [5, 32]",
        ),
        (
            packed("int8", weight=e(5, 64, dtype=torch.int8), weight_transposed=True),
            "weight must be a 3-D tensor [E, K, N], got shape [5, 64]",
        ),
        (packed("nf4", weight=e(3, 5, 32)), f"weight must have dtype torch.uint8 {NF4}, got torch.bfloat16"),
        (
            packed("nf4", weight=e(4, 5, 32, dtype=U8)),
            "weight must have 3 experts (the length of expert_offsets), got shape [4, 5, 32]",
        ),
        (
            packed("nf4", weight=e(3, 5, 0, dtype=U8)),
            "weight must have N and K of at least 1, got shape [3, 5, 0]",
        ),
        (
            packed("nf4", weight=e(3, 5, 64, dtype=U8)[:, :, ::2]),
            f"weight must have a last stride of 1 {NF4}, got 2",
        ),
    ]


def scales() -> list[tuple[dict, str]]:
    into = "weight_scale must have a last size that divides K=64 into groups of"
    tiles = "(N=130, K=200 in tiles of 128)"
    return [
        (packed("nf4", weight_scale=None), f"weight_scale must be given {NF4}, got None"),
        (
            packed("nf4", weight_scale=e(3, 5, 1)),
            f"weight_scale must have dtype torch.float32 or torch.uint8 {NF4}, got torch.bfloat16",
        ),
        (
            packed("int8", weight_scale=e(3, 5, 1, dtype=U8)),
            "weight_scale must have dtype torch.float32, torch.bfloat16 or torch.float16 "
            "when weight_format is int8, got torch.uint8",
        ),
        (
            packed("nf4", weight_scale=e(3, 5, 3, dtype=FP32)),
            f"{into} a power of two, at least 32 {NF4}, got shape [3, 5, 3]",
        ),
        (
            packed("nf4", weight_scale=e(3, 5, 4, dtype=FP32)),
            f"{into} a power of two, at least 32 {NF4}, got shape [3, 5, 4]",
        ),
        (
            packed("nf4", weight_scale=e(15, dtype=FP32)),
            f"{into} a power of two, at least 32 {NF4}, got shape [15]",
        ),
        (
            packed("int4", weight_scale=e(3, 5, 4)),
            f"{into} all or of a multiple of 32 when weight_format is int4, got shape [3, 5, 4]",
        ),
        (
            packed("nf4", weight_scale=e(3, 4, 2, dtype=FP32)),
            "weight_scale must have shape [3, 5, 2] (E=3, N=5, K/32), got [3, 4, 2]",
        ),
        (
            packed("nf4", weight_scale=e(3, 4, 2, dtype=FP32), weight_transposed=True),
            "weight_scale must have shape [3, 5, 2] (E=3, K=5, N/32), got [3, 4, 2]",
        ),
        (
            packed("mxfp4", weight_scale=e(30, dtype=U8)),
            "weight_scale must have shape [3, 5, 2] (E=3, N=5, K/32), got [30]",
        ),
        (
            packed("mxfp4", weight=e(3, 5, 20, dtype=U8)),
            "weight must have K that is a multiple of 32 when weight_format is mxfp4, got K=40",
        ),
        (
            packed("nvfp4", weight_scale=e(3, 5, 5, dtype=E4M3)),
            "weight_scale must have shape [3, 5, 4] (E=3, N=5, K/16), got [3, 5, 5]",
        ),
        *(
            (
                packed("fp8", 200, 130, weight_scale=e(*shape, dtype=FP32)),
                f"weight_scale must have shape [3, 130 or 2 or 1, 2 or 1] {tiles}, got {list(shape)}",
            )
            for shape in ((3, 3, 2), (3, 2, 3), (2, 2, 2), (2, 2))
        ),
    ]


def scales_of_scales_and_zeros() -> list[tuple[dict, str]]:
    return [
        (
            packed("nf4", weight_scale2=e(1, 2, dtype=FP32)),
            "weight_scale2 must be None when weight_scale has dtype torch.float32, got shape [1, 2]",
        ),
        (
            packed("nested", weight_scale2=None),
            "weight_scale2 must be given when weight_scale has dtype torch.uint8, got None",
        ),
        (
            packed("nested", weight_scale2=e(1, 2)),
            "weight_scale2 must have dtype torch.float32, got torch.bfloat16",
        ),
        (
            packed("nested", weight_scale2=e(2, 2, dtype=FP32)),
            "weight_scale2 must have shape [1, 2] (one for 256 of 15 scales), got [2, 2]",
        ),
        (
            packed("nvfp4", weight_scale2=None),
            "weight_scale2 must be given when weight_format is nvfp4, got None",
        ),
        *(
            (
                packed("nvfp4", weight_scale2=e(*shape, dtype=FP32)),
                f"weight_scale2 must have shape [3, P] with P that divides N=5, got {list(shape)}",
            )
            for shape in ((3, 2), (3, 0), (2, 1), (3,))
        ),
        (
            packed("int8", weight_scale2=e(3, 1, dtype=FP32)),
            "weight_scale2 must be None when weight_format is int8, got shape [3, 1]",
        ),
        (
            packed("nf4", weight_zero=e(3, 5, 1, dtype=U8)),
            f"weight_zero must be None {NF4}, got shape [3, 5, 1]",
        ),
        (
            packed("int4", weight_zero=e(3, 5, 1)),
            "weight_zero must have dtype torch.uint8, got torch.bfloat16",
        ),
        (
            packed("int4", weight_zero=e(3, 5, 2, dtype=U8)),
            "weight_zero must have shape [3, 5, 1] (that of weight_scale), got [3, 5, 2]",
        ),
    ]


def packed_weight(lead: str) -> list[tuple[dict, str]]:
    rows = [*codes(lead), *scales(), *scales_of_scales_and_zeros()]
    columns = {
        "x": "x must have 64 columns (K of weight), got shape [6, 8]",
        "dy": "dy must have 6 columns (N of weight), got shape [6, 5]",
    }
    return [*rows, (packed("int8", n=6), columns[lead])]
