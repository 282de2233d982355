"""Whole layers of models that are in use, with few and with many rows an expert, against the reference."""

import problems
import pytest
from cases import BF16, FP32, REAL_SIZE, Case

pytestmark = pytest.mark.long

SHAPES = {
    "Qwen3-30B-A3B's gate_up": REAL_SIZE,
    "Qwen3-30B-A3B's down": REAL_SIZE.with_(k=768, n=2048),
    "gpt-oss-20b's gate_up, stored transposed": Case(
        experts=2, top_k=2, k=2880, n=5760, rank=8, dtype=BF16, bias="same", weight_layout="transposed"
    ),
    "OLMoE's down, rank 64, fp32": Case(experts=8, top_k=4, k=1024, n=2048, rank=64, dtype=FP32),
}


@pytest.mark.parametrize("tokens", [3, 70, 1100])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gates", ["none", "same"])
def test_all_operators(shape, tokens, gates):
    case = shape.with_(tokens=tokens, gates=gates)
    p = problems.build(case)
    lora = FP32 if case.lora == "fp32" else case.dtype
    problems.check("scatter_lora", p.forward_args(), case, (case.dtype,))
    problems.check("scatter_lora_dx", p.dx_args(), case, (case.dtype, FP32))
    problems.check("scatter_lora_dab", p.dab_args(), case, (lora, lora))
    if tokens > 3:  # of millions of sums of a few terms, some cancel to an exact zero that rounding leaves
        problems.check("scatter_lora_dw", p.dw_args(), case, (case.dtype,))
