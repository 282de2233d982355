"""What is timed: one layer's parameters and one batch, made the same way in every process from a `Case`.

Imports torch only, so that a contestant in an environment of its own can use it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from .registry import Shape
from .routing import route

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALING = 2.0
DISTINCT = 16  # experts; the others are copies of these, so that packing a layer takes seconds
LORA_NAMES = ("gate_up_lora_a", "gate_up_lora_b", "down_lora_a", "down_lora_b")


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Case:
    """One line of the result table, before its contestant."""

    shape: Shape
    tokens: int
    rank: int
    dtype: str = "bf16"
    lora_dtype: str = "bf16"
    routing: str = "random"
    device: str = "cpu"
    seed: int = 0
    check_rows: int = 0  # > 0: the small batch of the correctness gate, with this many rows in busy experts

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> Case:
        return cls(**{**fields, "shape": Shape(**fields["shape"])})

    def for_check(self) -> Case:
        """The same layer with few rows: some experts get as many as they do when timed, all may get one."""
        rows = min(256, math.ceil(self.tokens * self.shape.top_k / self.shape.experts))
        return replace(self, tokens=rows + min(16, self.tokens), routing="random", check_rows=rows)


@dataclass
class Layer:
    """weights, biases: by projection, [E, N, K] and [E, N]. lora: LORA_NAMES → [E, R, K] or [E, N, R].

    The case's tokens and routing are those of some batch.
    """

    case: Case
    weights: dict[str, Tensor]
    biases: dict[str, Tensor | None]
    lora: dict[str, Tensor]

    @property
    def shape(self) -> Shape:
        return self.case.shape

    def bias_bytes(self) -> int:
        return nbytes(*(bias for bias in self.biases.values() if bias is not None))


@dataclass
class Batch:
    """x, dy [T, H]; expert_idxs, gates [T, top_k]."""

    x: Tensor
    expert_idxs: Tensor
    gates: Tensor
    dy: Tensor
    case: Case


def _expert_weights(experts: int, rows: int, columns: int, std: float, dtype, device, gen) -> Tensor:
    """[experts, rows, columns]: each of the DISTINCT experts is a window, at an offset of its own, of one
    random buffer.

    Drawing each element would take longer than the timing.
    """
    size = rows * columns
    offsets = torch.randint(0, size, (DISTINCT,), generator=gen).tolist()
    pool = torch.randn(2 * size, generator=gen).mul_(std).to(dtype).to(device)
    out = torch.empty(experts, rows, columns, dtype=dtype, device=device)
    for e in range(experts):
        offset = offsets[e % DISTINCT]
        out[e].view(-1).copy_(pool[offset : offset + size])
    return out


def make_weights(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    shape, dtype = case.shape, DTYPES[case.dtype]
    gen = torch.Generator().manual_seed(case.seed)
    weights, biases = {}, {}
    for name, (n, k) in shape.projections.items():
        stored = (k, n) if shape.transposed else (n, k)
        w = _expert_weights(shape.experts, *stored, 1 / math.sqrt(k), dtype, case.device, gen)
        weights[name] = w.transpose(1, 2) if shape.transposed else w
        bias = torch.randn(shape.experts, n, generator=gen).mul_(0.1).to(dtype).to(case.device)
        biases[name] = bias if shape.bias else None
    return weights, biases


def make_layer(case: Case, weights=None, biases=None) -> Layer:
    """The layer of a case; `weights` and `biases` of another rank's layer may be shared."""
    if weights is None:
        weights, biases = make_weights(case)
    gen = torch.Generator().manual_seed(case.seed + 1)
    experts, rank = case.shape.experts, case.rank
    lora = {}
    for name, (n, k) in case.shape.projections.items():
        # As large as keeps the LoRA term visible beside the base term.
        for suffix, size, std in (
            ("a", (experts, rank, k), 1 / math.sqrt(k)),
            ("b", (experts, n, rank), 0.5 / (SCALING * math.sqrt(rank))),
        ):
            value = torch.randn(size, generator=gen).mul_(std).to(DTYPES[case.lora_dtype])
            lora[f"{name}_lora_{suffix}"] = value.to(case.device).requires_grad_()
    return Layer(case, weights, biases, lora)


def make_batch(case: Case) -> Batch:
    shape, dtype = case.shape, DTYPES[case.dtype]
    gen = torch.Generator().manual_seed(case.seed + 2)
    x = torch.randn(case.tokens, shape.hidden, generator=gen)
    dy = torch.randn(case.tokens, shape.hidden, generator=gen)
    idxs = route(case.routing, case.tokens, shape.experts, shape.top_k, gen)
    if case.check_rows:
        busy = torch.randperm(shape.experts, generator=gen)[: shape.top_k]
        idxs[: case.check_rows] = busy
    gates = torch.rand(case.tokens, shape.top_k, generator=gen).add_(0.1)
    gates /= gates.sum(1, keepdim=True)
    x, dy, gates = (t.to(dtype).to(case.device) for t in (x, dy, gates))
    return Batch(x.requires_grad_(), idxs.to(case.device), gates.requires_grad_(), dy, case)
