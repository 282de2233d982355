"""Every shipped Triton configuration, compiled ahead of time: no spills, shared memory within the limit, the
architecture's own matrix instructions, loads that run ahead. Needs no GPU.
"""

import functools
import importlib.util
from dataclasses import asdict

import pytest
import torch

from torch_moelora.switches import SWITCHES

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if SWITCHES.triton_interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton_aot

from torch_moelora import formats
from torch_moelora.calls import ScatterLora, ScatterLoraDx
from torch_moelora.triton import configs, dx, forward, register

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = {"half": BF16, "tf32": FP32, "fp32": FP32, "fp64": FP64}
MATRIX_INSTRUCTIONS = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
EXPERTS, TOP_K = 16, 8


def marks(arch: str) -> tuple:
    """For all but one of the architectures, half precision at one rank is enough for a short run."""
    return () if arch == "sm_90" else (pytest.mark.long,)


def row_marks(arch: str, row: tuple) -> tuple:
    """Of sm_86, which takes most of its rows from sm_80, a short run compiles those that are its own."""
    return () if row[1] == "half" and (arch != "sm_86" or row[0] == arch) else marks(arch)


def rows(table: tuple) -> list:
    """(architecture, row): every row for every architecture that takes it, that is all but those that have
    rows of their own for its dtype.
    """
    own = {row[:2] for row in table}
    return [
        pytest.param(
            arch,
            row,
            id=f"{arch}: " + " ".join(map(str, row[1:4])) + f" {number}",
            marks=row_marks(arch, row),
        )
        for arch in triton_aot.TARGETS
        for number, row in enumerate(table)
        if row[0] == arch or (row[0] is None and (arch, row[1]) not in own)
    ]


def launch(
    k: int, n: int, rank: int, tokens: int, dtype: torch.dtype, *, transposed: bool = False, bare: bool = True
) -> None:
    """Forward and dX with everything that can be added to them; `bare`: without it, too."""
    ops = register.IMPLEMENTATIONS
    meta = triton_aot.meta
    slots, total = tokens * TOP_K, tokens
    routing = meta(slots, dtype=torch.int64), meta(EXPERTS, dtype=torch.int32), TOP_K
    weight = (
        meta(EXPERTS, k, n, dtype=dtype).transpose(1, 2) if transposed else meta(EXPERTS, n, k, dtype=dtype)
    )
    lora_dtype = FP32 if dtype == BF16 else dtype
    lora = meta(EXPERTS, rank, k, dtype=lora_dtype), meta(EXPERTS, n, rank, dtype=lora_dtype), 0.5
    bias, gates = meta(EXPERTS, n, dtype=dtype), meta(total, TOP_K, dtype=dtype)
    if bare:
        x, dy = meta(total, k, dtype=dtype), meta(slots, n, dtype=dtype)
        ops["scatter_lora"](x, weight, *routing, *lora, None, None, False, True)
        ops["scatter_lora_dx"](dy, weight, *routing, *lora, None, None, None, False, True)
    x, dy = meta(slots, k, dtype=dtype), meta(total, n, dtype=dtype)
    ops["scatter_lora"](x, weight, *routing, *lora, bias, gates, True, False)
    ops["scatter_lora_dx"](dy, weight, *routing, *lora, bias, gates, x, True, False)


def launch_sums(
    k: int, n: int, rank: int, tokens: int, dtype: torch.dtype, *, gated: bool = True, whole: bool = True
) -> None:
    """dA and dB; `whole`: dW and dbias, too."""
    ops, meta = register.IMPLEMENTATIONS, triton_aot.meta
    slots = tokens * TOP_K
    routing = meta(slots, dtype=torch.int64), meta(EXPERTS, dtype=torch.int32), TOP_K
    lora = meta(EXPERTS, rank, k, dtype=dtype), meta(EXPERTS, n, rank, dtype=dtype), 0.5
    gates = meta(tokens, TOP_K, dtype=dtype) if gated else None
    x, dy = meta(slots if gated else tokens, k, dtype=dtype), meta(tokens if gated else slots, n, dtype=dtype)
    ops["scatter_lora_dab"](dy, x, *routing, *lora, gates, gated, not gated)
    if whole:
        ops["scatter_lora_dw"](dy, x, *routing, gates, gated, not gated)
        ops["scatter_lora_dbias"](dy, *routing, gates, not gated)


