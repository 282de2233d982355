"""The AMX kernels: exact results at every shape, nothing read beyond the data, economy, tile state.

They need a process in which bf16 runs on AMX: a CPU with it, or the emulator (the run `amx` has it).
"""

import ctypes
import itertools
import math
import mmap
import os
import threading

import numpy as np
import problems
import pytest
import torch
from amx_emulator import counts
from cases import BF16, Case

import torch_moelora
from torch_moelora import _C, reference

pytestmark = [
    pytest.mark.operators,
    pytest.mark.skipif(
        torch_moelora.info()["cpu"]["chosen"]["bf16"] != "amx_bf16",
        reason="bf16 does not run on AMX here; where it can be emulated, the run amx has these tests",
    ),
]
counted = pytest.mark.skipif(not counts.available(), reason="counts come from the emulator")

LANES = 16
ROWS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100, 129, 256)
# Steps of 32 with and without a rest, odd rests, a rest of 31 that fills its pairs.
DEPTHS = (
    (1,),
    (2,),
    (31,),
    (32,),
    (33,),
    (63,),
    (64,),
    (95,),
    (96, 16),
    (64, 1),
    (33, 7),
    (16, 16),
    (31, 64),
    (50, 18),
)


def amx():
    return next(k for k in _C.kernel_sets() if k.isa == "amx_bf16")


def integers(rng, *shape) -> np.ndarray:
    """Small integers: their products and sums are exact in fp32."""
    return rng.integers(-3, 4, shape).astype(np.float32)


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def panel_of(values: np.ndarray, lanes: int) -> np.ndarray:
    """[depth, n] → [ceil(depth / 2), lanes, 2]; NaN in lanes that no tile should touch."""
    depth, n = values.shape
    panel = np.full((2 * math.ceil(depth / 2), lanes), np.nan, np.float32)
    panel[:, :n] = 0
    panel[:depth, :n] = values
    return bf16(np.ascontiguousarray(panel.reshape(-1, 2, lanes).transpose(0, 2, 1)))


def padded_rows(values: np.ndarray) -> np.ndarray:
    """The same rows, NaN between them."""
    wide = np.full((values.shape[0], values.shape[1] + 5), np.nan, np.float32)
    wide[:, : values.shape[1]] = values
    return bf16(wide)[:, : values.shape[1]]


@pytest.mark.parametrize("vecs", [1, 2, 3, 4])
def test_tile(vecs):
    """Every cut of rows and depth into tiles gives the exact product, and touches only its part of C."""
    rng = np.random.default_rng(vecs)
    kernels = amx()
    n = vecs * LANES
    for rows, depths, extra in itertools.product(ROWS, DEPTHS, (0, 16)):
        if rows > kernels.max_rows[vecs - 1]:
            continue
        left = [integers(rng, rows, d) for d in depths]
        right = [integers(rng, d, n) for d in depths]
        segments = [(padded_rows(a), panel_of(b, n + extra)) for a, b in zip(left, right, strict=True)]
        product = sum(a @ b for a, b in zip(left, right, strict=True))
        c = np.full((rows, n + 3), np.nan, np.float32)
        kernels.tile(segments, c[:, :n])
        assert np.array_equal(c[:, :n], product), (rows, depths)
        assert np.isnan(c[:, n:]).all(), (rows, depths)
        kernels.tile(segments, c[:, :n], "resume")
        assert np.array_equal(c[:, :n], 2 * product), (rows, depths)


