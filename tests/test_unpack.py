"""Packed weights: to the bit what the dense operators give on the numbers that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from packings import BF16, BLOCK, FP16, FP32, U8, Packing, build
from torch import Tensor

from torch_moelora.switches import SWITCHES

pytestmark = [
    pytest.mark.operators,
    pytest.mark.skipif(SWITCHES.backend == "triton", reason="ways of the CPU kernels"),
]

PACKINGS = [
    Packing("int8"),
    Packing("int8", 32, BF16),
    Packing("int8", 64, FP16, layout="strided"),
    Packing("fp8"),
    Packing("fp8", BLOCK, rows="block"),
    Packing("fp8", 0, BF16, rows="all"),
    Packing("fp8", BLOCK, layout="strided"),
    Packing("int4", 32, BF16),
    Packing("int4", 96, FP16, zero=True),
    Packing("int4", 0, zero=True, layout="strided"),
    Packing("nf4", 64),
    Packing("nf4", 32, U8),
    Packing("nf4", 64, U8, layout="strided"),
    Packing("fp4", 32, layout="strided"),
    Packing("mxfp4", 32),
    Packing("nvfp4", 16, parts=2),
    Packing("nvfp4", 16, layout="strided"),
]


def name_of(p: Packing) -> str:
    extra = [word for word, said in (("zero", p.zero), ("strided", p.layout == "strided")) if said]
    return "-".join([p.format, str(p.group), str(p.scale_dtype).split(".")[1], p.rows, *extra])


def spaced(codes: Tensor) -> Tensor:
    """The same codes in every second row of every second expert."""
    e, n, k = codes.shape
    wide = torch.zeros((2 * e, 2 * n, k), dtype=U8)[::2, ::2]
    return wide.copy_(codes.view(U8)).view(codes.dtype)


def routing(rows: list[int], top_k: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Slots in a random order, so many for each expert."""
    gen = torch.Generator().manual_seed(seed)
    slots = torch.randperm(sum(rows), generator=gen)
    offsets = torch.tensor(rows).cumsum(0).to(torch.int32)
    return torch.cat([s.sort().values for s in slots.split(rows)]), offsets


@dataclass
class Call:
    """Arguments of the three operators but the weight."""

    x: Tensor
    dy: Tensor
    routing: tuple
    lora: tuple
    gates: Tensor

    def results(self, weight: Tensor, **packed) -> list[Tensor]:
        ops, rest = torch.ops.moelora, (*self.lora, 0.5, None, self.gates)
        y = ops.scatter_lora(self.x, weight, *self.routing, *rest, **packed)
        dx, dgates = ops.scatter_lora_dx(self.dy, weight, *self.routing, *rest, self.x, **packed)
        joint = ops.scatter_lora_backward(self.dy, self.x, weight, *self.routing, *rest, **packed)
        return [y, dx, dgates, *joint]


def call_of(dtype: torch.dtype, rows: list[int], n: int, k: int, top_k: int = 2) -> Call:
    gen = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen).to(dtype)

    tokens, e = sum(rows) // top_k, len(rows)
    gates = torch.rand((tokens, top_k), generator=gen)
    lora = normal(e, 4, k) / 8, normal(e, n, 4)
    return Call(normal(tokens, k), normal(tokens, n), (*routing(rows, top_k), top_k), lora, gates)


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        both_nan = g.isnan() & w.isnan()
        assert torch.equal(g.masked_fill(both_nan, 0), w.masked_fill(both_nan, 0)), f"result {i}"


SIZES = [
    (96, 192, [7, 0, 2, 31]),
    (30, 576, [1, 70, 3, 2]),
    (160, 96, [200, 5, 0, 11]),
    (1090, 192, [40, 0, 3, 13]),  # contracted over rows of codes: several passes
    (20, 2112, [17, 0, 5, 26]),  # over columns: several passes, some with rows that become dot products
]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("packing", PACKINGS, ids=name_of)
def test_packed_is_dense_to_the_bit(packing, dtype):
    for stored_rows, columns, rows in SIZES:
        if packing.group not in (0, BLOCK) and columns % packing.group:
            continue
        for transposed in (False, True):
            p = replace(packing, transposed=transposed)
            out, inner = p.sizes(stored_rows, columns)
            weight = build(p, len(rows), out, inner, torch.Generator().manual_seed(0))
            if p.layout == "strided":
                weight = weight._replace(codes=spaced(weight.codes))
            call = call_of(dtype, rows, out, inner)
            packed = weight.operands()
            got = call.results(packed.pop("weight"), **packed)
            assert_same_bits(got, call.results(weight.dequantize(dtype)))


@pytest.mark.parametrize("scales", ["usual", "subnormal", "extreme", "special"])
@pytest.mark.parametrize("packing", [p for p in PACKINGS if p.format in ("int8", "fp8")], ids=name_of)
def test_few_rows_are_dense_to_the_bit(packing, scales):
    """Whatever way codes take to dot products: with NaN among them, and scales for no fast way."""
    rows = [1, 2, 3, 0, 4]
    p = replace(packing, scales=scales)
    for n, k in ((30, 576), (10, 2112), (7, 192)):
        weight = build(p, len(rows), n, k, torch.Generator().manual_seed(1))
        call = call_of(BF16, rows, n, k)
        packed = weight.operands()
        got = call.results(packed.pop("weight"), **packed)
        assert_same_bits(got, call.results(weight.dequantize(BF16)))
