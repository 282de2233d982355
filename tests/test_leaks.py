"""What is called again and again keeps nothing: many calls later the process has the memory that it had."""

import ctypes
import gc
from collections.abc import Callable

import moelora
import problems
import psutil
import pytest
import torch
from cases import BF16, FP32, Case
from model_tiny import adapt, tokens
from model_tiny import build as tiny

pytestmark = pytest.mark.long

TIMES, LEAST = 300, 32 << 10  # calls, and bytes a call: what would be seen
SIZES = Case(tokens=256, top_k=2, experts=4, k=256, n=320, rank=16, bias="same")


def resident() -> int:
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    return psutil.Process().memory_info().rss


def keeps_nothing(call: Callable[[], object]) -> None:
    for _ in range(TIMES // 5):
        call()
    before = resident()
    for _ in range(TIMES):
        call()
    grown = resident() - before
    assert grown < TIMES * LEAST, f"{grown / TIMES:.0f} bytes a call"


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["scatter_lora", "dx", "dab", "backward", "dw", "dbias"])
@pytest.mark.parametrize(("dtype", "gates"), [(BF16, "fp32"), (FP32, "none")], ids=["bf16", "fp32"])
def test_operators(name, dtype, gates):
    p = problems.build(SIZES.with_(dtype=dtype, gates=gates))
    if name == "scatter_lora":
        args = p.forward_args()
    else:
        args, name = getattr(p, f"{name}_args")(), f"scatter_lora_{name}"
    operator = getattr(torch.ops.moelora, name)
    keeps_nothing(lambda: operator(*args))


def test_glu():
    h, dy = torch.randn(512, 640, requires_grad=True), torch.randn(512, 320)
    keeps_nothing(lambda: torch.autograd.grad(torch.ops.moelora.glu(h), h, dy))


@pytest.mark.parametrize("wrong", ["shape", "slots"])
def test_calls_that_raise(wrong):
    """Before anything is computed, or once the indices have been read."""
    p = problems.build(SIZES)

    def call():
        args = [a.clone() if isinstance(a, torch.Tensor) else a for a in p.forward_args()]
        if wrong == "shape":
            args[0] = args[0][:, :-1].contiguous()
        else:
            args[2][0] = args[2][1]
        with pytest.raises(RuntimeError, match=r"^scatter_lora: "):
            torch.ops.moelora.scatter_lora(*args)

    keeps_nothing(call)


@pytest.mark.usefixtures("threads")
def test_training_steps():
    model = adapt(tiny("qwen3_moe"))
    moelora.enable(model)
    rows = tokens(8, 64)

    def step():
        model.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()

    keeps_nothing(step)
