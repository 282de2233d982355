"""Tile shapes: tables that ship, and with MOELORA_AUTOTUNE=1 a search whose results stay on disk.

The first row that fits is taken. A row that names K and N is a *shipped shape*: nothing is ever searched for
it. docs/cuda.md says how to measure and add rows.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.runtime.errors import TritonError

from .. import switches


def registers(warps: int) -> int:
    """A thread's share of a multiprocessor's 65536 where so many warps have them. Told what it may take, the
    assembler does not spill in order to take less.
    """
    return min(255, 65536 // (32 * warps))


@dataclass(frozen=True)
class Gemm:
    """The grouped GEMM: a tile of block_m rows × block_n columns, block_k of the contraction a step.

    group_m row tiles go over one column block before the next; per_sm programs share a multiprocessor;
    descriptor: weights through the tensor copy engine where their strides allow it.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    per_sm: int = 1
    descriptor: bool = False

    @property
    def registers(self) -> int:
        return registers(self.warps * self.per_sm)


@dataclass(frozen=True)
class Outer:
    """Sums of outer products over rows: block_p × block_q of the result, block_s rows a step."""

    block_p: int
    block_q: int
    block_s: int
    warps: int
    stages: int

    @property
    def registers(self) -> int:
        return registers(self.warps)


class Machine(NamedTuple):
    """`arch` as the tables call it, the number of multiprocessors, and the device's own name."""

    arch: str
    processors: int
    name: str


class Key(NamedTuple):
    """What a configuration depends on: [S, k] × [E, n, k] or Σ [n] × [k]; `rank` and `rows` are buckets."""

    kernel: str
    arch: str
    dtype: str
    k: int
    n: int
    rank: int
    rows: int


ANY = 1 << 62
# 64 rows are the fewest that wgmma takes. Few rows leave the weights' bandwidth as the limit: more programs.
FLAT = Gemm(64, 128, 64, warps=4, stages=4, per_sm=2, descriptor=True)
# 48 KiB a stage. A fourth pays up to 5 % at 256 rows an expert, and nothing at 1024.
WIDE = Gemm(128, 256, 64, warps=8, stages=3, descriptor=True)
DEEP = Gemm(128, 256, 64, warps=8, stages=4, descriptor=True)
# Measured on an H100: rows an expert up to → configuration.
HOPPER = ((96, FLAT), (511, DEEP), (ANY, WIDE))
# Qwen3-30B-A3B: gate_up, its dX, down, its dX.
QWEN3 = ((2048, 1536), (1536, 2048), (768, 2048), (2048, 768))

# arch, dtype, K, N, rank up to, rows an expert up to → configuration. None fits everything.
GEMM: tuple[tuple, ...] = (
    *(("sm_90", "half", k, n, ANY, rows, config) for k, n in QWEN3 for rows, config in HOPPER),
    *(("sm_90", "half", None, None, ANY, rows, config) for rows, config in HOPPER),
    ("sm_90", "tf32", None, None, ANY, ANY, Gemm(64, 128, 32, warps=4, stages=3, per_sm=2)),
    ("sm_100", "half", None, None, ANY, 96, Gemm(64, 128, 64, 4, 4, per_sm=2, descriptor=True)),
    ("sm_100", "half", None, None, ANY, ANY, Gemm(128, 128, 64, 8, 4, per_sm=1, descriptor=True)),
    ("sm_100", "tf32", None, None, ANY, ANY, Gemm(64, 128, 32, warps=4, stages=3, per_sm=2)),
    ("sm_80", "half", None, None, ANY, 48, Gemm(32, 128, 64, warps=4, stages=4, per_sm=2)),
    ("sm_80", "half", None, None, ANY, ANY, Gemm(128, 128, 32, warps=8, stages=4)),
    ("sm_80", "tf32", None, None, ANY, ANY, Gemm(64, 64, 32, warps=4, stages=3, per_sm=2)),
    # 8.6, 8.9 and 12.x: 99 KiB of shared memory.
    ("sm_86", "half", None, None, ANY, ANY, Gemm(64, 128, 32, warps=4, stages=3, per_sm=2)),
    ("sm_86", "tf32", None, None, ANY, ANY, Gemm(64, 64, 32, warps=4, stages=2, per_sm=2)),
    # One numpy product a step: large tiles for large problems, several tiles for small ones. Descriptors
    # too, so that the tests meet them.
    ("interpreter", None, None, None, ANY, 15, Gemm(16, 64, 64, 1, 1, group_m=2, descriptor=True)),
    ("interpreter", None, None, None, ANY, 63, Gemm(32, 128, 128, 1, 1, group_m=2, descriptor=True)),
    ("interpreter", None, None, None, ANY, ANY, Gemm(128, 512, 512, 1, 1)),
    # fp32: no matrix instructions, products of registers. fp64: what Triton makes of it.
    (None, "fp32", None, None, ANY, ANY, Gemm(64, 64, 16, warps=4, stages=2, per_sm=2)),
    (None, "fp64", None, None, ANY, ANY, Gemm(32, 32, 16, warps=4, stages=2, per_sm=2)),
)

