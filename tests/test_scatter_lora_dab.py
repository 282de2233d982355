"""scatter_lora_dab: gradients of A and B against the reference."""

import problems
import pytest
import torch
from cases import BF16, FP32, HALVES, LORA_LAYOUTS, REAL_SIZE, ROW_LAYOUTS, ROWS, Case, cases
from hypothesis import given

pytestmark = pytest.mark.operators


def check(case: Case) -> None:
    dtype = FP32 if case.lora == "fp32" and case.dtype in HALVES else case.dtype
    problems.check("scatter_lora_dab", problems.build(case).dab_args(), case, (dtype, dtype))


@pytest.mark.parametrize("case", [c for c in ROWS if c.rank], ids=lambda case: case.reason)
def test_rows(case):
    check(case)


@given(cases().filter(lambda case: case.rank))
def test_matches_reference(case):
    check(case)


@pytest.mark.parametrize("layout", LORA_LAYOUTS)
def test_lora_layouts(layout):
    check(Case(dtype=BF16, lora="fp32", lora_layout=layout, tokens=50, k=70, n=52, rank=5))


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("gates", ["none", "fp32"])
def test_row_layouts(layout, gates):
    check(Case(dtype=BF16, dy_layout=layout, x_layout=layout, gates=gates, tokens=50, k=70, n=52))
    check(Case(dtype=FP32, dy_layout=layout, x_layout=layout, gates=gates, x_grouped=True))


def test_real_size():
    check(REAL_SIZE.with_(gates="fp32"))


@pytest.mark.parametrize("case_layout", LORA_LAYOUTS)
def test_db_has_the_memory_order_of_pefts_b(case_layout):
    """Autograd then accumulates it without a transposed copy. All else is contiguous."""
    p = problems.build(Case(dtype=BF16, lora="fp32", lora_layout=case_layout))
    da, db = problems.call("scatter_lora_dab", *p.dab_args())
    assert da.is_contiguous()
    if case_layout == "peft":
        assert db.stride() == p.lora_b.stride() and not db.is_contiguous()
    else:
        assert db.is_contiguous()


def test_experts_without_rows_get_exact_zeros():
    p = problems.build(Case(routing="one_expert", experts=4))
    da, db = problems.call("scatter_lora_dab", *p.dab_args())
    assert torch.count_nonzero(da[:3]) == 0 and torch.count_nonzero(db[:3]) == 0
    assert torch.count_nonzero(da[3]) and torch.count_nonzero(db[3])
