"""Unpacking by every kernel set that can run here, and flat tiles of what it gives, against numpy."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from core import DTYPES, KERNEL_SETS, Output, core, same_bits, to_float, to_storage
from hypothesis import given
from hypothesis import strategies as st

TAKEN = {"bf16": ("bf16",), "fp32": ("bf16", "fp16", "fp32")}  # by the compute type
UNPACKING = [(k, numbers) for k in KERNEL_SETS for numbers in TAKEN.get(k.compute, ())]
every_unpack = pytest.mark.parametrize(
    ("k", "numbers"), UNPACKING, ids=lambda v: v if isinstance(v, str) else v.name
)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
TABLES = {
    "any": np.random.default_rng(0).uniform(-1, 1, 16).astype(np.float32),
    "integers": np.arange(16, dtype=np.float32),
    "e2m1": E2M1,
}
CODES = ("nibbles_high", "nibbles_low", "int8", "e4m3")
LEAST, MOST = 2.0**-100, 2.0**100


def e4m3(byte: np.ndarray) -> np.ndarray:
    exponent, fraction = byte.astype(int) >> 3 & 15, byte & 7
    size = np.where(exponent > 0, (1 + fraction / 8) * 2.0 ** (exponent - 7.0), fraction / 8 * 2.0**-6)
    value = np.where((byte & 0x7F) == 0x7F, np.nan, size) * np.where(byte >= 128, -1, 1)
    return value.astype(np.float32)


def e8m0(byte: np.ndarray) -> np.ndarray:
    return np.where(byte == 255, np.nan, 2.0 ** (byte.astype(np.float64) - 127)).astype(np.float32)


def is_ordinary(scale: np.ndarray) -> bool:
    size = np.abs(scale)
    return bool(((size == 0) | ((size >= LEAST) & (size <= MOST))).all())


def draw_scales(rng: np.random.Generator, kind: str, shape: tuple) -> np.ndarray:
    scale = rng.uniform(-2, 2, shape).astype(np.float32)
    if kind == "limits":
        scale = rng.choice(np.array([0, -0.0, LEAST, -LEAST, MOST, -MOST, 1], np.float32), shape)
    if kind == "borders":
        inner, outer = np.array([LEAST, MOST], np.float32), np.array([0, np.inf], np.float32)
        borders = np.concatenate([inner, np.nextafter(inner, outer), np.nextafter(inner, outer[::-1])])
        scale = rng.choice(borders, shape) * rng.choice(np.array([1, -1], np.float32), shape)
    if kind == "subnormal":
        scale *= np.float32(2.0**-126)
    if kind == "special":
        odd = np.array([0, np.nan, np.inf, -np.inf, 3e38, 1e-45, 1], np.float32)
        scale = np.where(rng.random(shape) < 0.5, rng.choice(odd, shape), scale)
    return scale


class Codes:
    """Rows of codes, from column 0 on, in a matrix with bytes between them; and how to unpack them."""

    def __init__(self, rng, code, table, rows, first, n, group, scales, with_zero, alike=False, nans=True):
        columns = first + n
        self.code, self.first, self.n, self.group = code, first, n, group
        wide = code.startswith("nibbles")
        if wide:
            columns += columns % 2
            nibbles = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
            even, odd = nibbles[:, ::2], nibbles[:, 1::2]
            packed = even << 4 | odd if code == "nibbles_high" else odd << 4 | even
            value = TABLES[table][nibbles]
        else:
            packed = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
            if not nans:
                packed[(packed & 0x7F) == 0x7F] ^= 1
            value = packed.view(np.int8).astype(np.float32) if code == "int8" else e4m3(packed)
        whole = np.full((rows, packed.shape[1] + 5), 0x7F, np.uint8)
        self.codes = whole[:, : packed.shape[1]] if rows else packed
        self.codes[...] = packed
        self.values = TABLES[table] if wide else None
        groups = (first + n - 1) // group - first // group + 1
        self.scale = draw_scales(rng, scales, (rows, groups))
        if alike:  # as those of fp8 blocks
            self.scale[: rows - rows // 2] = self.scale[0]
        self.zero = rng.integers(0, 256, (rows, groups)).astype(np.float32) if with_zero and wide else None
        which = np.arange(first, first + n) // group - first // group
        with np.errstate(all="ignore"):
            less = value[:, first : first + n] - (self.zero[:, which] if self.zero is not None else 0)
            self.numbers = (less * self.scale[:, which]).astype(np.float32)

    def unpack(self, k, numbers: str, to: np.ndarray, lines: bool) -> None:
        nan = np.isnan(self.scale)
        scale = np.where(nan, np.float32(np.nan), self.scale)
        core.unpack(
            k, to, self.codes, self.code, numbers, scale, self.group, self.first, self.n, self.values,
            self.zero, is_ordinary(self.scale), lines,
        )  # fmt: skip

    def wanted(self, k, numbers: str) -> np.ndarray:
        """Rounded to `numbers`, in the compute type."""
        rounded = to_float(to_storage(self.numbers.astype(np.float64), numbers))
        return to_storage(rounded, k.compute)


def same_numbers(out: np.ndarray, wanted: np.ndarray) -> bool:
    """The same bits, but that NaN is NaN and a zero may have lost its sign."""
    zero = (to_float(out) == 0) & (to_float(wanted) == 0)
    return same_bits(np.where(zero, out.dtype.type(0), out), np.where(zero, wanted.dtype.type(0), wanted))


@st.composite
def problems(draw):
    code = draw(st.sampled_from(CODES))
    group = draw(st.sampled_from((16, 32, 48, 64, 96, 128, 1 << 20)))
    return {
        "code": code,
        "table": "e2m1" if group < 32 else draw(st.sampled_from(tuple(TABLES))),
        "rows": draw(st.integers(1, 5)),
        "first": draw(st.sampled_from((0, 0, 1, 16, 32, 37, 64, 130))),
        "n": draw(st.sampled_from((1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 64, 65, 96, 100, 128, 160, 257))),
        "group": group,
        "scales": draw(st.sampled_from(("usual", "usual", "limits", "borders", "subnormal", "special"))),
        "with_zero": draw(st.booleans()),
        "alike": draw(st.booleans()),
        "nans": draw(st.booleans()),  # among E4M3 codes
    }


@every_unpack
@given(problem=problems(), seed=st.integers(0, 2**20))
def test_rows(k, numbers, problem, seed):
    codes = Codes(np.random.default_rng(seed), **problem)
    out = Output((problem["rows"], problem["n"]), k.compute, pitch=3)
    codes.unpack(k, numbers, out.array, lines=False)
    assert same_numbers(out.check(), codes.wanted(k, numbers))


@every_unpack
@given(problem=problems(), seed=st.integers(0, 2**20))
def test_lines(k, numbers, problem, seed):
    """Rows are steps of the depth, columns lanes; a pair's missing last row is zero, whatever the scales."""
    codes = Codes(np.random.default_rng(seed), **problem)
    rows, n = problem["rows"], problem["n"]
    lines = -(-rows // k.pack)
    out = Output((lines, n, k.pack), k.compute)
    codes.unpack(k, numbers, out.array, lines=True)
    wanted = np.zeros((lines * k.pack, n), DTYPES[k.compute])
    wanted[:rows] = codes.wanted(k, numbers)
    assert same_numbers(out.check(), wanted.reshape(lines, k.pack, n).swapaxes(1, 2).copy())


SPREAD = np.exp2(np.linspace(-100, 99, 40)) * np.random.default_rng(0).uniform(1, 2, 40)


@every_unpack
@pytest.mark.parametrize("lines", [False, True])
def test_every_e4m3_of_any_scale(k, numbers, lines):
    """All but NaN, for which tables do not serve, of scales of all sizes."""
    every = np.arange(256, dtype=np.uint8)
    every = np.resize(every[(every & 0x7F) != 0x7F], 256)
    bytes_ = np.stack([np.roll(every, 7 * i) for i in range(len(SPREAD))])
    rows, n = bytes_.shape
    codes = Codes(np.random.default_rng(0), "e4m3", "any", rows, 0, n, 1 << 20, "usual", False)
    codes.codes = bytes_
    signs = np.where(np.arange(rows) % 3, 1, -1)
    codes.scale = (SPREAD * signs).astype(np.float32).clip(-MOST, MOST)[:, None]
    assert is_ordinary(codes.scale)
    with np.errstate(all="ignore"):
        codes.numbers = e4m3(bytes_) * codes.scale
        wanted = codes.wanted(k, numbers)
    out = Output((rows // k.pack, n, k.pack) if lines else (rows, n), k.compute)
    codes.unpack(k, numbers, out.array, lines)
    if lines:
        wanted = wanted.reshape(rows // k.pack, k.pack, n).swapaxes(1, 2).copy()
    assert same_numbers(out.check(), wanted)


@every_unpack
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("ordinary", [True, False])
def test_every_code(k, numbers, code, ordinary):
    """All 16 or 256 in every lane, also where a scale that is not ordinary has the careful way taken."""
    every = np.arange(256, dtype=np.uint8)
    bytes_ = np.concatenate([np.roll(every, -i) for i in range(64)]).reshape(4, -1)
    codes = Codes(np.random.default_rng(0), code, "any", 4, 0, 64, 64, "usual", False)
    nibbles = code.startswith("nibbles")
    codes.codes = bytes_
    codes.n = bytes_.shape[1] * (2 if nibbles else 1)
    codes.group = 1 << 20
    codes.scale = np.array([[0.37], [-1.0], [3e-3], [0.0 if ordinary else np.float32(np.inf)]], np.float32)
    with np.errstate(all="ignore"):
        if nibbles:
            high, low = TABLES["any"][bytes_ >> 4], TABLES["any"][bytes_ & 15]
            pair = (high, low) if code == "nibbles_high" else (low, high)
            value = np.stack(pair, -1).reshape(4, -1)
        else:
            value = bytes_.view(np.int8).astype(np.float32) if code == "int8" else e4m3(bytes_)
        codes.numbers = value * codes.scale
    for lines in (False, True):
        shape = (4 // k.pack, codes.n, k.pack) if lines else (4, codes.n)
        out = Output(shape, k.compute)
        codes.unpack(k, numbers, out.array, lines)
        wanted = codes.wanted(k, numbers)
        if lines:
            wanted = wanted.reshape(4 // k.pack, k.pack, codes.n).swapaxes(1, 2).copy()
        assert same_numbers(out.check(), wanted)


# Tiles of codes: what they have a way for, and what is the same without.
of_dots = pytest.mark.parametrize("k", [k for k in KERNEL_SETS if k.dot_codes_cols], ids=lambda k: k.name)
of_flats = pytest.mark.parametrize("k", [k for k in KERNEL_SETS if k.flat_codes_rows], ids=lambda k: k.name)
WAYS = [
    *((code, group, False) for code in CODES[:2] for group in (16, 32, 64, 128, 1 << 20)),
    *((code, group, True) for code in CODES[:2] for group in (32, 64, 128)),
    *((code, group, False) for code in CODES[2:] for group in (64, 128, 1 << 20)),
]


def left_of(rng: np.random.Generator, k, rows: int, depth: int) -> np.ndarray:
    return to_storage(rng.uniform(-1, 1, (rows, depth)), k.compute)


def dot_of_codes(k, codes: Codes, cols: int, rng: np.random.Generator) -> bool:
    """Whether there was a way; then it gave the bits of the dot tile, else it wrote nothing."""
    x, rows = left_of(rng, k, cols, codes.n), len(codes.codes)
    out, tile, numbers = (Output(s, t) for s, t in _shapes(k, (cols, rows), (rows, codes.n)))
    before = out.array.copy()
    done = core.dot_codes(
        k, out.array, codes.codes, codes.code, codes.scale, codes.group, codes.first, codes.n, codes.values,
        codes.zero, x,
    )  # fmt: skip
    codes.unpack(k, "bf16", numbers.array, lines=False)
    k.dot_tile([(numbers.array, x)], tile.array)
    assert same_bits(out.check(), tile.array if done else before)
    return done


def flat_of_codes(k, codes: Codes, height: int, resume: bool, rng: np.random.Generator) -> bool:
    """The same of the flat tile."""
    depth = len(codes.codes)
    left = left_of(rng, k, height, depth)
    out, tile, numbers = (Output(s, t) for s, t in _shapes(k, (height, codes.n), (depth, codes.n)))
    if resume:
        out.array[...] = tile.array[...] = rng.uniform(-1, 1, (height, codes.n))
    before = out.array.copy()
    done = core.flat_codes(
        k, out.array, codes.codes, codes.code, codes.scale, codes.group, codes.first, codes.n, codes.values,
        codes.zero, left, resume,
    )  # fmt: skip
    codes.unpack(k, "bf16", numbers.array, lines=False)
    k.flat_tile(left, numbers.array, tile.array, resume)
    assert same_bits(out.check(), tile.array if done else before)
    return done


def _shapes(k, out: tuple[int, int], numbers: tuple[int, int]) -> list:
    return [(out, "fp32"), (out, "fp32"), (numbers, k.compute)]


def usual_codes(rng, code, group, zero, first, n, nans, rows) -> Codes:
    powers = nans and code.startswith("nibbles")
    scales = "limits" if powers else "usual"
    codes = Codes(rng, code, "e2m1", rows, first, n, group, scales, zero, nans=nans)
    if code == "e4m3":  # of blocks
        codes.scale[...] = codes.scale[0]
    return codes


codes_of_tiles = problems().filter(lambda p: p["scales"] in ("usual", "limits") and p["n"] > 15)


@of_dots
@given(problem=codes_of_tiles, data=st.data(), seed=st.integers(0, 2**20))
def test_dot_tiles_of_codes(k, problem, data, seed):
    cols = data.draw(st.integers(1, k.dot_codes_cols))
    rng = np.random.default_rng(seed)
    problem["rows"] = min(problem["rows"], k.dot_rows[cols - 1])
    dot_of_codes(k, Codes(rng, **problem), cols, rng)


@of_flats
@given(problem=codes_of_tiles, data=st.data(), resume=st.booleans(), seed=st.integers(0, 2**20))
def test_flat_tiles_of_codes(k, problem, data, resume, seed):
    height = data.draw(st.integers(1, k.flat_codes_rows))
    rng = np.random.default_rng(seed)
    flat_of_codes(k, Codes(rng, **problem), height, resume, rng)


@pytest.mark.parametrize(
    "k", [k for k in KERNEL_SETS if k.flat_codes_rows and k.dot_codes_cols], ids=lambda k: k.name
)
@pytest.mark.parametrize(("code", "group", "zero"), WAYS)
def test_there_is_a_way_for_usual_codes(k, code, group, zero):
    """Of all sizes of tiles, from anywhere: also NaN among E4M3 codes, which dot tiles give back."""
    rng = np.random.default_rng(0)
    way = k.compute == "fp32" or not zero or group > 32
    sizes = itertools.product((0, 128), (64, 192), (False, True))
    for make in [functools.partial(usual_codes, rng, code, group, zero, *size) for size in sizes]:
        for cols, rows in ((c, r) for c in range(1, k.dot_codes_cols + 1) for r in (1, 3, k.dot_rows[c - 1])):
            codes = make(rows)
            nan = code == "e4m3" and np.isnan(codes.numbers).any()
            assert dot_of_codes(k, codes, cols, rng) == (way and not nan)
        for height, depth in itertools.product(range(1, k.flat_codes_rows + 1), (2, 10, 16)):
            assert flat_of_codes(k, make(depth), height, depth != 10, rng) == way


STORED = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}
BYTES = {"e8m0": e8m0, "e4m3": e4m3, "u8": lambda b: b.astype(np.float32)}
every_scale = pytest.mark.parametrize(
    "k", [k for k in KERNEL_SETS if k.compute in TAKEN], ids=lambda k: k.name
)


@every_scale
@pytest.mark.parametrize("kind", [*STORED, *BYTES, "indexed"])
@given(
    rows=st.integers(1, 9),
    n=st.sampled_from((1, 3, 7, 8, 9, 16, 19, 33, 130)),
    step=st.integers(1, 3),
    apart=st.integers(0, 2),
    scales=st.sampled_from(("usual", "limits", "subnormal", "special")),
    seed=st.integers(0, 2**20),
)
def test_scales(k, kind, rows, n, step, apart, scales, seed):
    rng = np.random.default_rng(seed)
    map_ = draw_scales(rng, scales, (256,))
    factor, offset = np.float32(0.3), np.float32(0.07)
    if kind in STORED:
        stored = to_storage(draw_scales(rng, scales, (rows, n)).astype(np.float64), kind)
        wanted = to_float(stored).astype(np.float32)
    else:
        low, high = (90, 160) if scales == "usual" else (0, 256)
        stored = rng.integers(low, high, (rows, n)).astype(np.uint8)
        with np.errstate(all="ignore"):
            wanted = map_[stored] * factor + offset if kind == "indexed" else BYTES[kind](stored)
            wanted = (wanted * factor if kind == "e4m3" else wanted).astype(np.float32)
    source = np.zeros((rows, n * step + apart), stored.dtype)[:, : n * step : step]
    source[...] = stored
    to = np.full((rows, n), np.nan, np.float32)
    ordinary = core.read_scales(k, to, source, kind, factor, offset, map_)
    assert same_bits(to, wanted)
    assert ordinary == is_ordinary(wanted)
    assert (to.view(np.uint32)[np.isnan(to)] & 0x7FFFFFFF == 0x7FC00000).all(), (
        "a NaN that rounding would change"
    )


def test_bad_arguments_are_refused():
    k = next(k for k, _ in UNPACKING)
    codes, scale = np.zeros((2, 8), np.uint8), np.ones((2, 1), np.float32)
    to = np.zeros((2, 16), DTYPES[k.compute])
    values = TABLES["integers"]
    with pytest.raises(ValueError, match="there is no int3"):
        core.unpack(k, to, codes, "int3", "bf16", scale, 16, 0, 16, values)
    with pytest.raises(ValueError, match="codes must hold"):
        core.unpack(k, to, codes, "nibbles_low", "bf16", scale, 16, 1, 16, values)
    with pytest.raises(ValueError, match="nibbles need 16 values"):
        core.unpack(k, to, codes, "nibbles_low", "bf16", scale, 16, 0, 16)
    with pytest.raises(ValueError, match="scale must be"):
        core.unpack(k, to, codes, "nibbles_low", "bf16", scale, 8, 0, 16, values)
    with pytest.raises(ValueError, match="to must be as source"):
        core.read_scales(k, scale, np.ones((2, 3), np.float32), "fp32")
