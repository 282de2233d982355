"""The comparison with the reference itself: it takes what a correct operator gives, and nothing else."""

import problems
import pytest
import torch
from cases import BF16, FP16, Case
from torch import Tensor

from torch_moelora import reference

STEP = {BF16: 2.0**-7, FP16: 2.0**-10}  # between numbers from 1 to 2


def compare(out: Tensor, ref: Tensor) -> None:
    case = Case(dtype=out.dtype, tokens=len(out), top_k=1, rank=0, lora="same", x_layout="expanded")
    problems.assert_close(out, ref, ref.abs(), problems.tolerance(case, out.numel()), "result")


@pytest.mark.parametrize("dtype", STEP)
def test_equal_rows_rounded_once_pass(dtype):
    """Both elements of every row lie almost in the middle of two numbers: no average makes that less."""
    ref = torch.full((40, 2), 1 + 0.499 * STEP[dtype], dtype=torch.float64)
    compare(ref.to(dtype), ref)
    ref[:, 1] *= -1
    compare(ref.to(dtype), ref)


@pytest.mark.parametrize("dtype", STEP)
def test_equal_rows_cut_off_fail(dtype):
    ref = torch.full((40, 2), 1 + 0.9 * STEP[dtype], dtype=torch.float64)
    compare(ref.to(dtype), ref)
    with pytest.raises(AssertionError, match=r"error .* >"):
        compare(torch.ones(40, 2, dtype=dtype), ref)


def test_an_exact_result_that_was_rounded_once_is_not_refused():
    """Drawn by the search and once held for a fault of the operator."""
    refused = 0
    for seed in range(400):
        case = Case(
            dtype=BF16, tokens=40, top_k=1, experts=1, k=17, n=2, rank=0, lora="same", bias="none",
            gates="none", x_layout="expanded", seed=seed,
        )  # fmt: skip
        args = problems.build(case).forward_args()
        ref = reference.REFERENCE["scatter_lora"](*args)
        (size,) = problems.magnitudes("scatter_lora", args)
        problems.assert_close(ref.to(BF16), ref, size, problems.tolerance(case, ref.numel()), "rounded")
        scale = max(ref.norm().item(), size.norm().item())
        refused += problems.rounding_of(ref, BF16) > problems.tolerance(case, ref.numel()) * scale
    assert refused  # by the count of roundings alone


def test_nothing_is_added_at_real_sizes():
    """There the roundings average out, and a second one is found."""
    ref = torch.randn(512, 1536, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale, case = ref.norm().item(), Case(dtype=BF16, tokens=512, top_k=1, rank=0, lora="same")
    tol = problems.tolerance(case, ref.numel())
    assert problems.rounding_of(ref, BF16) < 0.6 * tol * scale
    compare(ref.to(BF16), ref)
    off = ref * (1 + 2.0**-8 * torch.sign(torch.randn(ref.shape, dtype=torch.float64)))
    with pytest.raises(AssertionError, match=r"error .* >"):
        compare(off.to(BF16), ref)


def test_overflow_is_no_rounding():
    ref = torch.tensor([[1e6, 1.0]], dtype=torch.float64)
    assert problems.rounding_of(ref, FP16) == 0
