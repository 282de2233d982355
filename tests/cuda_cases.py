"""Cases on a GPU: what the tests of the CUDA kernels have in common."""

import dataclasses

import problems
import pytest
import torch
from cases import BF16, FP32, Case
from packings import Packing
from torch import Tensor

from torch_moelora import formats

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

DEVICE = "cuda"

EVERYTHING = Case(
    tokens=40, top_k=4, experts=6, k=72, n=88, rank=8, dtype=BF16, lora="fp32", bias="same", gates="fp32"
)

LAYERS = {
    "gate_up of Qwen3-30B-A3B": Case(k=2048, n=1536, top_k=8, lora="fp32", y_grouped=True),
    "down of Qwen3-30B-A3B": Case(k=768, n=2048, top_k=8, lora="fp32", gates="fp32", x_grouped=True),
    "gate_up of gpt_oss": Case(
        k=2880, n=5760, top_k=4, lora="fp32", bias="same", weight_layout="transposed", lora_layout="peft"
    ),
}


def moved(t: Tensor) -> Tensor:
    """On the GPU with the same strides: the whole storage travels."""
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return whole.to(DEVICE).as_strided(t.shape, t.stride(), t.storage_offset())


def moved_packed(w: formats.PackedWeight) -> formats.PackedWeight:
    return w._replace(**{k: moved(v) for k, v in w._asdict().items() if isinstance(v, Tensor)})


def build(case: Case) -> problems.Problem:
    p = problems.build(case)
    tensors = {f.name: getattr(p, f.name) for f in dataclasses.fields(p)}
    found = {k: moved(v) for k, v in tensors.items() if isinstance(v, Tensor)}
    packed = p.packed and moved_packed(p.packed)
    return dataclasses.replace(
        p, **found | ({} if packed is None else {"packed": packed, "weight": packed.codes})
    )


def calls(p: problems.Problem) -> dict[str, tuple]:
    """Operator → arguments; without LoRA there is no dA and dB."""
    args = {
        "scatter_lora": p.forward_args(),
        "scatter_lora_dx": p.dx_args(),
        "scatter_lora_dw": p.dw_args(),
        "scatter_lora_dbias": p.dbias_args(),
    }
    return (
        args
        if p.lora_a is None
        else args
        | {
            "scatter_lora_dab": p.dab_args(),
            "scatter_lora_backward": (*p.backward_args(), True, *p.packed_args),
        }
    )


def check(case: Case, *names: str) -> None:
    """These operators, or all."""
    p = build(case)
    lora = FP32 if case.lora == "fp32" else case.dtype
    dtypes = {
        "scatter_lora_dx": (case.dtype, FP32),
        "scatter_lora_dab": (lora, lora),
        "scatter_lora_backward": (case.dtype, FP32, lora, lora),
    }
    for name, args in calls(p).items():
        if not names or name in names:
            depends = case if name not in ("scatter_lora_dw", "scatter_lora_dbias") else case.with_(rank=0)
            problems.check(name, args, depends, dtypes.get(name, (case.dtype,)))


def everything(p: problems.Problem) -> list[Tensor]:
    ids = moved(problems.expert_ids(p.case, torch.Generator().manual_seed(1)))
    results = [*torch.ops.moelora.flatten_sort_count(ids, p.case.experts)]
    for name, args in calls(p).items():
        out = getattr(torch.ops.moelora, name)(*args)
        results += out if isinstance(out, tuple) else (out,)
    y = torch.ops.moelora.glu(p.dy)
    return [*results, y, torch.ops.moelora.glu_backward(y, p.dy)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def packing_of(name: str, transposed: bool = False) -> Packing:
    """As checkpoints have it."""
    row = formats.FORMATS[name]
    group = row.groups.default
    return Packing(name, group, row.scale_dtypes[0], rows="block", zero=bool(row.zero), transposed=transposed)
