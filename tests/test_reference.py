"""The specification itself: against a formula per token, and its backward functions against autograd."""

import problems
import pytest
import torch
from cases import FP64, ROWS, Case
from hypothesis import given
from hypothesis import strategies as st

from torch_moelora import reference

ORDERS = {
    "slot order": Case(dtype=FP64, bias="same", routing="sentinels"),
    "gates": Case(dtype=FP64, bias="same", gates="same", routing="sentinels"),
    "grouped result": Case(dtype=FP64, bias="same", y_grouped=True, routing="sentinels"),
    "grouped input": Case(dtype=FP64, bias="same", x_grouped=True, gates="same", routing="sentinels"),
}


@pytest.mark.parametrize("case", ORDERS.values(), ids=ORDERS)
def test_against_a_formula_per_token(case):
    """One token, one choice at a time: no sorting, no grouping, W + s·BA built as a matrix."""
    p = problems.build(case)
    ids = problems.expert_ids(case, torch.Generator().manual_seed(case.seed))
    grouped_at = {slot: i for i, slot in enumerate(p.slots.tolist())}
    rows = torch.zeros(case.rows, case.n, dtype=FP64)
    for t in range(case.tokens):
        for j in range(case.top_k):
            e, slot = int(ids[t, j]), t * case.top_k + j
            if 0 <= e < case.experts:
                x = p.x[grouped_at[slot]] if case.x_grouped else p.x[t]
                w = p.weight[e] + case.scaling * p.lora_b[e] @ p.lora_a[e]
                rows[slot] = (w @ x + p.bias[e]) * (1 if p.gates is None else p.gates[t, j])
    expected = rows
    if p.gates is not None:
        expected = rows.view(case.tokens, case.top_k, case.n).sum(1)
    elif case.y_grouped:
        expected = rows[p.slots]
    torch.testing.assert_close(reference.scatter_lora(*p.forward_args()), expected)


@pytest.mark.parametrize("case", [c for c in ROWS if c.rank and c.k * c.n < 20_000], ids=lambda c: c.reason)
def test_backward_formulas_against_autograd(case):
    case = case.with_(dtype=FP64, lora="same", bias="same", gates="none" if case.gates == "none" else "same")
    p = problems.build(case)
    names = [n for n in ("x", "weight", "lora_a", "lora_b", "bias", "gates") if getattr(p, n) is not None]
    for name in names:
        setattr(p, name, getattr(p, name).detach().requires_grad_())
    y = reference.scatter_lora(*p.forward_args())
    grads = dict(zip(names, torch.autograd.grad(y, [getattr(p, n) for n in names], p.dy), strict=True))
    with torch.no_grad():
        dx, dgates = reference.scatter_lora_dx(*p.dx_args())
        da, db = reference.scatter_lora_dab(*p.dab_args())
        dw = reference.scatter_lora_dw(*p.dw_args())
        dbias = reference.scatter_lora_dbias(*p.dbias_args())
    got = {"x": dx, "weight": dw, "lora_a": da, "lora_b": db, "bias": dbias, "gates": dgates}
    for name in names:
        torch.testing.assert_close(got[name], grads[name], msg=lambda m, name=name: f"{name}: {m}")


@given(
    st.sampled_from(("silu", "gelu", "gelu_tanh")),
    st.sampled_from((None, 0.5, 2.0)),
    st.sampled_from((0.0, 1.0)),
    st.booleans(),
    st.integers(0, 1000),
)
def test_glu_backward_against_autograd(act, limit, up_shift, interleaved, seed):
    gen = torch.Generator().manual_seed(seed)
    h = torch.randn(5, 8, dtype=FP64, generator=gen, requires_grad=True)
    dy = torch.randn(5, 4, dtype=FP64, generator=gen)
    options = (act, 1.702 if act == "silu" else 1.0, limit, up_shift, interleaved)
    (expected,) = torch.autograd.grad(reference.glu(h, *options), h, dy)
    torch.testing.assert_close(reference.glu_backward(dy, h.detach(), *options), expected)
