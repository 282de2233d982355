"""A NaN or Inf in one row changes only the rows and gradients that depend on it."""

import math

import problems
import pytest
import torch
from cases import BF16, FP32, Case

pytestmark = pytest.mark.operators

BASE = Case(tokens=24, top_k=2, experts=4, k=40, n=48, rank=8, bias="same", routing="sentinels")
CASES = {
    f"{dtype} {gates} {'grouped' if grouped else 'by token'}": BASE.with_(
        dtype=dtype, gates=gates, x_grouped=grouped
    )
    for dtype in (BF16, FP32)
    for gates in ("none", "same")
    for grouped in (False, True)
}
# Times zero all of them are NaN: infinities take the same ways.
VALUES = [math.nan, *(pytest.param(v, marks=pytest.mark.long_interpreted) for v in (math.inf, -math.inf))]


def same_outside(before: torch.Tensor, after: torch.Tensor, dependent: torch.Tensor, what: str) -> None:
    """Equal bits outside the mask over the first dimension, and no NaN or Inf lost inside it."""
    assert torch.equal(before[~dependent], after[~dependent]), f"{what}: an independent row changed"
    inside = after[dependent]
    if inside.numel():
        assert not inside.isfinite().all(), f"{what}: the value vanished"


def experts_of(p: problems.Problem) -> torch.Tensor:
    """[S] expert of each grouped row, E for sentinels."""
    positions = torch.arange(p.case.rows)
    return torch.searchsorted(p.offsets.long(), positions, right=True)


def tokens_and_experts(p: problems.Problem, row: int, per_slot: bool):
    """Masks over tokens, slots, grouped rows and experts that depend on row `row` of x or dy."""
    grouped_slots = p.slots if per_slot else p.slots // p.case.top_k
    routed = experts_of(p) < p.case.experts
    grouped = routed & (
        torch.arange(p.case.rows) == row if p.case.x_grouped and per_slot else grouped_slots == row
    )
    slots = torch.zeros(p.case.rows, dtype=torch.bool)
    slots[p.slots[grouped]] = True
    experts = torch.zeros(p.case.experts, dtype=torch.bool)
    experts[experts_of(p)[grouped]] = True
    return slots.view(-1, p.case.top_k).any(1), slots, grouped, experts


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_in_x(case, value):
    """Of x: one result row a slot, and dA, dB, dW of the experts that saw it. dx does not depend on x."""
    p = problems.build(case)
    row = 5

    def run():
        return (
            problems.call("scatter_lora", *p.forward_args()),
            problems.call("scatter_lora_dx", *p.dx_args()),
            problems.call("scatter_lora_dab", *p.dab_args()),
            problems.call("scatter_lora_dw", *p.dw_args()),
        )

    y, (dx, dgates), (da, db), dw = run()
    p.x[row, 7] = value
    y2, (dx2, dgates2), (da2, db2), dw2 = run()
    tokens, slots, _, experts = tokens_and_experts(p, row, per_slot=case.x_grouped)
    same_outside(y, y2, slots if p.gates is None else tokens, "y")
    assert torch.equal(dx, dx2), "dx does not depend on x"
    same_outside(dgates.flatten(), dgates2.flatten(), slots[: dgates.numel()], "dgates")
    for name, a, b in (("dA", da, da2), ("dB", db, db2), ("dW", dw, dw2)):
        same_outside(a, b, experts, name)


@pytest.mark.parametrize("value", VALUES[:2])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_in_dy(case, value):
    p = problems.build(case)
    row = 5

    def run():
        return (
            problems.call("scatter_lora_dx", *p.dx_args()),
            problems.call("scatter_lora_dab", *p.dab_args()),
            problems.call("scatter_lora_dw", *p.dw_args()),
            problems.call("scatter_lora_dbias", *p.dbias_args()),
        )

    (dx, dgates), (da, db), dw, dbias = run()
    p.dy[row, 7] = value
    (dx2, dgates2), (da2, db2), dw2, dbias2 = run()
    by_slot = p.gates is None
    grouped_slots = p.slots if by_slot else p.slots // case.top_k
    grouped = (experts_of(p) < case.experts) & (grouped_slots == row)
    slots = torch.zeros(case.rows, dtype=torch.bool)
    slots[p.slots[grouped]] = True
    experts = torch.zeros(case.experts, dtype=torch.bool)
    experts[experts_of(p)[grouped]] = True
    same_outside(dx, dx2, grouped if case.x_grouped else slots.view(-1, case.top_k).any(1), "dx")
    same_outside(dgates.flatten(), dgates2.flatten(), slots[: dgates.numel()], "dgates")
    for name, a, b in (("dA", da, da2), ("dB", db, db2), ("dW", dw, dw2), ("dbias", dbias, dbias2)):
        same_outside(a, b, experts, name)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_in_one_experts_weights(dtype):
    """Rows of other experts never meet them, not even multiplied by zero."""
    p = problems.build(BASE.with_(dtype=dtype))
    y = problems.call("scatter_lora", *p.forward_args())
    dx, _ = problems.call("scatter_lora_dx", *p.dx_args())
    for tensor in (p.weight, p.lora_a, p.lora_b, p.bias):
        tensor[2] = math.nan
    y2 = problems.call("scatter_lora", *p.forward_args())
    dx2, _ = problems.call("scatter_lora_dx", *p.dx_args())
    slots = torch.zeros(BASE.rows, dtype=torch.bool)
    slots[p.slots[experts_of(p) == 2]] = True
    same_outside(y, y2, slots, "y")
    same_outside(dx, dx2, slots.view(-1, BASE.top_k).any(1), "dx")


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_what_sentinels_point_at_is_never_read(dtype):
    """Gates of sentinel slots, and rows of grouped x and dy past the last routed one, may hold anything."""
    case = BASE.with_(dtype=dtype, gates="same", x_grouped=True)
    p = problems.build(case)
    routed = int(p.offsets[-1])
    assert routed < case.rows
    before = (
        problems.call("scatter_lora", *p.forward_args()),
        *problems.call("scatter_lora_dx", *p.dx_args()),
        *problems.call("scatter_lora_dab", *p.dab_args()),
        *problems.call("scatter_lora_backward", *p.backward_args()),
        problems.call("scatter_lora_dw", *p.dw_args()),
        problems.call("scatter_lora_dbias", *p.dbias_args()),
    )
    p.x[routed:] = math.nan
    p.gates.view(-1)[p.slots[routed:]] = math.nan
    after = (
        problems.call("scatter_lora", *p.forward_args()),
        *problems.call("scatter_lora_dx", *p.dx_args()),
        *problems.call("scatter_lora_dab", *p.dab_args()),
        *problems.call("scatter_lora_backward", *p.backward_args()),
        problems.call("scatter_lora_dw", *p.dw_args()),
        problems.call("scatter_lora_dbias", *p.dbias_args()),
    )
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_glu_rows(dtype):
    h = torch.randn(9, 38, generator=torch.Generator().manual_seed(0)).to(dtype)
    dy = torch.ones(9, 19, dtype=dtype)
    before = problems.call("glu", h), problems.call("glu_backward", dy, h)
    h[4, 3] = math.nan
    after = problems.call("glu", h), problems.call("glu_backward", dy, h)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:4], b[:4]) and torch.equal(a[5:], b[5:])
        assert b[4].isnan().any() and not b[4].isnan().all()
