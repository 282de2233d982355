"""The emulation that lets the AVX-512 kernels run on AVX2: complete, and exact where a CPU has both."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import core_builds
import numpy as np
import pytest
from core import core

import torch_moelora

TESTS = Path(__file__).resolve().parent
UKERNEL = TESTS.parent / "csrc" / "ukernel"
EMULATION = TESTS / "wide_emulation"
# Those that AVX2 lacks: all on 512 bits, on fewer those with a mask or on bf16.
WIDE = re.compile(r"_mm512_\w+|_mm(?:256)?_\w*(?:mask|pbh|pbf16|bf16)\w*")
AVX2_MASKS = re.compile(r"movemask|mask(load|store)|maskmove")

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="this is no x86-64")


def wide_names(text: str) -> set[str]:
    code = re.sub(r"//.*", "", text)
    return {name for name in WIDE.findall(code) if not AVX2_MASKS.search(name)}


def test_every_intrinsic_is_emulated_and_every_emulation_compared():
    """Where AVX-512 is real, too: who uses one more intrinsic learns here that narrow machines lack it."""
    used = set().union(
        *(wide_names(p.read_text()) for p in UKERNEL.iterdir() if p.suffix in (".cpp", ".inl"))
    )
    emulated = wide_names((EMULATION / "immintrin.h").read_text())
    assert used <= emulated, f"tests/wide_emulation/immintrin.h lacks {sorted(used - emulated)}"
    compared = set(
        re.findall(r"^  [A-Z_]+\((_mm\w+)", (EMULATION / "operations.cpp").read_text(), re.MULTILINE)
    )
    assert emulated == compared, sorted(emulated ^ compared)


@x86
def test_the_kernels_compile_on_the_emulation():
    """Where AVX-512 is real, too: what it lacks besides intrinsics, a vector's elements say, shows here."""
    core_builds.wide_kernels()


