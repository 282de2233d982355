"""What holds the core together: scratch memory, and the checks of sanitized builds."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
from core import KERNEL_SETS, core

sanitized = pytest.mark.skipif(not core.sanitizers, reason="a build with sanitizers")
WIDEST = next((k for k in KERNEL_SETS if k.weaves), KERNEL_SETS[0])
DOTTING = next((k for k in KERNEL_SETS if k.dot_rows), None)
FLAT = next((k for k in KERNEL_SETS if k.compute in k.flat_storage), None)
WHOLE = next(k for k in KERNEL_SETS if k.lane_step == k.lanes)


# For each line, which is code and a file: a process that runs the one, with the other as its standard error.
FORKING = """
import ctypes, json, os, sys
sys.path.insert(0, sys.argv[1])
from core import *
for line in sys.stdin:
    code, errors = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        exec(code)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def dying(tmp_path_factory):
    """What a process says that runs some code with the same build and is aborted. One imports for all."""
    command = [sys.executable, "-c", FORKING, str(Path(__file__).parent)]
    errors = tmp_path_factory.mktemp("core") / "errors"
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(code: str) -> str:
            errors.unlink(missing_ok=True)
            process.stdin.write(json.dumps([code, str(errors)]) + "\n")
            process.stdin.flush()
            status = process.stdout.readline()
            assert status, "the process that forks has ended"
            assert int(status) != 0, "it went on"
            return errors.read_text()

        yield run
        process.stdin.close()


# --- scratch ---


def test_scratch_grows_into_one_block():
    """Releasing it allocates nothing: the one block comes with the next piece."""
    if core.sanitizers:
        pytest.skip("every piece is an allocation of its own")
    arena = core.Arena()
    for _ in range(2):
        arena.enter()
        pieces = [arena.take(n) for n in (700_000, 5, 2_000_000, 0, 64)]
        assert all(p % 64 == 0 for p in pieces)
        total = arena.held
        arena.leave()
    assert total >= 2_700_069
    assert arena.held == total  # the second time it was one block, which stays
    arena.enter()
    first, second = arena.take(2_000_000), arena.take(700_000)
    assert second - first == 2_000_000 and arena.held == total
    arena.leave()


def test_releasing_scratch_allocates_nothing():
    arena = core.Arena()
    arena.enter()
    arena.take(700_000)
    arena.enter()
    arena.take(2_000_000)
    before = arena.held
    arena.leave()
    assert arena.held <= before
    arena.leave()
    assert arena.held == 0


def test_too_much_scratch_is_given_back():
    arena = core.Arena()
    arena.enter()
    arena.take(65 << 20)
    arena.leave()
    assert arena.held == 0


def test_scratch_is_reused_after_an_inner_scope():
    if core.sanitizers:
        pytest.skip("every piece is an allocation of its own")
    arena = core.Arena()
    arena.enter()
    arena.take(100)
    arena.enter()
    inner = arena.take(100)
    arena.leave()
    assert arena.take(200) == inner
    arena.leave()


@sanitized
def test_scratch_is_full_of_nan():
    arena = core.Arena()
    arena.enter()
    assert ctypes.string_at(arena.take(100), 100) == b"\xff" * 100
    arena.leave()


@sanitized
@pytest.mark.parametrize(
    ("access", "report"),
    [
        ("ctypes.memset(first + 100, 0, 1)", "heap-buffer-overflow"),
        ("ctypes.memset(first - 1, 0, 1)", "heap-buffer-overflow"),
        ("arena.leave(); ctypes.memset(second, 0, 1)", "heap-use-after-free"),
    ],
)
def test_the_sanitizer_sees_scratch(dying, access, report):
    taken = "arena = core.Arena(); arena.enter(); first = arena.take(100); "
    assert report in dying(taken + "arena.enter(); second = arena.take(100); " + access)


# --- the micro-kernels' contract ---

