"""scatter_lora_dw: gradient of the base weight against the reference."""

import problems
import pytest
from cases import BF16, FP32, REAL_SIZE, ROW_LAYOUTS, ROWS, Case, cases
from hypothesis import given

pytestmark = pytest.mark.operators


def check(case: Case) -> None:
    case = case.with_(rank=0)  # dW does not depend on LoRA
    problems.check("scatter_lora_dw", problems.build(case).dw_args(), case, (case.dtype,))


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.reason)
def test_rows(case):
    check(case)


@given(cases())
def test_matches_reference(case):
    check(case)


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("gates", ["none", "fp32"])
def test_row_layouts(layout, gates):
    check(Case(dtype=BF16, dy_layout=layout, x_layout=layout, gates=gates, tokens=50, k=70, n=52))
    check(Case(dtype=FP32, dy_layout=layout, x_layout=layout, gates=gates, x_grouped=True))


def test_real_size():
    check(REAL_SIZE.with_(gates="fp32"))
