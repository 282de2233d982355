"""torch.library.opcheck: schema, fakes against real results, autograd registration, AOT dispatch."""

import problems
import pytest
import torch
from cases import BF16, FP32, Case

from torch_moelora.schemas import SCHEMAS

CASES = {
    "plain": Case(tokens=5, rank=0),
    "everything": Case(tokens=5, dtype=BF16, lora="fp32", bias="same", gates="fp32", routing="sentinels"),
    "grouped in and out": Case(tokens=5, x_grouped=True, y_grouped=True, bias="same"),
    "grouped input, gates, strided": Case(
        tokens=5, x_grouped=True, gates="same", weight_layout="transposed", lora_layout="peft"
    ),
    "no tokens": Case(tokens=0, gates="same"),
}


def arguments(op: str, case: Case, grad: bool) -> tuple:
    p = problems.build(case)
    if op == "flatten_sort_count":
        return problems.expert_ids(case, torch.Generator().manual_seed(0)), case.experts
    if op.startswith("glu"):
        h = torch.randn(case.rows, 10, dtype=FP32).to(case.dtype)
        dy = (torch.randn(case.rows, 5).to(case.dtype),) if op == "glu_backward" else ()
        args = (*dy, h, "silu", 1.702, 7.0, 1.0, True)
    else:
        stem = op.removeprefix("scatter_lora").removeprefix("_") or "forward"
        args = getattr(p, f"{stem}_args")()
    if not grad:
        return args
    return tuple(
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in args
    )


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_opcheck(op, case):
    if op in ("scatter_lora_dab", "scatter_lora_backward") and not case.rank:
        pytest.skip("takes LoRA parameters")
    # Operators that differentiate once are checked with gradients, their backward operators without.
    grad = op in ("scatter_lora", "glu")
    torch.library.opcheck(getattr(torch.ops.moelora, op).default, arguments(op, case, grad))


@pytest.mark.parametrize("op", ["scatter_lora", "scatter_lora_dx", "scatter_lora_backward"])
def test_sums_in_fp32(op):
    args = arguments(op, CASES["everything"], grad=op == "scatter_lora")
    torch.library.opcheck(getattr(torch.ops.moelora, op).default, args, {"sum_fp32": True})
