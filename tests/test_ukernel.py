"""Every micro-kernel of every kernel set that can run here, against numpy in fp64."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from core import (
    DTYPES,
    KERNEL_SETS,
    ROUNDOFF,
    Output,
    accumulator,
    core,
    placed,
    random,
    same_bits,
    to_float,
    to_storage,
)
from hypothesis import given
from hypothesis import strategies as st

every_set = pytest.mark.parametrize("k", KERNEL_SETS, ids=lambda k: k.name)
seeds = st.integers(0, 2**20)
lengths = st.sampled_from((1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 65, 127, 130))
depths = st.sampled_from((1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 257))
steps = st.sampled_from((1, 1, 2, 3, -1))
gaps = st.sampled_from((0, 1, 7))
firsts = st.integers(0, 3)


def test_the_build_under_test():
    """A run that is meant for another build must not pass against the installed module."""
    assert core.sanitizers == os.environ.get("MOELORA_TEST_SANITIZERS", "")
    assert core.wide_emulated == ("MOELORA_TEST_WIDE_EMULATED" in os.environ)
    folder = os.environ.get("MOELORA_TEST_CORE")
    assert core.__file__.startswith(os.path.abspath(folder)) if folder else "torch_moelora" in core.__file__


def test_a_set_for_every_usable_instruction_set():
    sets = core.kernel_sets()
    assert {k.isa for k in sets} == set(core.isa_report()["usable"])
    assert len({k.name for k in sets}) == len(sets)


# --- packing ---


def sets_and_storage(dtypes=tuple(DTYPES)):
    rows = [(k, dtype) for k in KERNEL_SETS for dtype in k.storage if dtype in dtypes]
    return pytest.mark.parametrize(("k", "dtype"), rows, ids=lambda v: v if isinstance(v, str) else v.name)


def packed(values: np.ndarray, k, lanes: int) -> np.ndarray:
    """[depth, n] in any type → [ceil(depth / pack), lanes, pack] in the compute type, padded with zeros"""
    depth, n = values.shape
    out = np.zeros((-(-depth // k.pack) * k.pack, lanes), DTYPES[k.compute])
    out[:depth, :n] = to_storage(to_float(values), k.compute)
    return out.reshape(-1, k.pack, lanes).swapaxes(1, 2)


@sets_and_storage()
@given(rows=lengths, n=lengths, first=firsts, extra=st.integers(0, 1), step=steps, gap=gaps, seed=seeds)
def test_pack_lanes(k, dtype, rows, n, first, extra, step, gap, seed):
    source = random(np.random.default_rng(seed), (rows, first + n), dtype)
    lanes = (-(-rows // k.lane_step) + extra) * k.lane_step
    panel = Output((-(-n // k.pack), lanes, k.pack), k.compute)
    k.pack_lanes(panel.array, placed(source, gap, step, offset=1), first, n)
    assert same_bits(panel.check(), packed(source[:, first:].T, k, lanes))


@sets_and_storage()
@given(rows=lengths, n=lengths, first=firsts, extra=st.integers(0, 1), step=steps, gap=gaps, seed=seeds)
def test_pack_depth(k, dtype, rows, n, first, extra, step, gap, seed):
    source = random(np.random.default_rng(seed), (rows, first + n), dtype)
    lanes = (-(-n // k.lane_step) + extra) * k.lane_step
    panel = Output((-(-rows // k.pack), lanes, k.pack), k.compute)
    k.pack_depth(panel.array, placed(source, gap, step, offset=1), first, n)
    assert same_bits(panel.check(), packed(source[:, first:], k, lanes))


@sets_and_storage()
@given(n=lengths, step=steps, seed=seeds)
def test_convert(k, dtype, n, step, seed):
    source = random(np.random.default_rng(seed), (n,), dtype)
    out = Output((n,), k.compute)
    k.convert(out.array, placed(source, step=step, offset=1))
    assert same_bits(out.check(), to_storage(to_float(source), k.compute))


@sets_and_storage()
@given(rows=lengths, n=lengths, first=firsts, step=steps, gap=gaps, scaled=st.booleans(), seed=seeds)
def test_transpose_in(k, dtype, rows, n, first, step, gap, scaled, seed):
    rng = np.random.default_rng(seed)
    acc = accumulator(k.compute)
    source = random(rng, (rows, first + n), dtype)
    scale = random(rng, (rows,), acc) if scaled else None
    out = Output((n, rows), k.compute, gap)
    k.transpose_in(out.array, placed(source, gap, step, offset=1), scale, first, n)
    expected = to_float(source[:, first:]).astype(DTYPES[acc])
    if scaled:
        expected = expected * scale[:, None]
    assert same_bits(out.check(), to_storage(expected.T, k.compute))


# --- accumulator rows ---


@every_set
@given(rows=lengths, columns=lengths, gap=gaps, seed=seeds)
def test_transpose(k, rows, columns, gap, seed):
    acc = accumulator(k.compute)
    source = random(np.random.default_rng(seed), (rows, columns), acc)
    out = Output((columns, rows), acc, gap)
    k.transpose(out.array, placed(source, gap, offset=1))
    assert same_bits(out.check(), source.T)


SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e30, -1e30, 65504.0, 65519.0, 65520.0, 6e-8, 2.0**-25)


@sets_and_storage()
@given(n=lengths, biased=st.booleans(), scale=st.sampled_from((1.0, 0.3, -2.5, 0.0)), seed=seeds)
def test_store(k, dtype, n, biased, scale, seed):
    """One rounding, to nearest with ties to even, and no other arithmetic than bias and scale."""
    rng = np.random.default_rng(seed)
    acc = accumulator(k.compute)
    c = random(rng, (n,), acc)
    c[rng.integers(0, n)] = rng.choice(SPECIAL)
    bias = random(rng, (n,), acc) if biased else None
    out = Output((n,), dtype)
    k.store(out.array, placed(c, offset=1), bias, scale)
    with np.errstate(invalid="ignore"):
        expected = (c + bias if biased else c) * DTYPES[acc](scale)
    assert same_bits(out.check(), to_storage(expected, dtype))


@sets_and_storage(("bf16", "fp16"))
def test_store_rounds_ties_to_even(k, dtype):
    """Every value halfway between neighbours, and those beside it."""
    bits = np.arange(0x3C00, 0x3C80, dtype=np.uint16)
    low = to_float(bits if dtype == "bf16" else bits.view(np.float16))
    half = (low[:-1] + low[1:]) / 2
    below, above = (np.nextafter(half, end, dtype=np.float32) for end in (0, 99))
    c = np.concatenate([half, below, above, -half, -below, -above]).astype(np.float32)
    out = Output(c.shape, dtype)
    k.store(out.array, c)
    assert same_bits(out.check(), to_storage(c, dtype))


@every_set
@given(n=lengths, biased=st.booleans(), scale=st.sampled_from((1.0, 0.3, -2.5)), seed=seeds)
def test_add(k, n, biased, scale, seed):
    rng = np.random.default_rng(seed)
    acc = accumulator(k.compute)
    start, c = random(rng, (n,), acc), random(rng, (n,), acc)
    bias = random(rng, (n,), acc) if biased else None
    out = Output((n,), acc)
    out.fill(start)
    k.add(out.array, placed(c, offset=1), bias, scale)
    terms = [to_float(start), scale * to_float(c)] + ([scale * to_float(bias)] if biased else [])
    size = sum(np.abs(t) for t in terms)
    assert (np.abs(out.check() - sum(terms)) <= 4 * ROUNDOFF[acc] * size).all()


@sets_and_storage()
@given(n=lengths, step=steps, scale=st.sampled_from((1.0, 0.3, -2.5)), seed=seeds)
def test_add_row(k, dtype, n, step, scale, seed):
    rng = np.random.default_rng(seed)
    acc = accumulator(k.compute)
    start, source = random(rng, (n,), acc), random(rng, (n,), dtype)
    out = Output((n,), acc)
    out.fill(start)
    k.add_row(out.array, placed(source, step=step, offset=1), scale)
    term = scale * to_float(source)
    bound = 4 * ROUNDOFF[acc] * (np.abs(to_float(start)) + np.abs(term))
    assert (np.abs(out.check() - (to_float(start) + term)) <= bound).all()


@sets_and_storage()
@given(n=lengths, step=steps, seed=seeds)
def test_dot(k, dtype, n, step, seed):
    rng = np.random.default_rng(seed)
    acc = accumulator(k.compute)
    c, x = random(rng, (n,), acc), random(rng, (n,), dtype)
    out = k.dot(placed(c, offset=1), placed(x, step=step, offset=1))
    terms = to_float(c) * to_float(x)
    assert abs(out - terms.sum()) <= (n + 4) * ROUNDOFF[acc] * np.abs(terms).sum()


# --- gated activations ---

glus = st.fixed_dictionaries(
    {
        "act": st.sampled_from(("silu", "gelu", "gelu_tanh")),
        "alpha": st.sampled_from((1.0, 1.702)),
        "limit": st.sampled_from((None, 1.5, 7.0)),
        "up_shift": st.sampled_from((0.0, 1.0)),
        "interleaved": st.booleans(),
    }
)


def activation(g: np.ndarray, act: str, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """(f, f') in fp64"""
    if act == "gelu":
        phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in g])
        return g * phi, phi + g * np.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    if act == "silu":
        inner, slope = alpha * g, alpha
    else:
        c = 2 * math.sqrt(2 / math.pi)
        inner, slope = c * (g + 0.044715 * g**3), c * (1 + 0.134145 * g * g)
    s = 1 / (1 + np.exp(-np.clip(inner, -700, 700)))
    return g * s, s + g * s * (1 - s) * slope


