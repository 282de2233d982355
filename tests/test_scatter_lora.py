"""scatter_lora against the reference."""

import problems
import pytest
import torch
from cases import BF16, FP32, LORA_LAYOUTS, PACKED, REAL_SIZE, ROW_LAYOUTS, ROWS, WEIGHT_LAYOUTS, Case, cases
from hypothesis import given

from torch_moelora import reference
from torch_moelora.switches import SWITCHES

pytestmark = pytest.mark.operators


def check(case: Case) -> None:
    problems.check("scatter_lora", problems.build(case).forward_args(), case, (case.dtype,))


@pytest.mark.parametrize("case", [*ROWS, *PACKED], ids=lambda case: case.reason)
def test_rows(case):
    check(case)


@given(cases(packed=True))
def test_matches_reference(case):
    check(case)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
def test_weight_layouts(layout, dtype):
    check(Case(dtype=dtype, weight_layout=layout, tokens=50, k=70, n=52, rank=5))


@pytest.mark.parametrize("layout", LORA_LAYOUTS)
def test_lora_layouts(layout):
    check(Case(dtype=BF16, lora="fp32", lora_layout=layout, tokens=50, k=70, n=52, rank=5))


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
def test_x_layouts(layout):
    check(Case(dtype=BF16, x_layout=layout, tokens=50, k=70, n=52))
    check(Case(dtype=FP32, x_layout=layout, x_grouped=True))


def test_real_size():
    check(REAL_SIZE)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_long_sums_round_like_short_ones(layout):
    """fp32 over 8192 steps, all of one sign: chains are cut wherever W is read from."""
    case = Case(dtype=FP32, tokens=32, top_k=1, experts=1, k=8192, n=64, rank=0, weight_layout=layout)
    p = problems.build(case)
    p.x, p.weight = p.x.abs(), p.weight.abs()
    y = problems.call("scatter_lora", *p.forward_args())
    exact = reference.scatter_lora(*p.forward_args())
    assert ((y - exact).norm() / exact.norm()).item() < 2.5e-7


def test_orders_agree():
    """The grouped result is the slot-order result, permuted, to the bit."""
    p = problems.build(Case(dtype=BF16, routing="sentinels"))
    args = p.forward_args()
    by_slot = problems.call("scatter_lora", *args)
    grouped = problems.call("scatter_lora", *args[:-1], True)
    assert torch.equal(grouped, by_slot[p.slots])


def test_zero_b_changes_nothing():
    """A fresh adapter (B = 0) gives the base's result to the bit."""
    case = Case(dtype=BF16, k=64, n=48, rank=8)
    p = problems.build(case)
    p.lora_b = torch.zeros_like(p.lora_b)
    with_lora = problems.call("scatter_lora", *p.forward_args())
    p.lora_a = p.lora_b = None
    assert torch.equal(with_lora, problems.call("scatter_lora", *p.forward_args()))


def test_gates_are_applied_in_the_accumulators():
    """Σ gate·row over the slots is rounded once: bf16 partial sums would miss this bound."""
    case = Case(dtype=BF16, gates="fp32", tokens=64, top_k=4, k=64, n=128, rank=0)
    p = problems.build(case)
    out = problems.call("scatter_lora", *p.forward_args())
    ref = reference.scatter_lora(*p.forward_args())
    exact = ref.to(BF16)
    assert (out != exact).float().mean() < 0.02


def test_large_values_do_not_overflow_on_the_way():
    """Products beyond fp16's range are fine as long as the result is inside it."""
    case = Case(dtype=torch.float16, rank=0, k=2, n=3, tokens=4, top_k=1, experts=1)
    p = problems.build(case)
    p.x = torch.full((4, 2), 3e4).half()
    p.weight = torch.tensor([4.0, -4.0]).half().expand(1, 3, 2)
    assert (problems.call("scatter_lora", *p.forward_args()) == 0).all()


@pytest.mark.skipif(SWITCHES.backend == "triton", reason="a program an expert: too many for the interpreter")
def test_parameters_are_never_copied_whole():
    """Half a terabyte of weight behind strides of 0: only what the routed experts need can be read."""
    experts, size, rank = 2**20, 512, 8
    gen = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(shape, generator=gen) / 16 for shape in ((size, size), (rank, size), (size, rank)))
    ids = torch.randint(0, experts, (9, 2), generator=gen)
    x = torch.randn(9, size, generator=gen).to(BF16)
    slots, offsets = problems.call("flatten_sort_count", ids, experts)
    wide = [t.to(BF16).expand(experts, *t.shape) for t in (w, a, b)]
    y = problems.call("scatter_lora", x, wide[0], slots, offsets, 2, *wide[1:], 0.5)
    dy = y.clone()
    dx, _ = problems.call("scatter_lora_dx", dy, wide[0], slots, offsets, 2, *wide[1:], 0.5)
    merged = wide[0][0].double() + 0.5 * wide[2][0].double() @ wide[1][0].double()
    expected = x.double().repeat_interleave(2, 0) @ merged.T
    assert (y.double() - expected).norm() <= 3e-3 * expected.norm()
    expected = (dy.double() @ merged).view(9, 2, size).sum(1)
    assert (dx.double() - expected).norm() <= 3e-3 * expected.norm()
