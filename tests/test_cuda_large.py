"""The operators on a GPU beyond 2³¹ elements."""

import pytest
import torch
from cases import BF16
from cuda_cases import DEVICE, NEEDS_CUDA
from torch import Tensor

pytestmark = NEEDS_CUDA


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
