"""Packed weights: to the bit what the dense operators give on the numbers that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from cases import BF16, FP16, FP32
from torch import Tensor

from torch_moelora.switches import SWITCHES

pytestmark = [
    pytest.mark.operators,
    pytest.mark.skipif(SWITCHES.backend == "triton", reason="to the bit on CPU only"),
]

NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
        1.0,
    ]
)  # fmt: skip
FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
VALUES = {
    "nf4": NF4,
    "fp4": torch.cat([FP4, 0 - FP4]),
    "int4": torch.arange(16.0) - 8,
    "mxfp4": torch.cat([E2M1, -E2M1]),
    "nvfp4": torch.cat([E2M1, -E2M1]),
}
HIGH_FIRST = ("nf4", "fp4")
E4M3 = torch.float8_e4m3fn


def nested_values() -> Tensor:
    """bitsandbytes' signed 8-bit map: between 2^i equal parts of [0.1, 1], each ten times the one before."""
    data = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        data += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(data))


@dataclass(frozen=True)
class Packing:
    """How a weight [E, N, K] is packed. tiles: rows and columns of an fp8 scale, 0 for all."""

    format: str
    group: int
    scale: torch.dtype = FP32
    zero: bool = False
    nested: bool = False
    parts: int = 1
    tiles: tuple[int, int] = (1, 0)
    strided: bool = False

    @property
    def name(self) -> str:
        extra = [
            str(self.scale).split(".")[1],
            *(k for k in ("zero", "nested", "strided") if getattr(self, k)),
        ]
        return "-".join(
            [self.format, str(self.group), *extra, *(f"{t}" for t in self.tiles if self.format == "fp8")]
        )


@dataclass
class Weight:
    """Codes and scales of [E, N, K], and the numbers in fp32."""

    codes: Tensor
    numbers: Tensor
    args: dict = field(default_factory=dict)


def spaced(t: Tensor) -> Tensor:
    """The same numbers with every stride doubled but a last one of codes, which must be 1."""
    wide = torch.zeros([2 * s for s in t.shape], dtype=t.dtype)
    view = wide[tuple(slice(0, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


def random_scales(p: Packing, shape: tuple, gen: torch.Generator) -> Tensor:
    if p.format == "mxfp4":
        return torch.randint(110, 130, shape, generator=gen, dtype=torch.uint8)
    if p.format == "nvfp4":
        return (torch.rand(shape, generator=gen) * 100 + 0.01).to(E4M3)
    if p.nested:
        return torch.randint(0, 256, shape, generator=gen, dtype=torch.uint8)
    return (torch.rand(shape, generator=gen) * 0.2 + 0.001).to(p.scale)


def scale_values(p: Packing, scale: Tensor, scale2: Tensor | None) -> Tensor:
    if p.format == "mxfp4":
        exponent = scale.double() - 127
        return torch.where(scale == 255, torch.nan, 2.0**exponent).float()
    if p.format == "nvfp4":
        e, n, _ = scale.shape
        return scale.float() * scale2.repeat_interleave(n // p.parts, 1).view(e, n, 1)
    if p.nested:
        block = torch.arange(scale.numel()).view(scale.shape) // 256
        return nested_values()[scale.long()] * scale2[block, 0] + scale2[block, 1]
    return scale.float()


def pack(p: Packing, e: int, n: int, k: int, seed: int = 0) -> Weight:
    gen = torch.Generator().manual_seed(seed)
    args = {"weight_format": p.format}
    zero = None
    if p.format in VALUES:
        nibbles = torch.randint(0, 16, (e, n, k), generator=gen, dtype=torch.uint8)
        first, second = nibbles[..., ::2], nibbles[..., 1::2]
        codes = first << 4 | second if p.format in HIGH_FIRST else second << 4 | first
        values = VALUES[p.format][nibbles.long()]
    elif p.format == "int8":
        codes = torch.randint(-128, 128, (e, n, k), generator=gen, dtype=torch.int8)
        values = codes.float()
    else:
        bits = torch.randint(0, 254, (e, n, k), generator=gen, dtype=torch.uint8)
        bits = torch.where(bits >= 127, bits + 1, bits)
        codes, values = bits.view(E4M3), bits.view(E4M3).float()
    if p.format == "fp8":
        rows, cols = p.tiles[0] or n, p.tiles[1] or k
        scale = random_scales(p, (e, -(-n // rows), -(-k // cols)), gen)
        spread = scale.float().repeat_interleave(rows, 1)[:, :n].repeat_interleave(cols, 2)[..., :k]
        args["weight_scale"] = scale
    else:
        scale, scale2 = random_scales(p, (e, n, k // p.group), gen), None
        if p.format == "nvfp4":
            scale2 = torch.rand((e, p.parts), generator=gen) * 0.01 + 1e-4
        if p.nested:
            blocks = -(-scale.numel() // 256)
            scale2 = torch.rand((blocks, 2), generator=gen) * 0.2
        if p.zero:
            zero = torch.randint(0, 16, scale.shape, generator=gen, dtype=torch.uint8)
            values = values + 8 - zero.float().repeat_interleave(p.group, 2)
        spread = scale_values(p, scale, scale2).repeat_interleave(p.group, 2)
        args |= {"weight_scale": scale, "weight_scale2": scale2, "weight_zero": zero}
    if p.strided:
        args = {key: spaced(t) if isinstance(t, Tensor) else t for key, t in args.items()}
        wide = torch.zeros((2 * e, 2 * n, codes.shape[2]), dtype=codes.dtype)
        wide[::2, ::2] = codes
        codes = wide[::2, ::2]
    return Weight(codes, values * spread, args)


PACKINGS = [
    Packing("int8", 0),
    Packing("int8", 32, scale=BF16),
    Packing("int8", 64, scale=FP16, strided=True),
    Packing("fp8", 0),
    Packing("fp8", 0, tiles=(128, 128)),
    Packing("fp8", 0, tiles=(0, 0), scale=BF16),
    Packing("fp8", 0, tiles=(1, 128), strided=True),
    Packing("int4", 32, scale=BF16),
    Packing("int4", 96, scale=FP16, zero=True),
    Packing("int4", 0, zero=True, strided=True),
    Packing("nf4", 64),
    Packing("nf4", 32, nested=True),
    Packing("nf4", 64, nested=True, strided=True),
    Packing("fp4", 32, strided=True),
    Packing("mxfp4", 32),
    Packing("nvfp4", 16, parts=2),
    Packing("nvfp4", 16, strided=True),
]


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


def sized(p: Packing, k: int) -> Packing:
    """A group of 0 is all of K."""
    return p if p.group else Packing(**{**p.__dict__, "group": k})


SIZES = [
    (96, 192, [7, 0, 2, 31]),
    (30, 576, [1, 70, 3, 2]),
    (160, 96, [200, 5, 0, 11]),
    (1090, 192, [40, 0, 3, 13]),  # contracted over rows of codes: several passes
    (20, 2112, [17, 0, 5, 26]),  # over columns: several passes, some with rows that become dot products
]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: p.name)
def test_packed_is_dense_to_the_bit(packing, dtype):
    for n, k, rows in SIZES:
        if packing.group and k % packing.group:
            continue
        for turned in (False, True):
            w = pack(sized(packing, k), len(rows), n, k)
            numbers = w.numbers.to(dtype)
            out, inner = (k, n) if turned else (n, k)
            call = call_of(dtype, rows, out, inner)
            packed = call.results(w.codes, weight_transposed=turned, **w.args)
            assert_same_bits(packed, call.results(numbers.transpose(1, 2) if turned else numbers))