def check(arch: str, kernel: triton_aot.Compiled, kind: str, per_sm: int = 1) -> None:
    """What holds for every kernel; for products of matrices the architecture's own instructions, and in half
    precision loads that run ahead. fp32 has no such instructions, and for fp64 any will do.
    """
    assert kernel.usage["STACK"] == 0 and kernel.usage["LOCAL"] == 0, f"{kernel} spills: {kernel.usage}"
    _, limit = triton_aot.TARGETS[arch]
    threads = per_sm * kernel.warps * 32
    assert threads * kernel.usage["REG"] <= 65536, f"{kernel}: {per_sm} do not fit: {kernel.usage}"
    assert per_sm * kernel.shared <= limit, f"{kernel}: {per_sm} x {kernel.shared} bytes of shared memory"
    if kernel.name not in ("grouped_gemm", "row_products"):
        return
    wanted = MATRIX_INSTRUCTIONS.get(arch, "mma.sync")
    assert kind in ("fp32", "fp64") or wanted in kernel.ptx, f"{kernel} has no {wanted}"
    assert kind != "half" or "cp.async.cg.shared.global" in kernel.ptx, (
        f"{kernel} loads nothing ahead, or not 16 bytes at a time"
    )


def using(config: configs.Gemm | configs.Outer, kernels: dict) -> list[triton_aot.Compiled]:
    """Those of `kernels` that are compiled with all of `config`."""
    names = asdict(config)
    launch_options = {"num_warps": names.pop("warps"), "num_stages": names.pop("stages")}
    blocks = {k.upper(): v for k, v in names.items() if k.startswith("block_") or k == "group_m"}
    parts = [f"{k}={v}, " for k, v in {**blocks, **launch_options}.items()]
    return [kernel for kernel in kernels.values() if all(part in f"{kernel.shape}, " for part in parts)]


@pytest.mark.parametrize(("arch", "row"), rows(configs.GEMM))
def test_grouped_gemm(arch, row, monkeypatch):
    """Forward and dX. The tests of this file take the ranks between them that lead to every width of the
    tiles that follow the rank: in half precision 16, 32 and 64, else 16 and 32.
    """
    _, kind, k, n, _, rows_up_to, config = row
    tokens = min(rows_up_to, 1024) * EXPERTS // TOP_K
    k, n = k or 1024, n or 512
    with triton_aot.tf32(kind == "tf32"), triton_aot.compiling_for(arch, monkeypatch) as kernels:
        launch(k, n, 32, tokens, DTYPES[kind], bare=kind == "half")
    mine = using(config, kernels)
    assert len(mine) >= (4 if kind == "half" else 2), (
        f"the shape does not lead to this row: {[str(c) for c in kernels.values()]}"
    )
    for kernel in kernels.values():
        check(arch, kernel, kind, config.per_sm if kernel in mine else 1)
    if config.descriptor:
        assert all("cp.async.bulk.tensor" in kernel.ptx for kernel in mine), "weights are not copied by TMA"


@pytest.mark.parametrize(("arch", "row"), rows(configs.OUTER))
def test_sums_over_rows(arch, row, monkeypatch):
    """dA, dB, dW and dbias, with gates and, for half precision, without."""
    _, kind, k, n, _, rows_up_to, config = row
    tokens = min(rows_up_to, 1024) * EXPERTS // TOP_K
    with triton_aot.tf32(kind == "tf32"), triton_aot.compiling_for(arch, monkeypatch) as kernels:
        for gated in (True, False) if kind == "half" else (True,):
            launch_sums(k or 512, n or 768, 32 if kind == "half" else 16, tokens, DTYPES[kind], gated=gated)
    assert using(config, kernels), f"no dW of this row: {[str(c) for c in kernels.values()]}"
    for kernel in kernels.values():
        check(arch, kernel, kind)


@pytest.mark.parametrize(
    ("arch", "rank"),
    [
        *(pytest.param(arch, 8, marks=marks(arch)) for arch in triton_aot.TARGETS),
        *(pytest.param(arch, 64, marks=pytest.mark.long) for arch in triton_aot.TARGETS),
        pytest.param("sm_90", 200, marks=pytest.mark.long),
    ],
)
def test_ranks(arch, rank, monkeypatch):
    """Ranks beside 32, with weights stored [E, K, N] and, at rank 8, a K that is no multiple of the step."""
    with triton_aot.compiling_for(arch, monkeypatch) as kernels:
        for rows_up_to in {row[5] for row in configs.GEMM if row[:3] == (arch, "half", None)}:
            shape = 2880 if rank == 8 else 1024, 512, rank, min(rows_up_to, 1024) * EXPERTS // TOP_K, FP16
            launch(*shape, transposed=True, bare=False)
            launch_sums(*shape, whole=False)
    for kernel in kernels.values():
        check(arch, kernel, "half")


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=marks(arch)) for arch in triton_aot.TARGETS])
def test_the_rest(arch, monkeypatch):
    """Routing and GLU."""
    ops, meta = register.IMPLEMENTATIONS, triton_aot.meta
    with triton_aot.compiling_for(arch, monkeypatch) as kernels:
        ops["flatten_sort_count"](meta(4096, TOP_K, dtype=torch.int64), 128)
        for dtype in (BF16, FP64):
            for options in (("silu", 1.702, 7.0, 1.0, True), ("gelu", 1.0, None, 0.0, False), ("gelu_tanh",)):
                ops["glu"](meta(4096, 1536, dtype=dtype), *options)
                ops["glu_backward"](meta(4096, 768, dtype=dtype), meta(4096, 1536, dtype=dtype), *options)
    for kernel in kernels.values():
        check(arch, kernel, "half")