# As above; block_p shrinks to the rank where that is what it covers.
OUTER: tuple[tuple, ...] = (
    ("interpreter", None, None, None, ANY, 63, Outer(64, 256, 32, warps=1, stages=1)),
    ("interpreter", None, None, None, ANY, ANY, Outer(512, 512, 512, warps=1, stages=1)),
    ("sm_80", "half", None, None, ANY, ANY, Outer(64, 128, 64, warps=4, stages=4)),
    ("sm_86", "half", None, None, ANY, ANY, Outer(64, 128, 64, warps=4, stages=4)),
    # Slots are read before rows, so two stages of rows take five.
    (None, "half", None, None, ANY, ANY, Outer(128, 128, 64, warps=8, stages=5)),
    (None, "tf32", None, None, ANY, ANY, Outer(64, 64, 32, warps=4, stages=3)),
    (None, "fp32", None, None, ANY, ANY, Outer(64, 64, 16, warps=4, stages=2)),
    (None, "fp64", None, None, ANY, ANY, Outer(32, 32, 16, warps=4, stages=2)),
)

TABLES: dict[str, tuple[tuple, ...]] = {"gemm": GEMM, "outer": OUTER}


def candidates(key: Key) -> Iterable[Gemm | Outer]:
    """What the search tries. Those that need more than the machine has fail to launch and drop out."""
    wide = key.dtype == "half"
    steps = (32, 64) if wide else (16, 32)
    if key.kernel == "outer":
        shapes = itertools.product((64, 128), (64, 128), steps, (4, 8), (3, 5))
        return (Outer(*shape) for shape in shapes)
    copies = (False, True) if key.arch in ("sm_90", "sm_100") else (False,)
    return (
        Gemm(m, n, k, warps, stages, group, 2 if (m + n) * k * stages <= 57_344 else 1, copy)
        for m, n, k, warps, stages, group, copy in itertools.product(
            (64, 128), (64, 128, 256) if wide else (64, 128), steps, (4, 8), (3, 4), (4, 16), copies
        )
    )


