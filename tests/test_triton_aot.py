"""Every shipped Triton configuration, compiled ahead of time: no spills, shared memory within the limit, the
architecture's own matrix instructions, loads that run ahead. Needs no GPU.
"""

import importlib.util

import pytest
import torch

from torch_moelora.switches import SWITCHES

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if SWITCHES.triton_interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton_aot

from torch_moelora.triton import configs, register

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = {"half": BF16, "tf32": FP32, "fp32": FP32, "fp64": FP64}
MATRIX_INSTRUCTIONS = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
EXPERTS, TOP_K = 16, 8


def shared_row(arch: str, kind: str) -> bool:
    """Whether to compile a row that names no architecture for `arch`: fp64, which is for checking, for one
    only; and what sm_86 gets is sm_80's code.
    """
    return arch == "sm_90" if kind == "fp64" else arch != "sm_86"


def rows() -> list:
    """(architecture, row of the table)."""
    return [
        pytest.param(arch, row, id=f"{arch}: " + " ".join(map(str, row[1:4])) + f" {number}")
        for arch in triton_aot.TARGETS
        for number, row in enumerate(configs.GEMM)
        if row[0] == arch or (row[0] is None and shared_row(arch, row[1]))
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


def check(arch: str, kernel: triton_aot.Compiled, per_sm: int = 1) -> None:
    """What holds for every kernel."""
    assert kernel.usage["STACK"] == 0 and kernel.usage["LOCAL"] == 0, f"{kernel} spills: {kernel.usage}"
    _, limit = triton_aot.TARGETS[arch]
    threads = per_sm * kernel.warps * 32
    assert threads * kernel.usage["REG"] <= 65536, f"{kernel}: {per_sm} do not fit: {kernel.usage}"
    assert per_sm * kernel.shared <= limit, f"{kernel}: {per_sm} x {kernel.shared} bytes of shared memory"


def check_product(arch: str, kernel: triton_aot.Compiled) -> None:
    """What holds for products of half-precision matrices."""
    wanted = MATRIX_INSTRUCTIONS.get(arch, "mma.sync")
    assert wanted in kernel.ptx, f"{kernel} has no {wanted}"
    assert "cp.async.cg.shared.global" in kernel.ptx, (
        f"{kernel} loads nothing ahead, or not 16 bytes at a time"
    )


@pytest.mark.parametrize(("arch", "row"), rows())
def test_grouped_gemm(arch, row, monkeypatch):
    _, kind, k, n, _, rows_up_to, config = row
    tokens = min(rows_up_to, 1024) * EXPERTS // TOP_K
    k, n = k or 1024, n or 512
    with triton_aot.tf32(kind == "tf32"), triton_aot.compiling_for(arch, monkeypatch) as kernels:
        launch(k, n, 16, tokens, DTYPES[kind], bare=kind == "half")
    mine = [
        c for c in kernels.values() if c.name == "grouped_gemm" and f"BLOCK_N={config.block_n}," in c.shape
    ]
    assert len(mine) >= (4 if kind == "half" else 2), (
        f"the shape does not lead to this row: {[str(c) for c in kernels.values()]}"
    )
    for kernel in kernels.values():
        check(arch, kernel, config.per_sm if kernel in mine else 1)
        if kind == "half" and kernel.name == "grouped_gemm":
            check_product(arch, kernel)
    if config.descriptor:
        assert all("cp.async.bulk.tensor" in kernel.ptx for kernel in mine), "weights are not copied by TMA"


@pytest.mark.parametrize(
    ("arch", "rank"), [("sm_80", 8), ("sm_90", 8), ("sm_90", 64), ("sm_90", 200), ("sm_100", 8)]
)
def test_ranks(arch, rank, monkeypatch):
    """Ranks beside 16, with weights stored [E, K, N] and a K that is no multiple of the step."""
    with triton_aot.compiling_for(arch, monkeypatch) as kernels:
        launch(2880 if rank == 8 else 1024, 512, rank, 2048, FP16, transposed=True, bare=False)
    for kernel in kernels.values():
        check(arch, kernel)
        if kernel.name == "grouped_gemm":
            check_product(arch, kernel)


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        (arch, kind)
        for arch in triton_aot.TARGETS
        for kind in DTYPES
        if kind == "half" or shared_row(arch, kind)
    ],
)
def test_gradients_over_rows(arch, kind, monkeypatch):
    """dA, dB, dW and dbias, with gates and, for half precision, without."""
    ops, meta, dtype = register.IMPLEMENTATIONS, triton_aot.meta, DTYPES[kind]
    tokens, k, n, rank = 2048, 512, 768, 16
    slots = tokens * TOP_K
    routing = meta(slots, dtype=torch.int64), meta(EXPERTS, dtype=torch.int32), TOP_K
    lora = meta(EXPERTS, rank, k, dtype=dtype), meta(EXPERTS, n, rank, dtype=dtype), 0.5
    with triton_aot.tf32(kind == "tf32"), triton_aot.compiling_for(arch, monkeypatch) as kernels:
        for gates in (meta(tokens, TOP_K, dtype=dtype), *([None] if kind == "half" else [])):
            x = meta(tokens if gates is None else slots, k, dtype=dtype)
            dy = meta(slots if gates is None else tokens, n, dtype=dtype)
            grouped = gates is not None, gates is None
            ops["scatter_lora_dab"](dy, x, *routing, *lora, gates, *grouped)
            ops["scatter_lora_dw"](dy, x, *routing, gates, *grouped)
            ops["scatter_lora_dbias"](dy, *routing, gates, grouped[1])
    for kernel in kernels.values():
        check(arch, kernel)
        if kind == "half" and kernel.name in ("grouped_gemm", "row_products"):
            check_product(arch, kernel)


@pytest.mark.parametrize("arch", triton_aot.TARGETS)
def test_the_rest(arch, monkeypatch):
    """Routing and GLU."""
    ops, meta = register.IMPLEMENTATIONS, triton_aot.meta
    with triton_aot.compiling_for(arch, monkeypatch) as kernels:
        ops["flatten_sort_count"](meta(4096, TOP_K, dtype=torch.int64), 128)
        for dtype in (BF16, FP64) if arch == "sm_90" else (BF16,):
            for options in (("silu", 1.702, 7.0, 1.0, True), ("gelu", 1.0, None, 0.0, False), ("gelu_tanh",)):
                ops["glu"](meta(4096, 1536, dtype=dtype), *options)
                ops["glu_backward"](meta(4096, 768, dtype=dtype), meta(4096, 1536, dtype=dtype), *options)
    for kernel in kernels.values():
        check(arch, kernel)


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