def halves(h: np.ndarray, interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    width = h.size // 2
    return (h[0::2], h[1::2]) if interleaved else (h[:width], h[width:])


def rounding(values: np.ndarray, dtype: str) -> np.ndarray:
    """The most that one rounding changes; fp16 has subnormals in reach of these tests."""
    return ROUNDOFF[dtype] * np.abs(values) + (2.0**-25 if dtype == "fp16" else 0)


def glu_inputs(rng, width: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(h, dy), with some values far out"""
    h = 3 * rng.standard_normal(2 * width)
    h[rng.integers(0, 2 * width)] = rng.choice((-200.0, -30.0, 30.0, 200.0))
    return to_storage(h.astype(np.float32), dtype), random(rng, (width,), dtype)


@sets_and_storage()
@given(width=lengths, step=steps, options=glus, seed=seeds)
def test_glu(k, dtype, width, step, options, seed):
    h, _ = glu_inputs(np.random.default_rng(seed), width, dtype)
    out = Output((width,), dtype)
    k.glu(out.array, placed(h, step=step, offset=1), **options)
    g, u = halves(to_float(h), options["interleaved"])
    limit = options["limit"] or math.inf
    g, u = np.minimum(g, limit), np.clip(u, -limit, limit) + options["up_shift"]
    f, _ = activation(g, options["act"], options["alpha"])
    accuracy = 1e-12 if dtype == "fp64" else 3e-7
    size = (1 + np.abs(g)) * (1 + np.abs(u))
    assert (np.abs(to_float(out.check()) - f * u) <= rounding(f * u, dtype) + accuracy * size).all()


@sets_and_storage()
@given(width=lengths, step=steps, options=glus, seed=seeds)
def test_glu_backward(k, dtype, width, step, options, seed):
    h, dy = glu_inputs(np.random.default_rng(seed), width, dtype)
    out = Output((2 * width,), dtype)
    k.glu_backward(out.array, placed(dy, step=step, offset=1), placed(h, step=step), **options)
    g_in, u_in = halves(to_float(h), options["interleaved"])
    limit = options["limit"] or math.inf
    g, u = np.minimum(g_in, limit), np.clip(u_in, -limit, limit) + options["up_shift"]
    f, slope = activation(g, options["act"], options["alpha"])
    d = to_float(dy)
    dg, du = d * u * slope * (g_in <= limit), d * f * (np.abs(u_in) <= limit)
    accuracy = 1e-12 if dtype == "fp64" else 6e-7
    size = (1 + np.abs(g)) * (1 + np.abs(u)) * np.abs(d)
    for part, ref in zip(halves(to_float(out.check()), options["interleaved"]), (dg, du), strict=True):
        assert (np.abs(part - ref) <= rounding(ref, dtype) + accuracy * size).all()