@functools.cache
def machine(device: torch.device) -> Machine:
    """The machine behind `device`; a CPU stands for Triton's interpreter, with two programs."""
    if device.type != "cuda":
        return Machine("interpreter", 2, "interpreter")
    major, minor = torch.cuda.get_device_capability(device)
    small = (major, minor) in ((8, 6), (8, 7), (8, 9)) or major >= 12
    arch = "sm_86" if small else {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")
    properties = torch.cuda.get_device_properties(device)
    return Machine(arch, properties.multi_processor_count, properties.name)


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied, as `tl.dot` calls it; other dtypes have one way only."""
    if dtype != torch.float32:
        return "ieee"
    switches = torch.backends.cuda.matmul
    # allow_tf32 raises once fp32_precision, which torch has since 2.9, was set; that one follows both.
    chosen = getattr(switches, "fp32_precision", None) or ("tf32" if switches.allow_tf32 else "ieee")
    return "tf32" if chosen == "tf32" else "ieee"


def dtype_class(dtype: torch.dtype) -> str:
    """The table's word for `dtype`."""
    if dtype == torch.float32:
        return "tf32" if precision(dtype) == "tf32" else "fp32"
    return "fp64" if dtype == torch.float64 else "half"


def cdiv(size: int, step: int) -> int:
    """As `triton.cdiv`, which takes ten times as long on the host."""
    return -(-size // step)


def bucket(size: int, low: int, high: int) -> int:
    """The next power of two, held inside [low, high]."""
    return min(max(1 << (size - 1).bit_length() if size > 1 else 1, low), high)


def shipped(key: Key, rank: int, rows: int) -> tuple[Gemm | Outer, bool]:
    """The table's configuration, and whether its row names this very shape."""
    for arch, dtype, k, n, max_rank, max_rows, config in TABLES[key.kernel]:
        fits = arch in (None, key.arch) and dtype in (None, key.dtype)
        if fits and k in (None, key.k) and n in (None, key.n) and rank <= max_rank and rows <= max_rows:
            return config, k is not None
    raise AssertionError("the last rows fit every dtype")


def choose(
    kernel: str, device: torch.device, dtype: torch.dtype, k: int, n: int, rank: int, rows: int,
    run: Callable, *, search: bool = True,
):  # fmt: skip
    """The configuration for this shape at `rows` rows an expert; `run(config)` does the work, for timing.

    search: whether one may be searched for that the tables do not name. What it finds sums in another order
    than what ran before it.
    """
    where = machine(device)
    key = Key(kernel, where.arch, dtype_class(dtype), k, n, bucket(rank, 16, 128), bucket(rows, 16, 4096))
    config, exact = shipped(key, rank, rows)
    if exact or not search or not switches.SWITCHES.autotune or device.type != "cuda":
        return config
    return Found.of(where).get(key, run) or config


class Found:
    """Configurations that the search found on one kind of device, in memory and on disk.

    The file is a convenience: what cannot be read or written is warned of, once, and costs a search.
    """

    def __init__(self, path: Path, kinds: dict[str, type]) -> None:
        self.path, self.kinds, self.warned = path, kinds, set()
        self.rows = {}
        try:
            rows = json.loads(path.read_text())
            if not isinstance(rows, dict):
                raise ValueError(f"an object of rows must be in it, got {type(rows).__name__}")
            self.rows = rows
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self.warn("file", f"ignoring the configurations in {path}: {error}")

    def warn(self, about: str, message: str) -> None:
        """Once `about` the same."""
        if about not in self.warned:
            self.warned.add(about)
            warnings.warn(message, stacklevel=3)

    @staticmethod
    @functools.cache
    def of(machine: Machine) -> Found:
        """Those of `machine`. What was best for one Triton need not be for the next: one file each."""
        name = f"{machine.name}-triton-{triton.__version__}.json".replace(" ", "_")
        return Found(switches.cache_dir() / name, {"gemm": Gemm, "outer": Outer})

    def get(self, key: Key, run: Callable) -> Gemm | Outer | None:
        """What was found for `key`, searching if it is new; None if nothing ran or nothing may be timed."""
        name = "/".join(map(str, key))
        found = self.read(name, self.kinds[key.kernel])
        if found is not None:
            return found
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        best = fastest(candidates(key), run)
        if best is not None:
            self.rows[name] = asdict(best)
            self.save()
        return best

    def read(self, name: str, kind: type) -> Gemm | Outer | None:
        """The row `name`; None if there is none, or one of other fields than today's."""
        row = self.rows.get(name)
        if row is None:
            return None
        try:
            found = kind(**row)
        except TypeError:
            found = None
        if found is None or not all(isinstance(value, int) for value in row.values()):
            self.warn("row", f"ignoring rows in {self.path} that are no {kind.__name__} of this version")
            return None
        return found

    def save(self) -> None:
        """Replaces the file in one step, so that no process reads half of it."""
        part = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".json", delete=False) as file:
                part = Path(file.name)
                json.dump(self.rows, file, indent=1)
            os.replace(part, self.path)
        except OSError as error:
            self.warn("save", f"keeping configurations for this process only, not in {self.path}: {error}")
            if part is not None:
                part.unlink(missing_ok=True)


def fastest(options: Iterable[Gemm | Outer], run: Callable, bench: Callable | None = None):
    """The option whose `run` has the least median time; None if none runs."""
    bench = bench or functools.partial(triton.testing.do_bench, warmup=10, rep=40, return_mode="median")
    times = {}
    for option in options:
        try:
            times[option] = bench(functools.partial(run, option))
        except TritonError:  # more registers or shared memory than there are, or a shape ptxas refuses
            continue
    return min(times, key=times.get, default=None)


def rank_product(machine: Machine, dtype: torch.dtype, rank: int, block_m: int) -> Gemm:
    """x · Aᵀ: bound by reading x once, so all of the rank in one tile as far as it goes."""
    if machine.arch == "interpreter":
        return Gemm(block_m, bucket(rank, 16, 128), 64 if block_m < 64 else 512, warps=1, stages=1)
    half = dtype.itemsize == 2
    block_n = bucket(rank, 16, 64 if half else 32)
    return Gemm(block_m, block_n, 64 if half else 16, warps=4, stages=3 if half else 2, per_sm=2)


def rank_rows(machine: Machine, dtype: torch.dtype, rows: int) -> int:
    """Rows of a tile where only rank-sized products are wanted, at `rows` rows an expert."""
    if machine.arch == "interpreter":
        return 16 if rows < 16 else 32 if rows < 64 else 128
    return 128 if rows > 96 and dtype.itemsize == 2 else 64


def elementwise(machine: Machine, columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows × columns of a tile of an elementwise kernel."""
    if machine.arch == "interpreter":
        return 256, bucket(columns, 16, 128)
    return 2 if dtype == torch.float64 else 4, bucket(columns, 16, 256)


def unpacking(machine: Machine, columns: int) -> tuple[int, int]:
    """Rows × columns of a tile of packed numbers."""
    if machine.arch == "interpreter":
        return 128, bucket(columns, 16, 512)
    return 16, bucket(columns, 16, 512)


def line(machine: Machine, size: int) -> int:
    """Elements a program of a kernel without rows."""
    return bucket(size, 16, 1 << 16 if machine.arch == "interpreter" else 1024)


def sort_block(machine: Machine) -> int:
    """Slots per program of the counting sort, whose rank is a square comparison in registers."""
    return 512 if machine.arch == "interpreter" else 128
