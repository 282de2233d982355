"""Bit-identical results from run to run, whatever the number of threads, or the number and order of Triton's
programs.
"""

import problems
import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case

from torch_moelora import _C
from torch_moelora.switches import SWITCHES

pytestmark = pytest.mark.operators

# In Triton's interpreter a run takes seconds, and nothing but the number and order of programs can differ.
INTERPRETED = SWITCHES.backend == "triton"
COUNTS = (2, 3) if INTERPRETED else (1, 2, 3, 2, 3)
EXPERTS, TOKENS = (10, 100) if INTERPRETED else (40, 300)

CASES = {
    "skewed routing, bf16, fp32 LoRA": Case(
        tokens=TOKENS, top_k=4, experts=6, k=96, n=130, rank=17, dtype=BF16, lora="fp32", gates="fp32",
        bias="same", routing="few_experts",
    ),
    "one expert with all rows": Case(
        tokens=700, top_k=2, experts=3, k=64, n=70, rank=8, dtype=BF16, gates="same", routing="one_expert"
    ),
    "fp16": Case(tokens=120, top_k=2, experts=5, k=65, n=33, rank=5, dtype=FP16, bias="same"),
    "fp32, few rows an expert": Case(
        tokens=EXPERTS, top_k=4, experts=EXPERTS, k=160, n=96, rank=4, bias="same"
    ),
    "fp64": Case(tokens=60, top_k=2, experts=4, k=48, n=40, rank=4, dtype=FP64, gates="same"),
}  # fmt: skip
LONG_INTERPRETED = ("one expert with all rows", "fp16", "fp64")


def case_of(name: str):
    marks = pytest.mark.long_interpreted if name in LONG_INTERPRETED else ()
    return pytest.param(CASES[name], id=name, marks=marks)


@pytest.fixture
def threads():
    """Sets how many threads, or programs of Triton's interpreter, share the work; put back afterwards."""
    if INTERPRETED:
        import triton_interpreter

        with pytest.MonkeyPatch.context() as patch:

            def programs(count: int) -> None:
                patch.undo()
                triton_interpreter.other_programs(patch, count)

            yield programs
        return
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(p: problems.Problem) -> list[torch.Tensor]:
    h = p.dy if p.case.n % 2 == 0 else p.dy[:, 1:]
    ids = problems.expert_ids(p.case, torch.Generator().manual_seed(1))
    results = [
        *problems.call("flatten_sort_count", ids, p.case.experts),
        problems.call("scatter_lora", *p.forward_args()),
        *problems.call("scatter_lora_dx", *p.dx_args()),
        *problems.call("scatter_lora_dab", *p.dab_args()),
        *problems.call("scatter_lora_backward", *p.backward_args()),
        problems.call("scatter_lora_dw", *p.dw_args()),
        problems.call("scatter_lora_dbias", *p.dbias_args()),
        problems.call("glu", h),
    ]
    return [*results, problems.call("glu_backward", results[-1], h)]


@pytest.mark.parametrize("case", map(case_of, CASES))
def test_same_bits(case, threads):
    p = problems.build(case)
    threads(1)
    expected = everything(p)
    for count in COUNTS:
        threads(count)
        for i, (a, b) in enumerate(zip(expected, everything(p), strict=True)):
            assert torch.equal(a, b), f"result {i} differs with {count} threads"


@pytest.mark.skipif(INTERPRETED, reason="Triton's kernels sum alike whatever the size")
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("name", ["scatter_lora", "scatter_lora_dx"])
def test_wide_sums(name, dtype, threads):
    """More rows, and wider ones, than the CPU's drivers keep apart before they are added by token."""
    wide, case = 3200, Case(tokens=520, top_k=4, experts=6, k=40, n=40, rank=8, dtype=dtype, gates="same")
    kept_apart = max(kernels.blocking["combine_bytes"] for kernels in _C.kernel_sets())
    assert case.rows * wide * torch.float32.itemsize > kept_apart
    if name == "scatter_lora":
        case = case.with_(n=wide)
        args, dtypes = problems.build(case).forward_args(), (dtype,)
    else:
        case = case.with_(k=wide)
        args, dtypes = problems.build(case).dx_args(), (dtype, FP32)
    threads(1)
    problems.check(name, args, case, dtypes)
    expected = problems.call(name, *args)
    for count in (2, 3):
        threads(count)
        found = problems.call(name, *args)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b), f"{count} threads"


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_row_does_not_depend_on_the_others(dtype, threads):
    """A token's result has the same bits alone and in a batch, as long as the same kernel shape serves it.

    Summation over K is in one order per element; rows are only ever placed side by side.
    """
    case = Case(tokens=48, top_k=1, experts=1, k=200, n=96, rank=8, dtype=dtype)
    p = problems.build(case)
    whole = problems.call("scatter_lora", *p.forward_args())
    p.x, p.slots = p.x[:32], p.slots[:32]
    p.offsets = torch.tensor([32], dtype=torch.int32)
    assert torch.equal(problems.call("scatter_lora", *p.forward_args()), whole[:32])