@x86
def test_an_emulated_build_needs_avx2_alone():
    if not core.wide_emulated:
        pytest.skip("the module under test is no emulated build; `tests/run.py wide` makes one")
    assert torch_moelora._C.wide_emulated
    if not shutil.which("objdump"):
        pytest.skip("there is no objdump")
    # Each instruction in one line, however long.
    command = ["objdump", "-d", "--insn-width=16", core.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^ *[0-9a-f]+:\t(.*)$", listing, re.MULTILINE)
    assert len(lines) > 10_000
    # In 64-bit mode no instruction but those of AVX-512 begins with this byte.
    assert not [line for line in lines if line.startswith("62 ")]


# --- each intrinsic, emulated and real

INPUT = np.dtype([("operands", np.uint32, (3, 16)), ("mask", np.uint64)])
# Which of two NaNs comes out is up to the compiler here, which may exchange operands.
ANY_NAN = ("_mm512_add_ps", "_mm512_sub_ps", "_mm512_mul_ps", "_mm512_fmadd_ps", "_mm512_reduce_add_ps")
UPWARD, NEAREST = 0x800, 0  # fesetround


class Operations:
    """One copy of wide_emulation/operations.cpp."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.name_of.restype = ctypes.c_char_p
        count = ctypes.c_int.in_dll(self.library, "operations").value
        self.names = [self.library.name_of(i).decode() for i in range(count)]

    def on_memory(self, wanted: bool) -> list[int]:
        return [i for i in range(len(self.names)) if bool(self.library.on_memory(i)) == wanted]

    def results(self, operation: int, inputs: np.ndarray) -> np.ndarray:
        """[n, 64] bytes; 0xa5 where the result has fewer."""
        out = np.full((len(inputs), 64), 0xA5, np.uint8)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (inputs, out)]
        self.library.on_registers(operation, ctypes.c_int64(len(inputs)), *pointers)
        return out

    def at(self, address: int, operation: int, given: np.ndarray) -> bytes:
        """What a load from there gives; a store leaves it as it is."""
        out = np.full(64, 0xA5, np.uint8)
        pointers = [ctypes.c_void_p(p) for p in (given.ctypes.data, address, out.ctypes.data)]
        self.library.at_memory(operation, *pointers)
        return out.tobytes()


@pytest.fixture(scope="module")
def emulated() -> Operations:
    if "avx2" not in core.isa_report()["detected"]:
        pytest.skip("this CPU lacks AVX2, which the emulation is made of")
    return Operations(core_builds.wide_operations() / "libwide_emulated.so")


@pytest.fixture(scope="module")
def real(emulated) -> Operations:
    if not emulated.library.has_real_instructions():
        pytest.skip("this CPU lacks AVX-512-BF16 (avx512f, bw, vl, dq, bf16): nothing to compare with")
    return Operations(core_builds.wide_operations() / "libwide_real.so")


def random_operands(rng: np.random.Generator, n: int) -> np.ndarray:
    """[n, 3, 16]: any bits, edges of fp32, sums that cancel, pairs of edges of bf16, all of these mixed."""
    shape = (n, 3, 16)
    any_bits = rng.integers(0, 2**32, shape, np.uint32)
    edges = np.array(
        [0, 1, 0x7FFFFF, 0x800000, 0x800001, 0x7F8000, 0x808000, 0x33000000, 0x3F800000, 0x3F808000,
         0x3F818000, 0x3F817FFF, 0x7F7FFFFF, 0x7F7F8000, 0x7F800000, 0x7F800001, 0x7F80FFFF,
         0x7FBFFFFF, 0x7FC00000],
        np.uint32,
    )  # fmt: skip
    singles = rng.choice(edges, shape) | rng.integers(0, 2, shape, np.uint32) << 31
    near_one = any_bits & 0x807FFFFF | rng.integers(120, 135, shape, np.uint32) << 23
    halves = np.array(
        [0, 1, 0x40, 0x80, 0x1F80, 0x2000, 0x3380, 0x3F80, 0x7F7F, 0x7F80, 0x7F81, 0x7FC1], np.uint32
    )
    odd, even = (rng.choice(halves, shape) | rng.integers(0, 2, shape, np.uint32) << 15 for _ in range(2))
    kinds = rng.integers(0, 5, (n, 1, 1))
    kinds = np.where(kinds == 4, rng.integers(0, 4, shape), kinds)
    return np.choose(kinds, [any_bits, singles, near_one, odd << 16 | even])


def nearly_subnormal(rng: np.random.Generator, n: int) -> np.ndarray:
    """[n, 3, 16]: sums of about 2^-126, and products from far below to about that."""
    shape = (n, 16)
    signs = rng.integers(0, 2, (5, *shape), np.uint32)
    sums = signs[0] << 31 | rng.integers(0x7FFFF8, 0x800009, shape, np.uint32)
    exponents = rng.integers(48, 66, (4, *shape), np.uint32)  # two of them: 2^-158 to 2^-124
    parts = signs[1:] << 15 | exponents << 7 | rng.choice(np.array([0, 1, 64, 127], np.uint32), (4, *shape))
    return np.stack([sums, parts[0] << 16 | parts[1], parts[2] << 16 | parts[3]], axis=1)


def every_upper_half() -> np.ndarray:
    """[n, 3, 16]: each upper half of an fp32 (each fp16) with the lower halves at which rounding changes."""
    lower = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x2000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (np.arange(2**16, dtype=np.uint32)[:, None] << 16 | lower).reshape(-1, 1, 16)
    return np.concatenate([values, np.roll(values, 1), values], axis=1)


def inputs() -> np.ndarray:
    rng = np.random.default_rng(0)
    operands = [random_operands(rng, 20_000), nearly_subnormal(rng, 20_000), every_upper_half()]
    made = np.zeros(sum(map(len, operands)), INPUT)
    made["operands"] = np.concatenate(operands)
    made["mask"] = rng.integers(0, 2**64, len(made), np.uint64)
    return made


@pytest.mark.parametrize("rounding", [NEAREST, UPWARD], ids=["to nearest", "upward"])
def test_results_are_those_of_the_real_instructions(emulated, real, rounding):
    assert emulated.names == real.names
    given, c_library = inputs(), ctypes.CDLL(None)
    for i in emulated.on_memory(False):
        assert c_library.fesetround(rounding) == 0
        out, expected = emulated.results(i, given), real.results(i, given)
        c_library.fesetround(NEAREST)
        differs = out.view(np.uint32) != expected.view(np.uint32)
        if emulated.names[i] in ANY_NAN:
            differs &= ~(np.isnan(out.view(np.float32)) & np.isnan(expected.view(np.float32)))
        wrong = np.argwhere(differs)
        message = f"{emulated.names[i]}: {len(wrong)} lanes differ"
        if len(wrong):
            row, lane = wrong[0]
            message += (
                f", first {given['operands'][row, :, lane]} of {given[row]}: {out[row]}, not {expected[row]}"
            )
        assert not len(wrong), message


# --- memory

PAGE = mmap.PAGESIZE


@pytest.fixture(scope="module")
def island() -> np.ndarray:
    """A page between two that must not be touched: whoever does is killed."""
    memory = mmap.mmap(-1, 3 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (address, address + 2 * PAGE):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), PAGE, 0) == 0
    return np.frombuffer(memory, np.uint8, PAGE, PAGE)


def operand_of(name: str) -> tuple[int, int]:
    """(elements, bytes of each)"""
    width = {"_mm": 16, "_mm256": 32, "_mm512": 64}[name[: name.index("_", 1)]]
    size = {"epi8": 1, "epi16": 2, "ps": 4, "si512": 64}[name[name.rindex("_") + 1 :]]
    return width // size, size


def places(rng: np.random.Generator, name: str) -> list[tuple[int, np.ndarray]]:
    """(offset from the page's start, mask) of operands; what lies outside the page is outside the mask."""
    n, size = operand_of(name)
    if "mask" not in name:
        aligned = [0, 64, PAGE - 64]
        return [
            (at, np.ones(n, bool)) for at in (aligned if "u_" not in name else [*aligned, 1, PAGE - 64 - 4])
        ]
    found = []
    for inside in range(n + 1):
        some = rng.integers(0, 2, n).astype(bool)
        for mask in (np.ones(n, bool), some):
            found.append((PAGE - inside * size, mask & (np.arange(n) < inside)))
            found.append(((inside - n) * size, mask & (np.arange(n) >= n - inside)))
            found.append((128 + inside, mask))
    return found


def one_input(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    given = np.zeros(1, INPUT)
    given["operands"] = random_operands(rng, 1)
    given["mask"] = sum(1 << int(i) for i in np.flatnonzero(mask))
    return given


@pytest.mark.parametrize("copy", ["emulated", "real"])
def test_memory_outside_the_mask_is_not_touched(copy, island, request):
    operations = request.getfixturevalue(copy)
    rng = np.random.default_rng(0)
    for i in operations.on_memory(True):
        name = operations.names[i]
        n, size = operand_of(name)
        for at, mask in places(rng, name):
            given = one_input(rng, mask)
            before = rng.integers(0, 256, PAGE).astype(np.uint8)
            island[:] = before
            out = operations.at(island.ctypes.data + at, i, given)
            bytes_of_mask = np.repeat(mask, size)
            touched = at + np.flatnonzero(bytes_of_mask)
            if "load" in name:
                expected = np.zeros(n * size, np.uint8)
                expected[bytes_of_mask] = before[touched]
                assert out[: n * size] == expected.tobytes(), (name, at, mask)
            else:
                before[touched] = given["operands"].view(np.uint8)[0, 0, : n * size][bytes_of_mask]
            assert np.array_equal(island, before), (name, at, mask)


@pytest.mark.parametrize(
    "name", ["_mm512_load_ps", "_mm512_load_si512", "_mm512_store_ps", "_mm512_store_si512"]
)
def test_aligned_ones_fault_at_other_addresses(emulated, island, name):
    given = one_input(np.random.default_rng(0), np.ones(1, bool))
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        emulated.at(island.ctypes.data + 32, emulated.names.index(name), given)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
