"""The tiles of every kernel set that can run here, against numpy in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from core import (
    DTYPES,
    KERNEL_SETS,
    ROUNDOFF,
    Output,
    accumulator,
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


widening_sets = pytest.mark.parametrize("k", [k for k in KERNEL_SETS if k.widens], ids=lambda k: k.name)


@widening_sets
@given(
    drawn=tiles(),
    units=st.integers(1, 5),
    rows=st.integers(1, 40),
    panels=st.booleans(),
    each=st.booleans(),
    start=st.sampled_from(("zero", "resume", "add")),
)
def test_numbers_are_converted_on_the_way(k, drawn, units, rows, panels, each, start):
    """Into rows of whole vectors or into panels; the product is the same, also where rows outnumber steps."""
    tile = Tile(k, drawn)
    expected = tile.run(start)
    unit = (k.vecs if panels else 4) * k.lanes
    source = random(np.random.default_rng(drawn[-1]), (rows, units * unit), "bf16")
    source[0, 0] = to_storage(np.array(math.nan), "bf16")
    if panels:
        widened = Output((units * rows, unit), k.compute)
        target = widened.array.reshape(units, rows, unit)
    else:
        widened = Output((rows, units * unit), k.compute, tile.gap)
        target = np.lib.stride_tricks.as_strided(
            widened.array, (units, rows, unit), (4 * unit, widened.array.strides[0], 4)
        )
    out = Output((tile.rows, tile.width), tile.acc, tile.gap)
    if start != "zero":
        out.fill(tile.start)
    k.tile(tile.segments(), out.array, start, widen=(placed(source, tile.gap, offset=1), target), each=each)
    assert same_bits(out.check(), expected)
    wide = to_float(source).astype(np.float32)
    if panels:
        wide = wide.reshape(rows, units, unit).swapaxes(0, 1).reshape(-1, unit)
    assert same_bits(widened.check(), wide)


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


# --- flat tile ---

with_flat = pytest.mark.parametrize("k", [k for k in KERNEL_SETS if k.flat_storage], ids=lambda k: k.name)


@with_flat
@given(
    rows=st.integers(1, 12),
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
    wide = np.zeros((-(-depth // k.pack) * k.pack, -(-width // k.lane_step) * k.lane_step), DTYPES[k.compute])
    wide[:depth, :width] = to_storage(to_float(right), k.compute)
    for j in range(0, width, k.lane_step):
        n = min(k.lane_step, width - j)
        steps = wide[:, j : j + k.lane_step].reshape(-1, k.pack, k.lane_step)
        panel = np.ascontiguousarray(steps.swapaxes(1, 2))
        for i in range(rows):
            c = np.zeros((1, k.lane_step), DTYPES[acc])
            c[0, :n] = begin[i, j : j + n]
            k.tile([(left[i : i + 1], panel)], c, "resume" if resume else "zero")
            assert same_bits(c[0, :n], got[i, j : j + n])


# --- dot tile ---

with_dot = pytest.mark.parametrize("k", [k for k in KERNEL_SETS if k.dot_rows], ids=lambda k: k.name)


class Dot:
    """The operands of one dot tile. left: [rows, depth], right: [cols, depth], result: [cols, rows].

    The first left side is of any storage type that the set takes.
    """

    def __init__(self, k, drawn):
        cols, tall, depth_of, _, gap, seed = drawn
        rng = np.random.default_rng(seed)
        self.k, self.acc, self.gap = k, accumulator(k.compute), gap
        self.cols = round(1 + cols * (len(k.dot_rows) - 1))
        self.rows = round(1 + tall * (k.dot_rows[self.cols - 1] - 1))
        storage = [k.dot_storage[seed % len(k.dot_storage)], k.compute]
        self.values = [
            (random(rng, (self.rows, d), t), random(rng, (self.cols, d), k.compute))
            for d, t in zip(depth_of, storage, strict=False)
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
    for values, at in ((left, (-1, -1)), (right, (-1, 0))):
        values[at] = to_storage(np.array(math.nan), "bf16") if values.dtype == np.uint16 else math.nan
    expected = np.zeros((dot.cols, dot.rows), bool)
    expected[-1] = expected[:, -1] = True
    assert (np.isnan(dot.run(False)) == expected).all()
