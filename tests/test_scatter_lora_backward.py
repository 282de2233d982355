"""scatter_lora_backward against the reference, and beside the operators that compute its parts."""

import problems
import pytest
import torch
from cases import BF16, FP32, FP64, HALVES, LORA_LAYOUTS, PACKED, REAL_SIZE, ROWS, WEIGHT_LAYOUTS, Case, cases
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.operators

ops = torch.ops.moelora


def check(case: Case, with_dgates: bool = True) -> None:
    lora = FP32 if case.lora == "fp32" and case.dtype in HALVES else case.dtype
    dtypes = (case.dtype, FP64 if case.dtype == FP64 else FP32, lora, lora)
    p = problems.build(case)
    args = (*p.backward_args(), with_dgates, *p.packed_args)
    problems.check("scatter_lora_backward", args, case, dtypes)


# Triton's is made of dx's and dab's kernels, which have these tests too.
@pytest.mark.long_interpreted
@pytest.mark.parametrize("case", [c for c in (*ROWS, *PACKED) if c.rank], ids=lambda case: case.reason)
def test_rows(case):
    check(case)


@given(cases(packed=True).filter(lambda case: case.rank), st.booleans())
def test_matches_reference(case, with_dgates):
    check(case, with_dgates)


@pytest.mark.long_interpreted
@pytest.mark.parametrize("gates", ["none", "fp32"])
@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
def test_weight_layouts(layout, gates):
    check(Case(dtype=BF16, weight_layout=layout, tokens=50, k=70, n=52, rank=5, gates=gates))


@pytest.mark.long_interpreted
@pytest.mark.parametrize("gates", ["none", "same"])
@pytest.mark.parametrize("layout", LORA_LAYOUTS)
def test_lora_layouts(layout, gates):
    check(Case(dtype=BF16, lora="fp32", lora_layout=layout, tokens=50, k=70, n=52, rank=5, gates=gates))


@pytest.mark.long_interpreted
def test_real_size():
    check(REAL_SIZE.with_(gates="fp32"))


ALONE = {
    "gates": Case(dtype=BF16, gates="same", bias="same", routing="sentinels", tokens=31, k=64, n=96, rank=8),
    "PEFT's B": Case(dtype=BF16, gates="fp32", lora="fp32", lora_layout="peft", x_grouped=True, tokens=40),
    "no gates": Case(dtype=BF16, y_grouped=True, tokens=40, k=70, n=52, rank=5),
    "fp32": Case(gates="same", tokens=40),
}


@pytest.mark.parametrize("with_dgates", [True, False])
@pytest.mark.parametrize("case", ALONE.values(), ids=ALONE)
def test_same_bits_as_the_operators_for_one_alone(case, with_dgates):
    p = problems.build(case)
    found = problems.call("scatter_lora_backward", *p.backward_args(), with_dgates)
    alone = *ops.scatter_lora_dx(*p.dx_args(with_dgates)), *ops.scatter_lora_dab(*p.dab_args())
    for name, one, other in zip(("dx", "dgates", "da", "db"), found, alone, strict=True):
        assert torch.equal(one, other), name
        assert one.stride() == other.stride(), name