def test_cuts_do_not_show():
    """An element has the same bits whatever tile it was in; depths are cut at multiples of 32."""
    rng = np.random.default_rng(0)
    kernels = amx()
    rows, depth = 80, 200
    left = bf16(rng.standard_normal((rows, depth)).astype(np.float32))
    panel = panel_of(rng.standard_normal((depth, 64)).astype(np.float32), 64)
    whole = np.zeros((rows, 64), np.float32)
    kernels.tile([(left, panel)], whole)
    for first, last in ((0, 1), (3, 20), (16, 80), (79, 80)):
        part = np.zeros((last - first, 64), np.float32)
        kernels.tile([(left[first:last], panel)], part)
        assert np.array_equal(part, whole[first:last])
    for vecs in (1, 2, 3):
        narrow = np.zeros((rows, vecs * LANES), np.float32)
        kernels.tile([(left, panel)], narrow)
        assert np.array_equal(narrow, whole[:, : vecs * LANES])
    steps = np.zeros_like(whole)
    kernels.tile([(left[:, :96], panel[:48])], steps)
    kernels.tile([(left[:, 96:], panel[48:])], steps, "resume")
    assert np.array_equal(steps, whole)


def up_to_a_forbidden_page(values: np.ndarray) -> np.ndarray:
    """A copy that ends where memory ends: reading beyond it kills the process."""
    page = mmap.PAGESIZE
    space = math.ceil(values.nbytes / page) * page
    memory = mmap.mmap(-1, space + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + space), page, 0) == 0
    copy = np.frombuffer(memory, values.dtype, values.size, space - values.nbytes).reshape(values.shape)
    copy[...] = values
    return copy


@pytest.mark.parametrize("depth", [1, 2, 7, 16, 31, 32, 33, 47, 64, 65])
@pytest.mark.parametrize(("rows", "vecs"), [(1, 1), (15, 4), (17, 1), (33, 3), (64, 4)])
def test_nothing_beyond_the_operands_is_read(rows, vecs, depth):
    rng = np.random.default_rng(0)
    a, b = integers(rng, rows, depth), integers(rng, depth, vecs * LANES)
    c = up_to_a_forbidden_page(np.full((rows, vecs * LANES), np.nan, np.float32))
    panel = panel_of(b, vecs * LANES)
    amx().tile([(up_to_a_forbidden_page(bf16(a)), up_to_a_forbidden_page(panel))], c)
    assert np.array_equal(c, a @ b)


# reason first: it is the test's name.
_EXACT = {
    "one of everything": Case(tokens=1, top_k=1, experts=1, k=1, n=1, rank=1),
    "odd depths, a few rows an expert": Case(k=33, n=47, rank=3),
    "31 is a whole number of pairs once padded": Case(tokens=40, experts=2, k=31, n=63, y_grouped=True),
    "97 rows: pairs of tiles and a single row": Case(
        tokens=97, top_k=1, experts=1, k=64, n=96, rank=16, gates="fp32"
    ),
    "stored transposed: rows of x are the tiles' rows": Case(
        tokens=70, top_k=3, experts=2, k=65, n=130, rank=33, x_grouped=True, weight_layout="transposed"
    ),
    "more rows than one tile takes, fp32 LoRA as PEFT stores it": Case(
        tokens=300,
        top_k=1,
        experts=1,
        k=96,
        n=64,
        rank=31,
        weight_layout="sliced",
        lora="fp32",
        lora_layout="peft",
    ),
    "nothing in place, sums over the choices": Case(
        tokens=20, experts=3, k=100, n=50, rank=17, weight_layout="strided", gates="same", bias="same"
    ),
}
EXACT = tuple(case.with_(dtype=BF16, reason=reason) for reason, case in _EXACT.items())


def exact_problem(case: Case) -> problems.Problem:
    """Integers so small that nothing is rounded before the result is."""
    gen = torch.Generator().manual_seed(1)
    p = problems.build(case)
    for name in ("x", "weight", "lora_a", "lora_b", "bias", "dy"):
        tensor = getattr(p, name)
        if tensor is not None:
            tensor.copy_(torch.randint(-1, 2, tensor.shape, generator=gen))
    if p.gates is not None:
        p.gates.copy_(torch.randint(-1, 2, p.gates.shape, generator=gen).double().exp2())
    return p


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.reason)
@pytest.mark.parametrize("name", ["scatter_lora", "scatter_lora_dx", "scatter_lora_dab", "scatter_lora_dw"])
def test_operators_are_exact(name, case):
    """To the bit: the reference in fp64, rounded once."""
    p = exact_problem(case)
    args = getattr(p, {"scatter_lora": "forward"}.get(name, name.removeprefix("scatter_lora_")) + "_args")()
    outs, refs = problems.call(name, *args), reference.REFERENCE[name](*args)
    if isinstance(outs, torch.Tensor):
        outs, refs = (outs,), (refs,)
    for out, ref in zip(outs, refs, strict=True):
        assert torch.equal(out, ref.to(out.dtype))


