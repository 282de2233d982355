"""glu and glu_backward against the reference."""

import math

import glu_range
import problems
import pytest
import torch
from cases import BF16, DTYPES, FP16, FP32, FP64, ROW_LAYOUTS
from hypothesis import given
from hypothesis import strategies as st

from torch_moelora import reference

pytestmark = pytest.mark.operators

OPTIONS = {
    "SwiGLU": ("silu", 1.0, None, 0.0, False),
    "gpt_oss": ("silu", 1.702, 7.0, 1.0, True),
    "GEGLU": ("gelu", 1.0, None, 0.0, False),
    "GEGLU, tanh": ("gelu_tanh", 1.0, None, 0.0, False),
    "everything at once": ("silu", -0.5, 0.75, -2.0, True),
    "clamped GELU": ("gelu", 1.0, 1.0, 0.5, False),
    "an infinite limit clamps nothing": ("gelu_tanh", 1.0, math.inf, 0.0, True),
}
TOLERANCE = {BF16: 3e-3, FP16: 5e-4, FP32: 2e-6, FP64: 1e-13}


def check(h: torch.Tensor, dy: torch.Tensor, options: tuple) -> None:
    for name, args in (("glu", (h, *options)), ("glu_backward", (dy, h, *options))):
        out, ref = problems.call(name, *args), reference.REFERENCE[name](*args)
        assert out.shape == ref.shape and out.dtype == h.dtype and out.is_contiguous()
        assert not out.isnan().any(), name
        # Near a zero of f, f' or u + up_shift the result is far below its factors: a floor of a tenth of
        # theirs.
        scale = math.hypot(ref.norm().item(), 0.1 * math.sqrt(ref.numel()))
        tol = TOLERANCE[h.dtype] * (1 + 2 / math.sqrt(max(ref.numel(), 1)))
        error = (out.double() - ref).norm().item()
        assert error <= tol * scale, f"{name}: {error / max(scale, 1e-300):.2e} > {tol:.2e}"


def tensors(rows: int, inner: int, dtype: torch.dtype, layout: str, seed: int, spread: float = 1.5):
    gen = torch.Generator().manual_seed(seed)
    h = (torch.randn(rows, 2 * inner, generator=gen, dtype=FP64) * spread).to(dtype)
    dy = torch.randn(rows, inner, generator=gen, dtype=FP64).to(dtype)
    return problems.rows_like(h, layout), problems.rows_like(dy, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, dtype):
    check(*tensors(40, 67, dtype, "contiguous", 0), options)


@given(
    st.sampled_from((0, 1, 2, 5, 33)),
    st.sampled_from((1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65)),
    st.sampled_from(DTYPES),
    st.sampled_from(ROW_LAYOUTS),
    st.sampled_from(list(OPTIONS.values())),
    st.integers(0, 2**20),
)
def test_matches_reference(rows, inner, dtype, layout, options, seed):
    check(*tensors(rows, inner, dtype, layout, seed), options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_saturation(options, dtype):
    """Far from zero the exponentials over- and underflow; the results must not."""
    g = torch.tensor([-1e4, -200.0, -89.0, -30.0, -12.0, -1e-4, 0.0, 1e-4, 12.0, 30.0, 89.0, 200.0, 1e4])
    u = torch.linspace(-3, 3, g.numel())
    if options[4]:
        h = torch.stack((g, u), dim=1).flatten()[None].to(dtype)
    else:
        h = torch.cat((g, u))[None].to(dtype)
    check(h, torch.ones(1, g.numel()).to(dtype), options)


def test_an_element_at_the_limit_takes_the_gradient():
    """It is not clamped. (What torch.clamp's gradient is there depends on torch's version.)"""
    h = torch.tensor([[2.0, 2.0], [2.0, -2.0], [2.5, 0.0], [0.0, 2.5]], dtype=FP64)
    grad = problems.call("glu_backward", torch.ones(4, 1, dtype=FP64), h, "silu", 1.0, 2.0, 0.0, False)
    leaf = h.clone().requires_grad_()
    g, u = leaf[:, :1], leaf[:, 1:]
    g, u = torch.where(g > 2, 2.0, g), torch.where(u.abs() > 2, 2 * u.sign(), u)
    (torch.nn.functional.silu(g) * u).sum().backward()
    torch.testing.assert_close(grad, leaf.grad)


def test_reference_agrees_with_torch():
    """The formulas of the reference against torch's own activations."""
    h = torch.randn(9, 10, dtype=FP64, generator=torch.Generator().manual_seed(0))
    g, u = h.chunk(2, dim=1)
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
    }
    for act, function in functions.items():
        torch.testing.assert_close(reference.glu(h, act), function(g) * u)


def test_many_rows():
    """More than one task of work."""
    check(*tensors(3000, 96, FP32, "contiguous", 1), OPTIONS["SwiGLU"])


# What may be lost where a processor flushes subnormals.
LOSSES = {BF16: 2.0**-125, FP16: 2.0**-125, FP32: 2.0**-125, FP64: 2.0**-1020}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", glu_range.OPTIONS.values(), ids=glu_range.OPTIONS)
def test_whole_range(options, dtype):
    """From the smallest subnormal to Inf and NaN, against exact arithmetic."""
    h, dy = glu_range.inputs(dtype, options[4])
    y, dh = problems.call("glu", h, *options), problems.call("glu_backward", dy, h, *options)
    glu_range.compare(y, dh, h, dy, options, LOSSES[dtype], glu_range.LAST[glu_range.COMPUTED[dtype]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", glu_range.OPTIONS.values(), ids=glu_range.OPTIONS)
def test_whole_range_of_the_reference(options, dtype):
    h, dy = glu_range.inputs(dtype, options[4])
    y, dh = reference.glu(h, *options), reference.glu_backward(dy, h, *options)
    glu_range.compare(y, dh, h, dy, options, 2.0**-1010, 700)