BROKEN = [
    (WIDEST, "tile", "n_segments", 0, "n_segments must be"),
    (WIDEST, "tile", "n_segments", 3, "n_segments must be"),
    (WIDEST, "tile", "vecs", 0, "vecs must be"),
    (WIDEST, "tile", "vecs", WIDEST.vecs + 1, "vecs must be"),
    (WIDEST, "tile", "rows", 0, "rows must be"),
    (WIDEST, "tile", "rows", WIDEST.max_rows[0] + 1, "rows must be"),
    (WHOLE, "tile", "half", 1, "half is for"),
    (WIDEST, "tile", "panel_lanes", WIDEST.lanes - WIDEST.lane_step, "panel_lanes must be at least"),
    (WIDEST, "tile", "panel_lanes", WIDEST.lanes + 1, "panel_lanes must be whole"),
    (WIDEST, "tile", "ldc", WIDEST.lanes - 1, "ldc must be"),
    (WIDEST, "tile", "c", 0, "c must not be null"),
    (WIDEST, "tile", "c", 2, "c must be aligned"),
    (WIDEST, "tile", "depth", -1, "depth must be"),
    (WIDEST, "tile", "l", 0, "l must not be null"),
    (WIDEST, "tile", "l", 1, "l must be aligned"),
    (WIDEST, "tile", "r", 0, "r must not be null"),
    (WIDEST, "tile", "r", 1, "r must be aligned"),
    (WIDEST, "tile", "ahead.rows", -1, "ahead.rows must be"),
    (WIDEST, "tile", "ahead.rows", 1, "ahead must have one of"),
    (WIDEST, "tile", "ahead.both", 1, "ahead must have one of"),
    (DOTTING, "dot_tile", "n_segments", 0, "n_segments must be"),
    (DOTTING, "dot_tile", "cols", 0, "cols must be"),
    (DOTTING, "dot_tile", "cols", 7, "cols must be"),
    (DOTTING, "dot_tile", "rows", 0, "rows must be"),
    (DOTTING, "dot_tile", "rows", 9, "rows must be"),
    (DOTTING, "dot_tile", "ldc", 0, "ldc must be"),
    (DOTTING, "dot_tile", "c", 0, "c must not be null"),
    (DOTTING, "dot_tile", "c", 1, "c must be aligned"),
    (DOTTING, "dot_tile", "depth", -1, "depth must be"),
    (DOTTING, "dot_tile", "l", 0, "l must not be null"),
    (DOTTING, "dot_tile", "r", 1, "r must be aligned"),
    (DOTTING, "dot_tile", "ahead.runs", 1, "ahead must have no runs"),
    (FLAT, "flat_tile", "rows", 0, "rows must be"),
    (FLAT, "flat_tile", "rows", 13, "rows must be"),
    (FLAT, "flat_tile", "width", -1, "width must be"),
    (FLAT, "flat_tile", "depth", -1, "depth must be"),
    (FLAT, "flat_tile", "start", 1, "flat tiles must not add"),
    (FLAT, "flat_tile", "ldc", 1, "ldc must be"),
    (FLAT, "flat_tile", "c", 0, "c must not be null"),
    (FLAT, "flat_tile", "c", 1, "c must be aligned"),
    (FLAT, "flat_tile", "l", 0, "l must not be null"),
    (FLAT, "flat_tile", "l", 1, "l must be aligned"),
    (FLAT, "flat_tile", "r", 0, "r must not be null"),
    (WIDEST, "pack_lanes", "n_rows", -1, "n_rows must be"),
    (WIDEST, "pack_lanes", "first", -1, "first must be"),
    (WIDEST, "pack_lanes", "n", -1, "n must be"),
    (WIDEST, "pack_lanes", "panel_lanes", 0, "panel_lanes must be at least"),
    (WIDEST, "pack_depth", "panel_lanes", 0, "panel_lanes must be at least"),
    (WIDEST, "pack_depth", "panel_lanes", WIDEST.lanes + 1, "panel_lanes must be whole"),
    (WIDEST, "pack_depth", "panel", 0, "panel must not be null"),
    (WIDEST, "pack_depth", "rows", 0, "rows must not be null"),
    (WIDEST, "pack_depth", "row", 0, "no row may be null"),
]
UNPACKING = next((k for k in KERNEL_SETS if k.compute != "fp64"), None)
BROKEN += [
    (UNPACKING, kernel, *row)
    for kernel in ("unpack", "unpack_lines")
    for row in (
        ("rows", -1, "rows must be"),
        ("first", -1, "first must be"),
        ("n", -1, "n must be"),
        ("group", 0, "group must be"),
        ("codes", 0, "codes must not be null"),
        ("values", 0, "nibbles must have values"),
        ("scale", 0, "scale must not be null"),
        ("scale_stride", 0, "scale_stride must hold every group"),
        ("zero", 0, "only nibbles may have zero points"),
        ("to", 0, "to must not be null"),
        ("to", 1, "to must be aligned"),
        ("to_stride", 4, "to_stride must hold a"),
        ("ordinary", 0, "ordinary scales must be"),
        ("nan", 0, "a scale that is NaN must stay it"),
        ("numbers", 0, "there must be an unpack"),
    )
]
BROKEN += [
    (UNPACKING, "scales", "rows", -1, "rows must be"),
    (UNPACKING, "scales", "n", -1, "n must be"),
    (UNPACKING, "scales", "from", 0, "from must not be null"),
    (UNPACKING, "scales", "to", 0, "to must not be null"),
    (UNPACKING, "scales", "values", 0, "indexed scales must have values"),
]
WEAVING = [
    ("weave.vecs", 1, "only the widest tiles weave"),
    ("weave.half", 1, "no half vector"),
    ("weave.depth", 1, "weave.depth must be a multiple"),
    ("weave.depth", 4, "weave.depth must be at most"),
    ("weave.depth", -2, "weave.depth must be at least"),
    ("weave.rows", 0, "weave.rows must not"),
    ("weave.panel", 0, "weave.panel must not"),
    ("weave.own", 1, "weave must not come beside rows"),
    ("own.depth", 1, "the depth of rows must be"),
    ("own.second", 1, "only the first segment"),
]
WIDENING = [
    ("widen.rows", -1, "widen.rows must be"),
    ("widen.n", 1, "widen.n must be whole units"),
    ("widen.unit", 1, "widen.unit must be"),
    ("widen.from", 0, "one of from and runs"),
    ("widen.both", 0, "one of from and runs"),
    ("widen.to", 0, "widen.to must not be null"),
    ("widen.to", 1, "widen.to must be aligned"),
    ("widen.apart", 1, "widen.units_apart must be"),
    ("widen.ahead", 1, "widen must not come beside ahead"),
]
BROKEN += [(k, "tile", *row) for k in [k for k in KERNEL_SETS if k.widens][:1] for row in WIDENING]
BROKEN += [(k, "tile", "widen", 1, "for kernel sets that widen") for k in KERNEL_SETS if not k.widens][:1]
if WIDEST.weaves:
    BROKEN += [(WIDEST, "tile", *row) for row in WEAVING]