def balanced(rows: int, k: int, n: int, rank: int, experts: int = 2) -> problems.Problem:
    """Exactly `rows` rows for every expert."""
    case = Case(tokens=rows * experts, top_k=1, experts=experts, k=k, n=n, rank=rank, dtype=BF16)
    p = problems.build(case)
    p.slots, p.offsets = torch_moelora.flatten_sort_count(
        torch.arange(experts).repeat(rows)[:, None], experts
    )
    return p


def least_products(rows: int, outputs: int, *depths: int) -> int:
    """TDPBF16PS of [rows, Σ depths] · [Σ depths, outputs]: one adds at most 32 steps of one depth to at most
    16 × 16 elements.
    """
    return math.ceil(rows / 16) * math.ceil(outputs / 16) * sum(math.ceil(d / 32) for d in depths)


@counted
@pytest.mark.parametrize("name", ["scatter_lora", "scatter_lora_dx"])
@pytest.mark.parametrize(
    ("rows", "most_products", "most_loads"),
    [(64, 1.10, 1.10), (16, 1.15, 1.5)],
    ids=["64 rows an expert", "16 rows an expert"],
)
def test_economy(name, rows, most_products, most_loads):
    """The rank-sized product x·Aᵀ (dy·B) and [x | u]·[W | B]ᵀ ([dy | v]·[W ; A]), for each expert."""
    size, rank, experts = 512, 16, 2
    p = balanced(rows, size, size, rank, experts)
    least = experts * (least_products(rows, rank, size) + least_products(rows, size, size, rank))
    args = p.forward_args() if name == "scatter_lora" else p.dx_args()
    counts.reset()
    getattr(torch.ops.moelora, name)(*args)
    seen = counts.read()
    products, loads = seen.products / least, seen.loads / seen.products
    print(f"{name}, {rows} rows: {products:.3f} of the least TDPBF16PS, {loads:.3f} loads each")
    assert 1 <= products <= most_products
    assert loads <= most_loads


def run_all(p: problems.Problem) -> list[torch.Tensor]:
    ops = torch.ops.moelora
    dx, dab = ops.scatter_lora_dx(*p.dx_args()), ops.scatter_lora_dab(*p.dab_args())
    return [ops.scatter_lora(*p.forward_args()), *dx, *dab, ops.scatter_lora_dw(*p.dw_args())]


@counted
def test_tile_state_is_given_back():
    counts.reset()
    run_all(balanced(20, 70, 50, 5))
    seen = counts.read()
    assert seen.configs > 0 and seen.releases > 0
    assert seen.live == 0, "a thread of the pool still holds a tile configuration"


def test_threads_that_come_and_go():
    """Each has tiles and a configuration of its own."""
    p = balanced(20, 70, 50, 5)
    expected = run_all(p)
    wrong = []

    def work():
        for out, ref in zip(run_all(p), expected, strict=True):
            if not torch.equal(out, ref):
                wrong.append(threading.current_thread().name)

    for _ in range(5):
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    if counts.available():
        assert counts.read().live == 0


@pytest.mark.parametrize("used_before", [True, False])
def test_fork(used_before):
    """A child has the permission, and no belief in tiles that its parent configured."""
    p = balanced(20, 70, 50, 5)
    if used_before:
        expected = run_all(p)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # A forked child has none of OpenMP's threads.
            torch.set_num_threads(1)
            outs = run_all(p)
            status = 0
            if used_before:
                status = int(not all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True)))
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