@pytest.mark.parametrize("gated", [False, True])
def test_the_joint_backward_has_no_kernels_of_its_own(gated, monkeypatch):
    """It is made of those of dX and dA/dB, which are compiled row by row."""
    k, n, rank, tokens = 1024, 512, 16, 2048
    meta, ops = functools.partial(triton_aot.meta, dtype=BF16), register.IMPLEMENTATIONS
    rows, per_token = (tokens * TOP_K, tokens) if gated else (tokens, tokens * TOP_K)
    x, dy, weight = meta(rows, k), meta(per_token, n), meta(EXPERTS, n, k)
    routing = meta(tokens * TOP_K, dtype=torch.int64), meta(EXPERTS, dtype=torch.int32), TOP_K
    lora = meta(EXPERTS, rank, k), meta(EXPERTS, n, rank), 0.5
    gates = meta(tokens, TOP_K) if gated else None
    with triton_aot.compiling_for("sm_90", monkeypatch) as kernels:
        ops["scatter_lora_dx"](dy, weight, *routing, *lora, None, gates, x, gated, not gated)
        ops["scatter_lora_dab"](dy, x, *routing, *lora, gates, gated, not gated)
        before = len(kernels)
        ops["scatter_lora_backward"](dy, x, weight, *routing, *lora, None, gates, gated, not gated)
    assert before > 0 and len(kernels) == before


def test_sizes_of_a_batch_are_no_constants(monkeypatch):
    """T, S and E may change from step to step without a compilation."""
    with triton_aot.compiling_for("sm_90", monkeypatch) as kernels:
        launch(1024, 512, 16, 2048, BF16)
        before = len(kernels)
        for tokens in (2047, 2050, 4001):
            launch(1024, 512, 16, tokens, BF16)
        monkeypatch.setitem(globals(), "EXPERTS", 17)
        launch(1024, 512, 16, 2048 + 7, BF16)
    assert len(kernels) == before


def packed_weight(name: str, experts: int, n: int, k: int) -> formats.PackedWeight:
    row, meta = formats.FORMATS[name], triton_aot.meta
    codes = meta(experts, n, k // row.per_byte, dtype=row.storage)
    block = row.groups.least if row.groups.kind == "grid" else 1
    scale = meta(experts, n // block, k // row.groups.least, dtype=row.scale_dtypes[0])
    scale2 = meta(experts, 2, dtype=FP32) if row.scale2 else None
    return formats.PackedWeight(codes, scale, scale2, None, name)


@pytest.mark.parametrize("name", [name for name in formats.FORMATS if name != "dense"])
@pytest.mark.parametrize("arch", [pytest.param(a, marks=marks(a)) for a in triton_aot.TARGETS])
def test_packed_weights(arch, name, monkeypatch):
    """Forward and dX compile, with the architecture's matrix instructions, within its shared memory."""
    meta, k, n, tokens = triton_aot.meta, 2048, 1536, 2048
    routing = {
        "sorted_scattered_idxs": meta(tokens * TOP_K, dtype=torch.int64),
        "expert_offsets": meta(EXPERTS, dtype=torch.int32),
        "top_k": TOP_K,
    }
    weight = packed_weight(name, EXPERTS, n, k).operands()
    x, dy = meta(tokens, k, dtype=BF16), meta(tokens * TOP_K, n, dtype=BF16)
    with triton_aot.compiling_for(arch, monkeypatch) as found:
        forward.scatter_lora(ScatterLora(x, **routing, **weight))
        dx.scatter_lora_dx(ScatterLoraDx(dy, **routing, **weight))
    unpacking = [kernel for kernel in found.values() if kernel.name == "unpack_experts"]
    products = [kernel for kernel in found.values() if kernel.name == "grouped_gemm"]
    assert len(unpacking) == 1 and f"KIND={name}" in unpacking[0].shape
    assert unpacking[0].usage["STACK"] == 0 and unpacking[0].usage["LOCAL"] == 0, unpacking[0].usage
    assert len(products) == 2
    for kernel in products:
        assert MATRIX_INSTRUCTIONS.get(arch, "mma.sync") in kernel.ptx, f"{kernel}"
        assert kernel.shared <= triton_aot.TARGETS[arch][1]