BROKEN += [(k, "tile", "weave", 1, "for kernel sets that weave") for k in KERNEL_SETS if not k.weaves][:1]
BROKEN += [(k, "tile", "start", 1, "must not add") for k in KERNEL_SETS if k.compute == "bf16"][:1]
DOTTING_CODES = [
    ("rows", 0, "rows must be"),
    ("rows", 2, "codes must have the tile's rows"),
    ("cols", 7, "cols must be"),
    ("codes.rows", 2, "codes must have the tile's rows"),
    ("codes.n", 3, "codes must have the segment's depth"),
    ("codes", 0, "codes must not be null"),
    ("ordinary", 0, "scales must be ordinary"),
    ("scale", 0, "ordinary scales must be"),
    ("r", 0, "r must not be null"),
    ("c", 0, "c must not be null"),
]
FLATTENING_CODES = [
    ("rows", 0, "rows must be"),
    ("rows", 7, "rows must be"),
    ("depth", 0, "depth must be"),
    ("depth", 18, "depth must be"),
    ("codes.rows", 4, "codes must have the tile's depth"),
    ("codes.n", 3, "codes must have the tile's width"),
    ("codes", 0, "codes must not be null"),
    ("ordinary", 0, "scales must be ordinary"),
    ("scale", 0, "ordinary scales must be"),
    ("l", 0, "l must not be null"),
    ("c", 0, "c must not be null"),
]
BROKEN += [(k, "dot_codes", *row) for k in KERNEL_SETS if k.dot_codes_cols for row in DOTTING_CODES]
BROKEN += [(k, "flat_codes", *row) for k in KERNEL_SETS if k.flat_codes_rows for row in FLATTENING_CODES]
BROKEN += [(k, "dot_codes", "", 0, "a dot tile of codes") for k in KERNEL_SETS if not k.dot_codes_cols][:1]
BROKEN += [(k, "flat_codes", "", 0, "a flat tile of codes") for k in KERNEL_SETS if not k.flat_codes_rows][:1]
BROKEN += [(k, "flat_lines", *row) for k, kernel, *row in BROKEN if kernel == "flat_tile"]
BROKEN += [(k, "dot_tile", "", 0, "must be a dot tile") for k in KERNEL_SETS if not k.dot_rows][:1]
BROKEN += [(k, "flat_tile", "", 0, "must be a flat tile") for k in KERNEL_SETS if not k.flat_storage][:1]


@sanitized
@pytest.mark.parametrize(
    ("k", "kernel", "change", "to", "report"),
    [row for row in BROKEN if row[0] is not None],
    ids=lambda v: v.name if hasattr(v, "name") else str(v),
)
def test_a_broken_contract_is_reported(dying, k, kernel, change, to, report):
    kernels = f"next(k for k in KERNEL_SETS if k.name == {k.name!r})"
    said = dying(f"core.check_contract({kernels}, {kernel!r}, {change!r}, {to})")
    assert f"{kernel} of {k.name}: " in said and report in said


@pytest.mark.parametrize("k", KERNEL_SETS, ids=lambda k: k.name)
def test_the_contract_holds_for_small_calls(k):
    for kernel in ("tile", "pack_lanes", "pack_depth", *(["dot_tile"] if k.dot_rows else [])):
        core.check_contract(k, kernel)
    if k.compute in k.flat_storage:
        core.check_contract(k, "flat_tile")
        core.check_contract(k, "flat_lines")
    if k.compute != "fp64":
        for kernel in ("unpack", "unpack_lines", "scales"):
            core.check_contract(k, kernel)
    if k.dot_codes_cols:
        core.check_contract(k, "dot_codes")
    if k.flat_codes_rows:
        core.check_contract(k, "flat_codes")
    if k.widens:
        core.check_contract(k, "tile", "widen")
    if k.weaves:
        core.check_contract(k, "tile", "weave")
        core.check_contract(k, "tile", "own")
