"""The operators on a GPU at real layer shapes, and beyond 2³¹ elements."""

import problems
import pytest
import torch
from cases import BF16, FP16, FP32
from cuda_cases import DEVICE, LAYERS, NEEDS_CUDA, build, check
from torch import Tensor

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


def room_for(gigabytes: float) -> bool:
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > gigabytes * 1e9


def routed_to(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return torch.ops.moelora.flatten_sort_count(ids.to(DEVICE).view(-1, 1), experts)


def assert_near(got: Tensor, want: Tensor) -> None:
    assert ((got.double() - want).norm() <= 4e-3 * want.norm()).item()


@pytest.mark.skipif(not room_for(30), reason="needs 30 GB of free device memory")
def test_rows_beyond_32_bits():
    """S·K and S·N past 2³¹: of x, y, dy and dx the last rows are compared."""
    size, width, tail = 4096, 32, 200
    rows = 2**31 // size + tail
    gen = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(2, width, size, dtype=BF16, device=DEVICE, generator=gen) / 64
    route = routed_to((torch.arange(rows) >= rows - tail).long(), 2)
    x = torch.randn(rows, size, dtype=BF16, device=DEVICE, generator=gen)
    y = torch.ops.moelora.scatter_lora(x, weight, *route, 1)
    assert_near(y[-tail:], x[-tail:].double() @ weight[1].double().T)
    dw = torch.ops.moelora.scatter_lora_dw(y, x, *route, 1)
    assert_near(dw[1], y[-tail:].double().T @ x[-tail:].double())
    del x, dw
    dx, _ = torch.ops.moelora.scatter_lora_dx(y, weight, *route, 1)
    assert_near(dx[-tail:], y[-tail:].double() @ weight[1].double())
    wide = torch.ops.moelora.scatter_lora(y, weight.transpose(1, 2).contiguous(), *route, 1)
    assert_near(wide[-tail:], y[-tail:].double() @ weight[1].double())


@pytest.mark.skipif(not room_for(30), reason="needs 30 GB of free device memory")
def test_weights_beyond_32_bits():
    """E·N·K past 2³¹: the last expert's product, dX and dW."""
    experts, size, rows = 33, 8192, 100
    weight = torch.zeros(experts, size, size, dtype=BF16, device=DEVICE)
    weight[-1].normal_(std=1 / 64)
    route = routed_to(torch.full((rows,), experts - 1), experts)
    x = torch.randn(rows, size, dtype=BF16, device=DEVICE)
    last = weight[-1].double()
    assert_near(torch.ops.moelora.scatter_lora(x, weight, *route, 1), x.double() @ last.T)
    dx, _ = torch.ops.moelora.scatter_lora_dx(x, weight, *route, 1)
    assert_near(dx, x.double() @ last)
    del weight
    dw = torch.ops.moelora.scatter_lora_dw(x, x, *route, 1)
    assert_near(dw[-1], x.double().T @ x.double())
    assert torch.count_nonzero(dw[:-1]) == 0
