"""The problems that operator tests run: named rows, each with its reason, and a hypothesis strategy for the
rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from packings import Packing, packings

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = (BF16, FP16, FP32, FP64)
HALVES = (BF16, FP16)

WEIGHT_LAYOUTS = (
    "contiguous",
    "transposed",  # stored [E, K, N]: gpt_oss, ScatterMoE
    "padded",  # rows further apart than K
    "sliced",  # part of a larger parameter in every dimension
    "strided",  # no dimension contiguous
    "expert_fastest",  # stored [N, K, E]
    "shared",  # stride 0: one matrix for all experts
)
LORA_LAYOUTS = ("contiguous", "peft", "sliced", "strided")
ROW_LAYOUTS = ("contiguous", "columns", "rows", "transposed", "expanded")
ROUTINGS = ("random", "one_expert", "few_experts", "sentinels", "all_sentinels")


@dataclass(frozen=True)
class Case:
    """One call. `rank` 0: no LoRA. `lora`, `bias`, `gates`: "none", "same" (x's dtype) or "fp32". `packing`:
    how a packed weight is stored; `weight_layout` is of dense ones.
    """

    tokens: int = 13
    top_k: int = 2
    experts: int = 5
    k: int = 33
    n: int = 47
    rank: int = 4
    dtype: torch.dtype = FP32
    lora: str = "same"
    bias: str = "none"
    gates: str = "none"
    x_grouped: bool = False
    y_grouped: bool = False
    weight_layout: str = "contiguous"
    lora_layout: str = "contiguous"
    x_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    index_dtype: torch.dtype = torch.int64
    routing: str = "random"
    scaling: float = 0.5
    packing: Packing | None = None
    seed: int = 0
    reason: str = ""

    @property
    def rows(self) -> int:
        """S."""
        return self.tokens * self.top_k

    def with_(self, **changes) -> Case:
        return replace(self, **changes)


# reason first: it is the test's name.
_ROWS = {
    "nothing but the base weight": Case(rank=0),
    "no tokens": Case(tokens=0, gates="same", bias="same"),
    "one token, one choice, one of everything": Case(tokens=1, top_k=1, experts=1, k=1, n=1, rank=1),
    "every row to one expert": Case(tokens=40, routing="one_expert"),
    "most experts get no row": Case(tokens=9, experts=8, routing="few_experts"),
    "sentinel ids between real ones": Case(tokens=31, routing="sentinels", gates="same"),
    "nothing but sentinels": Case(tokens=6, routing="all_sentinels", bias="same"),
    "more choices than experts: a token meets an expert twice": Case(top_k=4, experts=2, gates="same"),
    "rank above both features": Case(k=5, n=7, rank=17),
    "rank of one, features of one": Case(k=1, n=1, rank=1, tokens=20),
    "K one past a vector, N one short of it": Case(k=65, n=31, rank=9),
    "int32 indices": Case(index_dtype=torch.int32),
    "gpt_oss: stored transposed, biases on both sides": Case(
        weight_layout="transposed", bias="same", gates="same", x_grouped=True
    ),
    "down projection: rows grouped, gates fp32 over bf16": Case(
        dtype=BF16, x_grouped=True, gates="fp32", tokens=24, k=64, n=48, rank=8
    ),
    "gate_up projection: result grouped": Case(dtype=BF16, y_grouped=True, tokens=24, k=64, n=96, rank=8),
    "grouped on both sides": Case(x_grouped=True, y_grouped=True),
    "PEFT's parameters: expert fastest in B, fp32 over bf16": Case(
        dtype=BF16, lora="fp32", lora_layout="peft", rank=3, experts=6, k=40, n=24
    ),
    "weight with no contiguous dimension": Case(weight_layout="strided", lora_layout="strided"),
    "gradient of a sum: dy has strides of 0": Case(dy_layout="expanded", gates="same"),
    "gradient of a transpose: dy is column-major": Case(dy_layout="transposed"),
    "scaling of 0 still has dB = 0, not NaN": Case(scaling=0.0),
    "negative scaling": Case(scaling=-2.0),
    "fp32 bias over fp16": Case(dtype=FP16, bias="fp32", gates="fp32"),
    "128 rows an expert, sizes of a real model's slice": Case(
        tokens=512, top_k=2, experts=8, k=512, n=384, rank=16, dtype=BF16, lora="fp32"
    ),
    "6 rows an expert, real K": Case(
        tokens=24, top_k=2, experts=8, k=2048, n=192, rank=16, dtype=BF16, gates="fp32"
    ),
    "1 row an expert, real sizes": Case(
        tokens=8, top_k=1, experts=8, k=1024, n=768, rank=8, dtype=BF16, gates="fp32", x_grouped=True
    ),
    "a rank that is no LoRA any more": Case(tokens=64, k=128, n=96, rank=128, dtype=BF16),
}
_PACKED = {
    "NF4 as bitsandbytes has it, down projection": Case(
        dtype=BF16, x_grouped=True, gates="fp32", lora="fp32", k=128, n=48, packing=Packing("nf4", 64)
    ),
    "NF4 nested: runs of 256 scales cross experts": Case(
        dtype=BF16, k=256, n=37, packing=Packing("nf4", 32, torch.uint8)
    ),
    "FP4 turned": Case(k=48, n=64, packing=Packing("fp4", 64, transposed=True), gates="same"),
    "INT4 with zeros, K one group": Case(
        dtype=FP16, k=66, n=47, packing=Packing("int4", 0, BF16, zero=True), bias="same"
    ),
    "INT4, groups of 96": Case(k=192, n=5, packing=Packing("int4", 96)),
    "MXFP4: gpt_oss": Case(
        dtype=BF16, k=64, n=96, packing=Packing("mxfp4", 32, torch.uint8), bias="same", y_grouped=True
    ),
    "NVFP4, gate and up with multipliers of their own": Case(
        dtype=BF16, k=48, n=34, packing=Packing("nvfp4", 16, parts=2)
    ),
    "INT8, a scale a row, odd sizes": Case(k=33, n=47, packing=Packing("int8")),
    "FP8 in blocks, neither size a multiple": Case(
        dtype=BF16, k=200, n=130, packing=Packing("fp8", 128, rows="block")
    ),
    "FP8 in blocks, turned": Case(
        k=130, n=200, packing=Packing("fp8", 128, rows="block", transposed=True), routing="sentinels"
    ),
    "packed, 128 rows an expert": Case(
        tokens=128, experts=2, k=256, n=192, rank=16, dtype=BF16, lora="fp32", packing=Packing("nf4", 64)
    ),
    "NF4 in several strips and passes, the last of each narrower": Case(
        tokens=64, experts=2, k=640, n=290, dtype=BF16, packing=Packing("nf4", 64)
    ),
    "INT8 in several strips and passes, turned": Case(
        tokens=64, experts=2, k=290, n=672, dtype=BF16, packing=Packing("int8", 32, transposed=True)
    ),
    "FP8 in several strips and passes": Case(
        tokens=64, experts=2, k=680, n=290, dtype=BF16, packing=Packing("fp8", 128, rows="block")
    ),
}
ROWS = tuple(case.with_(reason=reason) for reason, case in _ROWS.items())
PACKED = tuple(case.with_(reason=reason) for reason, case in _PACKED.items())

REAL_SIZE = Case(
    tokens=512,
    top_k=2,
    experts=8,
    k=2048,
    n=1536,
    rank=16,
    dtype=BF16,
    lora="fp32",
    lora_layout="peft",
    reason="Qwen3-30B-A3B's gate_up at 128 rows an expert",
)

_SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100)


@st.composite
def cases(draw, packed: bool = False) -> Case:
    """Any call: sizes around vector and tile edges, every dtype, layout, order and routing; with `packed`
    every weight format as well.
    """
    if packed and draw(st.booleans()):
        packing, n, k = draw(packings())
        case = draw(cases().filter(lambda case: case.dtype != FP64))
        return case.with_(packing=packing, n=n, k=k)
    dtype = draw(st.sampled_from(DTYPES))
    kinds = ("same", "fp32") if dtype in HALVES else ("same",)
    gates = draw(st.sampled_from(("none", *kinds)))
    return Case(
        tokens=draw(st.sampled_from((0, 1, 2, 3, 5, 9, 17, 40))),
        top_k=draw(st.integers(1, 4)),
        experts=draw(st.sampled_from((1, 2, 3, 5, 9))),
        k=draw(st.sampled_from(_SIZES)),
        n=draw(st.sampled_from(_SIZES)),
        rank=draw(st.sampled_from((0, 1, 2, 3, 8, 15, 16, 17, 33, 65))),
        dtype=dtype,
        lora=draw(st.sampled_from(kinds)),
        bias=draw(st.sampled_from(("none", *kinds))),
        gates=gates,
        x_grouped=draw(st.booleans()),
        y_grouped=draw(st.booleans()) if gates == "none" else False,
        weight_layout=draw(st.sampled_from(WEIGHT_LAYOUTS)),
        lora_layout=draw(st.sampled_from(LORA_LAYOUTS)),
        x_layout=draw(st.sampled_from(ROW_LAYOUTS)),
        dy_layout=draw(st.sampled_from(ROW_LAYOUTS)),
        index_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        routing=draw(st.sampled_from(ROUTINGS)),
        scaling=draw(st.sampled_from((1.0, 0.5, -0.75, 2.0))),
        seed=draw(st.integers(0, 2**20)),
    )
