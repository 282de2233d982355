"""scatter_lora_dbias: gradient of the bias against the reference."""

import problems
import pytest
from cases import BF16, FP32, ROW_LAYOUTS, ROWS, Case, cases
from hypothesis import given

pytestmark = pytest.mark.operators


def check(case: Case) -> None:
    case = case.with_(rank=0)  # dbias does not depend on LoRA
    problems.check("scatter_lora_dbias", problems.build(case).dbias_args(), case, (case.dtype,))


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.reason)
def test_rows(case):
    check(case)


@given(cases())
def test_matches_reference(case):
    check(case)


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("gates", ["none", "fp32"])
def test_row_layouts(layout, gates):
    check(Case(dtype=BF16, dy_layout=layout, gates=gates, tokens=50, n=52))
    check(Case(dtype=FP32, dy_layout=layout, gates=gates))


def test_many_rows_are_summed_in_fp32():
    """4096 equal bf16 rows: a bf16 running sum would stop growing at 256."""
    case = Case(dtype=BF16, tokens=4096, top_k=1, experts=1, n=8, dy_layout="expanded")
    check(case)
