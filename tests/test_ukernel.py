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
    assert {k.isa for k in KERNEL_SETS} == set(core.isa_report()["usable"])
    assert len({k.name for k in KERNEL_SETS}) == len(KERNEL_SETS)


# --- tile ---


@st.composite
def tiles(draw):
    """(shares of the widest and the tallest tile, depths of one or two segments, extra lanes, gap, seed)"""
    return (
        draw(st.floats(0, 1)),
        draw(st.floats(0, 1)),
        draw(st.lists(depths, min_size=1, max_size=2)),
        draw(st.integers(0, 3)),
        draw(gaps),
        draw(seeds),
    )


class Tile:
    """The operands of one tile. left: [rows, depth], panel: [ceil(depth / pack), lanes, pack]."""

    def __init__(self, k, drawn):
        wide, tall, depth_of, extra, gap, seed = drawn
        rng = np.random.default_rng(seed)
        self.k, self.acc, self.gap = k, accumulator(k.compute), gap
        self.width = round(1 + wide * (k.vecs * k.lanes // k.lane_step - 1)) * k.lane_step
        self.rows = round(1 + tall * (k.max_rows[-(-self.width // k.lanes) - 1] - 1))
        self.lanes = self.width + extra * k.lane_step
        self.values = [
            (random(rng, (self.rows, d), k.compute), random(rng, (d, self.lanes), k.compute))
            for d in depth_of
        ]
        self.start = random(rng, (self.rows, self.width), self.acc)

    def panel(self, right: np.ndarray) -> np.ndarray:
        """[depth, lanes] → packed"""
        pack, depth = self.k.pack, right.shape[0]
        padded = np.zeros((-(-depth // pack) * pack, self.lanes), right.dtype)
        padded[:depth] = right
        return np.ascontiguousarray(padded.reshape(-1, pack, self.lanes).swapaxes(1, 2))

    def segments(self, rows=slice(None)):
        return [(placed(left[rows], self.gap, offset=1), self.panel(right)) for left, right in self.values]

    def run(self, start: str = "zero") -> np.ndarray:
        out = Output((self.rows, self.width), self.acc, self.gap)
        if start != "zero":
            out.fill(self.start)
        self.k.tile(self.segments(), out.array, start)
        return out.check()

    def reference(self, accumulate: bool) -> tuple[np.ndarray, np.ndarray]:
        """(values, sums of magnitudes)"""
        pairs = [(to_float(left), to_float(right)[:, : self.width]) for left, right in self.values]
        value = sum(left @ right for left, right in pairs)
        size = sum(np.abs(left) @ np.abs(right) for left, right in pairs)
        start = self.start.astype(np.float64) if accumulate else 0.0
        return value + start, size + np.abs(start)

    @property
    def steps(self) -> int:
        return sum(left.shape[1] for left, _ in self.values)


def starts(k) -> tuple:
    """Chains of bf16 products are never cut."""
    return ("zero", "resume") if k.compute == "bf16" else ("zero", "resume", "add")


@every_set
@given(drawn=tiles(), data=st.data())
def test_tile(k, drawn, data):
    """Starting from zero, C is NaN: it must not be read. What lies around C stays."""
    tile = Tile(k, drawn)
    start = data.draw(st.sampled_from(starts(k)))
    out = tile.run(start)
    value, size = tile.reference(start != "zero")
    bound = (tile.steps + 4) * ROUNDOFF[tile.acc] * size
    assert (np.abs(out - value) <= bound).all()


@every_set
@given(drawn=tiles())
def test_tile_elements_do_not_depend_on_its_shape(k, drawn):
    tile = Tile(k, drawn)
    whole = tile.run()
    row = Output((1, k.lane_step), tile.acc)
    for i in range(0, tile.rows, 3):
        k.tile(tile.segments(slice(i, i + 1)), row.array)
        assert same_bits(row.check()[0], whole[i, : k.lane_step])


@every_set
@given(drawn=tiles())
def test_two_segments_are_one_longer_one(k, drawn):
    """AMX adds up 32 steps at a time, so there it holds for cuts between those."""
    tile = Tile(k, drawn)
    step = 32 if k.isa == "amx_bf16" else k.pack
    cut = tile.values[0][0].shape[1] // 2 // step * step
    if cut == 0:
        return
    tile.values = tile.values[:1]
    whole = tile.run()
    left, right = tile.values[0]
    tile.values = [(left[:, :cut], right[:cut]), (left[:, cut:], right[cut:])]
    assert same_bits(tile.run(), whole)


@every_set
@given(drawn=tiles())
def test_a_resumed_chain_is_one_longer_one(k, drawn):
    tile = Tile(k, drawn)
    step = 32 if k.isa == "amx_bf16" else k.pack
    left, right = tile.values[0]
    cut = left.shape[1] // 2 // step * step
    tile.values = [(left, right)]
    whole = tile.run()
    tile.values = [(left[:, :cut], right[:cut])]
    tile.start = tile.run() if cut else np.zeros_like(tile.start)
    tile.values = [(left[:, cut:], right[cut:])]
    assert same_bits(tile.run("resume"), whole)


@every_set
@given(drawn=tiles())
def test_an_added_chain_is_rounded_once_more(k, drawn):
    if "add" not in starts(k):
        with pytest.raises(ValueError, match="does not add"):
            Tile(k, drawn).run("add")
        return
    tile = Tile(k, drawn)
    assert same_bits(tile.run("add"), tile.start + tile.run())


weaving_sets = pytest.mark.parametrize("k", [k for k in KERNEL_SETS if k.weaves], ids=lambda k: k.name)


@weaving_sets
@given(drawn=tiles(), packs=st.integers(1, 130), own=st.booleans(), start=st.sampled_from(("zero", "resume")))
def test_a_panel_is_woven_on_the_way(k, drawn, packs, own, start):
    """The tile's own panel, or one for later tiles; the product is the same."""
    tile = Tile(k, (1.0, *drawn[1:3], 0, *drawn[4:]))
    if own:
        left, right = tile.values[0]
        even = max(k.pack, left.shape[1] // k.pack * k.pack)
        tile.values[0] = (np.resize(left, (tile.rows, even)), np.resize(right, (even, tile.lanes)))
    expected = tile.run(start)
    packs = min(packs, tile.values[0][0].shape[1] // k.pack)
    later = random(np.random.default_rng(drawn[-1]), (packs * k.pack, tile.lanes), k.compute)
    panel = Output((packs, tile.lanes, k.pack), k.compute)
    segments, out = tile.segments(), Output((tile.rows, tile.width), tile.acc, tile.gap)
    if start == "resume":
        out.fill(tile.start)
    own_panel = Output(segments[0][1].shape, k.compute)
    rows = None
    if own:
        segments[0] = (segments[0][0], own_panel.array)
        rows = placed(tile.values[0][1], tile.gap)
    weave = (placed(later, tile.gap, offset=1), panel.array) if packs and not own else None
    k.tile(segments, out.array, start, weave, rows)
    assert same_bits(out.check(), expected)
    if weave:
        assert (panel.check() == tile.panel(later)).all()
    if own:
        assert (own_panel.check() == tile.panel(tile.values[0][1])).all()


@every_set
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@given(drawn=tiles())
def test_a_bad_value_stays_in_its_row_and_lane(k, bad, drawn):
    tile = Tile(k, drawn)
    left, right = tile.values[-1]
    left[tile.rows // 2, -1] = to_storage(np.array(bad), k.compute)
    right[0, tile.width - 1] = to_storage(np.array(bad), k.compute)
    expected = np.zeros((tile.rows, tile.width), bool)
    expected[tile.rows // 2] = expected[:, -1] = True
    assert (~np.isfinite(tile.run()) == expected).all()


@every_set
def test_tile_refuses_what_does_not_fit(k):
    acc = DTYPES[accumulator(k.compute)]
    left = np.zeros((2, 3), DTYPES[k.compute])
    panel = np.zeros((-(-3 // k.pack), k.lanes, k.pack), DTYPES[k.compute])
    c = np.zeros((2, k.lanes), acc)
    for segments, out, message in (
        ([], c, "one or two pairs"),
        ([(left, panel)], np.zeros((2, 99 * k.lanes), acc), "c must have a multiple"),
        ([(left, panel)], c[:, 1:], "c must have a multiple"),
        ([(left, panel)], np.zeros((999, k.lanes), acc), "rows"),
        ([(left[:1], panel)], c, "l must have shape"),
        ([(left, panel[1:])], c, "panel must have shape"),
        ([(left, panel[:, 1:])], c, "panel must"),
        ([(left, panel)], np.zeros((2, k.lanes), np.float16), "c must be"),
        ([(left, np.repeat(panel, 2, 0)[::2])], c, "panel must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            k.tile(segments, out)


# --- dot tile ---

# --- flat tile ---

with_flat = pytest.mark.parametrize("k", [k for k in KERNEL_SETS if k.flat_storage], ids=lambda k: k.name)


@with_flat
@given(
    rows=st.integers(1, 6),
    depth=st.integers(1, 9),
    width=st.integers(1, 70),
    resume=st.booleans(),
    gap=gaps,
    seed=seeds,
    data=st.data(),
)
def test_flat_tile(k, rows, depth, width, resume, gap, seed, data):
    """The bits of a tile, from rows of any storage type; nothing beyond them is read or written."""
    storage = data.draw(st.sampled_from(k.flat_storage))
    rng = np.random.default_rng(seed)
    left, right = random(rng, (rows, depth), k.compute), random(rng, (depth, width), storage)
    acc = accumulator(k.compute)
    begin = random(rng, (rows, width), acc)
    out = Output((rows, width), acc, gap)
    if resume:
        out.fill(begin)
    k.flat_tile(placed(left, gap, offset=1), placed(right, gap, offset=1), out.array, resume)
    got = out.check()
    wide = to_float(right).astype(DTYPES[k.compute])
    for j in range(0, width, k.lane_step):
        n = min(k.lane_step, width - j)
        panel = np.zeros((depth, k.lane_step, 1), DTYPES[k.compute])
        panel[:, :n, 0] = wide[:, j : j + n]
        for i in range(rows):
            c = np.zeros((1, k.lane_step), DTYPES[acc])
            c[0, :n] = begin[i, j : j + n]
            k.tile([(left[i : i + 1], panel)], c, "resume" if resume else "zero")
            assert same_bits(c[0, :n], got[i, j : j + n])


with_dot = pytest.mark.parametrize("k", [k for k in KERNEL_SETS if k.dot_rows], ids=lambda k: k.name)


class Dot:
    """The operands of one dot tile. left: [rows, depth], right: [cols, depth], result: [cols, rows]."""

    def __init__(self, k, drawn):
        cols, tall, depth_of, _, gap, seed = drawn
        rng = np.random.default_rng(seed)
        self.k, self.acc, self.gap = k, accumulator(k.compute), gap
        self.cols = round(1 + cols * (len(k.dot_rows) - 1))
        self.rows = round(1 + tall * (k.dot_rows[self.cols - 1] - 1))
        self.values = [
            (random(rng, (self.rows, d), k.compute), random(rng, (self.cols, d), k.compute)) for d in depth_of
        ]
        self.start = random(rng, (self.cols, self.rows), self.acc)

    def run(self, accumulate: bool, rows=slice(None), cols=slice(None)) -> np.ndarray:
        out = Output(self.start[cols, rows].shape, self.acc, self.gap)
        if accumulate:
            out.fill(self.start[cols, rows])
        pairs = [(placed(a[rows], self.gap, offset=1), placed(b[cols], 3)) for a, b in self.values]
        self.k.dot_tile(pairs, out.array, accumulate)
        return out.check()


@with_dot
@given(drawn=tiles(), accumulate=st.booleans())
def test_dot_tile(k, drawn, accumulate):
    dot = Dot(k, drawn)
    start = to_float(dot.start) if accumulate else 0.0
    value = sum(to_float(b) @ to_float(a).T for a, b in dot.values) + start
    size = sum(np.abs(to_float(b)) @ np.abs(to_float(a)).T for a, b in dot.values) + np.abs(start)
    steps = sum(a.shape[1] for a, _ in dot.values)
    assert (np.abs(dot.run(accumulate) - value) <= (steps + 4) * ROUNDOFF[dot.acc] * size).all()


@with_dot
@given(drawn=tiles())
def test_dot_tile_elements_do_not_depend_on_its_shape(k, drawn):
    dot = Dot(k, drawn)
    whole = dot.run(False)
    for j in range(dot.cols):
        i = j % dot.rows
        assert same_bits(dot.run(False, slice(i, i + 1), slice(j, j + 1)), whole[j : j + 1, i : i + 1])


@with_dot
@given(drawn=tiles())
def test_a_bad_value_stays_in_its_row_and_column_of_a_dot_tile(k, drawn):
    dot = Dot(k, drawn)
    left, right = dot.values[-1]
    left[-1, -1] = right[-1, 0] = to_storage(np.array(math.nan), k.compute)
    expected = np.zeros((dot.cols, dot.rows), bool)
    expected[-1] = expected[:, -1] = True
    assert (np.isnan(dot.run(False)) == expected).all()


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
