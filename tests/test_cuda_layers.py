"""The operators on a GPU at real layer shapes."""

import problems
import pytest
import torch
from cases import BF16, FP16, FP32
from cuda_cases import LAYERS, NEEDS_CUDA, build, check

from torch_moelora import reference

pytestmark = NEEDS_CUDA

# Thousands of products, added up one after the other.
LONG_FP32_TOLERANCE = 4e-6

# TF32 keeps ten bits of each factor.
TF32_TOLERANCE = 2e-3


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("rows", [4, 64, 256, 1024])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers(layer, rows, rank):
    """bf16, at so many rows an expert that each row of the table for these shapes is met."""
    check(layer.with_(dtype=BF16, experts=16, tokens=rows * 16 // layer.top_k, rank=rank))


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers_in_other_dtypes(layer, dtype, monkeypatch):
    monkeypatch.setitem(problems.TOLERANCE, FP32, LONG_FP32_TOLERANCE)
    check(layer.with_(dtype=dtype, lora="same", experts=8, tokens=256 * 8 // layer.top_k, rank=16))


def test_tf32_where_torch_allows_it(monkeypatch):
    """More than fp32's error, less than TF32's bound: the switch is obeyed, both ways."""
    case = LAYERS["gate_up of Qwen3-30B-A3B"].with_(dtype=FP32, lora="same", experts=8, tokens=256, rank=16)
    p = build(case)
    ref = reference.scatter_lora(*p.forward_args())
    errors = {}
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        out = torch.ops.moelora.scatter_lora(*p.forward_args())
        errors[allowed] = ((out - ref).norm() / ref.norm()).item()
    assert errors[False] < LONG_FP32_TOLERANCE < errors[True] < TF32_TOLERANCE
