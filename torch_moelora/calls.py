"""One call of each operator as a tuple: its schema's arguments, in their order and with their defaults.

Whatever stands between the dispatcher and a kernel (checks, fakes, autograd, autocast, the Triton kernels)
takes such a tuple and reads its fields by name, so that an argument is listed here and in `schemas.py`, and
otherwise only where it is used. `tests/test_registry.py` compares the two. Shapes: `functional.py`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import Tensor


class FlattenSortCount(NamedTuple):
    expert_idxs: Tensor
    num_experts: int


class ScatterLora(NamedTuple):
    x: Tensor
    weight: Tensor
    sorted_scattered_idxs: Tensor
    expert_offsets: Tensor
    top_k: int
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None
    gates: Tensor | None = None
    x_grouped: bool = False
    y_grouped: bool = False
    weight_scale: Tensor | None = None
    weight_scale2: Tensor | None = None
    weight_zero: Tensor | None = None
    weight_format: str = "dense"
    weight_transposed: bool = False
    sum_fp32: bool = False


class ScatterLoraDx(NamedTuple):
    dy: Tensor
    weight: Tensor
    sorted_scattered_idxs: Tensor
    expert_offsets: Tensor
    top_k: int
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None
    gates: Tensor | None = None
    x: Tensor | None = None
    x_grouped: bool = False
    y_grouped: bool = False
    weight_scale: Tensor | None = None
    weight_scale2: Tensor | None = None
    weight_zero: Tensor | None = None
    weight_format: str = "dense"
    weight_transposed: bool = False
    sum_fp32: bool = False


class ScatterLoraDab(NamedTuple):
    dy: Tensor
    x: Tensor
    sorted_scattered_idxs: Tensor
    expert_offsets: Tensor
    top_k: int
    lora_a: Tensor
    lora_b: Tensor
    scaling: float = 1.0
    gates: Tensor | None = None
    x_grouped: bool = False
    y_grouped: bool = False


class ScatterLoraBackward(NamedTuple):
    dy: Tensor
    x: Tensor
    weight: Tensor
    sorted_scattered_idxs: Tensor
    expert_offsets: Tensor
    top_k: int
    lora_a: Tensor
    lora_b: Tensor
    scaling: float = 1.0
    bias: Tensor | None = None
    gates: Tensor | None = None
    x_grouped: bool = False
    y_grouped: bool = False
    with_dgates: bool = True
    weight_scale: Tensor | None = None
    weight_scale2: Tensor | None = None
    weight_zero: Tensor | None = None
    weight_format: str = "dense"
    weight_transposed: bool = False
    sum_fp32: bool = False


class ScatterLoraDw(NamedTuple):
    dy: Tensor
    x: Tensor
    sorted_scattered_idxs: Tensor
    expert_offsets: Tensor
    top_k: int
    gates: Tensor | None = None
    x_grouped: bool = False
    y_grouped: bool = False


class ScatterLoraDbias(NamedTuple):
    dy: Tensor
    sorted_scattered_idxs: Tensor
    expert_offsets: Tensor
    top_k: int
    gates: Tensor | None = None
    y_grouped: bool = False


class Glu(NamedTuple):
    h: Tensor
    act: str = "silu"
    alpha: float = 1.0
    limit: float | None = None
    up_shift: float = 0.0
    interleaved: bool = False


class GluBackward(NamedTuple):
    dy: Tensor
    h: Tensor
    act: str = "silu"
    alpha: float = 1.0
    limit: float | None = None
    up_shift: float = 0.0
    interleaved: bool = False


CALLS: dict[str, type[NamedTuple]] = {
    "flatten_sort_count": FlattenSortCount,
    "scatter_lora": ScatterLora,
    "scatter_lora_dx": ScatterLoraDx,
    "scatter_lora_dab": ScatterLoraDab,
    "scatter_lora_backward": ScatterLoraBackward,
    "scatter_lora_dw": ScatterLoraDw,
    "scatter_lora_dbias": ScatterLoraDbias,
    "glu": Glu,
    "glu_backward": GluBackward,
}

Call = TypeVar("Call")


def derive(kind: type[Call], call: NamedTuple, **changes) -> Call:
    """The `kind` that has the fields of `call` that it knows by name, and `changes`. What neither has keeps
    its default; a field without one is a TypeError.
    """
    fields = {name: value for name, value in zip(call._fields, call, strict=True) if name in kind._fields}
    return kind(**(fields | changes))
