"""scatter_lora_dx: dx and dgates against the reference."""

import problems
import pytest
import torch
from cases import (
    BF16,
    FP32,
    FP64,
    LORA_LAYOUTS,
    PACKED,
    REAL_SIZE,
    ROW_LAYOUTS,
    ROWS,
    WEIGHT_LAYOUTS,
    Case,
    cases,
)
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.operators


def check(case: Case, with_x: bool = True) -> None:
    gate_dtype = FP64 if case.dtype == FP64 else FP32
    args = problems.build(case).dx_args(with_x)
    problems.check("scatter_lora_dx", args, case, (case.dtype, gate_dtype))


@pytest.mark.parametrize("case", [*ROWS, *PACKED], ids=lambda case: case.reason)
def test_rows(case):
    check(case)


@given(cases(packed=True), st.booleans())
def test_matches_reference(case, with_x):
    check(case, with_x)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
def test_weight_layouts(layout, dtype):
    check(Case(dtype=dtype, weight_layout=layout, tokens=50, k=70, n=52, rank=5, gates="fp32"))


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


@pytest.mark.parametrize(("gates", "with_x"), [("none", True), ("same", False), ("none", False)])
def test_dgates_is_empty_where_there_are_none(gates, with_x):
    args = problems.build(Case(dtype=BF16, gates=gates)).dx_args(with_x)
    _, dgates = problems.call("scatter_lora_dx", *args)
    assert dgates.shape == (0,) and dgates.dtype == FP32


def test_dx_does_not_depend_on_dgates():
    """dx is the same to the bit whether dgates is asked for or not."""
    p = problems.build(Case(dtype=BF16, gates="same", bias="same", k=64, n=96, rank=8))
    with_x, _ = problems.call("scatter_lora_dx", *p.dx_args(True))
    without, _ = problems.call("scatter_lora_dx", *p.dx_args(False))
    assert torch.equal(with_x, without)
