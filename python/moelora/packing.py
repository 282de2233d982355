"""Tensors of a checkpoint on their way into another: as they are, or packed and compared with the original.

A few matrices at a time, or some rows of one; so many at once as memory is allowed for.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moelora import packed_layout
from moelora.checkpoint_reader import DenseWeight, PackedSource, kind, unnested
from moelora.errors import MoeloraError
from moelora.model_names import Names, oriented
from moelora.packed_layout import Choice
from moelora.shards import ShardFile, Spec, Stored
from torch_moelora import formats
from torch_moelora.formats import FORMATS, PackedWeight

MEMORY = 1 << 30  # bytes for all that is in work at once
NUMBERS = 1 << 21  # of a weight that are packed at once
WHOLE = 20_000_000  # as many where a scale is for all of an expert
BYTES_A_NUMBER = 24  # in work: copies in float32
COPIED = 1 << 25  # bytes at once

if TYPE_CHECKING:
    from moelora.adapter_deltas import Delta  # with PEFT, which takes seconds to import

Weight = DenseWeight | PackedSource


class Copied:
    """A tensor as it is."""

    def __init__(self, name: str, tensor: Stored):
        self.specs = {name: tensor.spec}
        self._name, self._tensor = name, tensor

    def write(self, file: ShardFile, pool: Executor) -> None:
        size = self._tensor.spec.dtype.itemsize
        total = self._tensor.spec.nbytes

        def piece(start: int) -> None:
            count = min(COPIED, total - start)
            file.write(self._name, start // size, self._tensor.read_bytes(start, count))

        for _ in pool.map(piece, range(0, total, COPIED)):
            pass


class Blocks(NamedTuple):
    """How a weight is divided: `experts` at once, or of one `rows` at once. parts: nvfp4's P."""

    experts: int
    rows: int
    parts: int

    @classmethod
    def of(cls, shape: tuple[int, int, int], choice: Choice | None) -> Blocks:
        """By the shape and the format alone, so that the result is the same on every machine."""
        _, n, k = shape
        row = None if choice is None else FORMATS[choice.format]
        if row is not None and row.scale2 == "parts":
            parts = 1
            while n % (2 * parts) == 0 and n // parts * k > WHOLE:
                parts *= 2
            return cls(max(1, NUMBERS // (n * k)) if parts == 1 else 1, n // parts, parts)
        if n * k <= NUMBERS:
            return cls(NUMBERS // (n * k), n, 1)
        return cls(1, min(n, max(128, NUMBERS // k // 128 * 128)), 1)


class Block(NamedTuple):
    """Experts [i, j), of which rows [a, b)."""

    i: int
    j: int
    a: int
    b: int


class Figures(NamedTuple):
    """Sums over a weight, in float64. error: ‖written - wanted‖². norm: ‖wanted‖². kept: the scalar product
    of the delta with what of it is in what was written; delta: ‖delta‖².
    """

    error: Tensor
    norm: Tensor
    kept: Tensor
    delta: Tensor

    @classmethod
    def none(cls) -> Figures:
        return cls(*torch.zeros(4, dtype=torch.float64))

    @classmethod
    def of(cls, written: Tensor, base: Tensor, delta: Tensor | None) -> Figures:
        """For blocks in float32."""
        wanted = base if delta is None else base + delta
        error, norm = _square(written - wanted), _square(wanted)
        if delta is None:
            return cls(error, norm, *torch.zeros(2, dtype=torch.float64))
        kept = (written - base).mul_(delta).sum(-1)
        return cls(error, norm, kept.sum(dtype=torch.float64), _square(delta))

    def plus(self, other: Figures) -> Figures:
        return Figures(*(a + b for a, b in zip(self, other, strict=True)))

    def told(self, name: str) -> dict[str, Any]:
        """As the record of a file has them."""
        return {"name": name, "kind": kind(name)} | {k: v.item() for k, v in self._asdict().items()}


def _square(values: Tensor) -> Tensor:
    """‖values‖² in float64; a row in float32, which is exact enough and much faster."""
    return torch.linalg.vector_norm(values, dim=-1).double().square().sum()


class _Changed:
    """A weight and what is added to it, block by block."""

    def __init__(self, weight: Weight, delta: Delta | None):
        self._weight, self._delta = weight, delta

    def begin(self) -> tuple[Tensor, Tensor] | None:
        return None if self._delta is None else self._delta.read()

    def each(self, i: int, blocks: Blocks, factors: Any) -> Iterator[tuple[Block, Tensor, Tensor | None]]:
        """(block, base, delta) from expert i, [experts, rows, K]; with a delta both are float32."""
        experts, n, _ = self._weight.shape
        j = min(experts, i + blocks.experts)
        source = self._weight.read(i, j)
        for a in range(0, n, blocks.rows):
            block = Block(i, j, a, min(n, a + blocks.rows))
            base = source[:, block.a : block.b]
            if factors is None:
                yield block, base, None
            else:
                a_factor, b_factor = (factor[i:j] for factor in factors)
                yield block, base.float(), torch.bmm(b_factor[:, block.a : block.b], a_factor)


class Dense:
    """A weight in a floating dtype, under the names and in the shapes of the model's dense checkpoint."""

    def __init__(self, weight: Weight, dtype: torch.dtype, names: Names, delta: Delta | None):
        self._weight, self._dtype, self._names = weight, dtype, names
        self._changed = _Changed(weight, delta)
        self._module = names.experts().get(weight.name)
        self._blocks = Blocks.of(weight.shape, None)
        self.specs = {
            disk: Spec(dtype, tuple(tensor.shape))
            for disk, tensor in self._on_disk(torch.empty(weight.shape, dtype=dtype, device="meta")).items()
        }
        self._single = len(self.specs) > len(self._on_disk(torch.empty(1, *weight.shape[1:], device="meta")))

    def _on_disk(self, values: Tensor) -> dict[str, Tensor]:
        """Of [experts, N, K]."""
        own = values[0] if self._module is None else oriented(self._module, values)
        return self._names.on_disk({self._weight.name: own})

    def write(self, file: ShardFile, pool: Executor) -> dict[str, Any]:
        """Returns the weight's figures."""
        at_once = threading.Semaphore(in_work(self._weight, self._blocks))
        factors = self._changed.begin()

        def part(i: int) -> Figures:
            with at_once:
                experts, n, k = self._weight.shape
                j = min(experts, i + self._blocks.experts)
                values, total = torch.empty(j - i, n, k, dtype=self._dtype), Figures.none()
                for block, base, delta in self._changed.each(i, self._blocks, factors):
                    rows = values[:, block.a : block.b]
                    rows.copy_(base if delta is None else base + delta)
                    total = total.plus(Figures.of(rows.float(), base.float(), delta))
                for disk, tensor in self._on_disk(values).items():
                    self._put(file, i, disk, tensor)
                return total

        starts = range(0, self._weight.shape[0], self._blocks.experts)
        total = functools.reduce(Figures.plus, pool.map(part, starts), Figures.none())
        return total.told(self._weight.name)

    def _put(self, file: ShardFile, i: int, disk: str, tensor: Tensor) -> None:
        if self._single:  # a matrix for each expert, counted from the block's first
            disk = re.sub(r"\bexperts\.(\d+)\b", lambda found: f"experts.{int(found[1]) + i}", disk)
            file.write(disk, 0, tensor)
        else:
            experts = self._weight.shape[0]
            file.write(disk, i * (math.prod(self.specs[disk].shape) // experts), tensor)


class Cast:
    """A tensor in another floating dtype."""

    def __init__(self, name: str, tensor: Stored, dtype: torch.dtype):
        self.specs = {name: Spec(dtype, tensor.spec.shape)}
        self._name, self._tensor, self._dtype = name, tensor, dtype

    def write(self, file: ShardFile, pool: Executor) -> None:
        size = self._tensor.spec.dtype.itemsize

        def piece(start: int) -> None:
            count = min(COPIED, self._tensor.spec.nbytes - start)
            file.write(self._name, start // size, self._tensor.read_bytes(start, count).to(self._dtype))

        for _ in pool.map(piece, range(0, self._tensor.spec.nbytes, COPIED)):
            pass


class Packed:
    """A weight, packed, with what is added to it before; read back from the file and compared.

    With zero points where it had some and is packed as it was.
    """

    def __init__(self, weight: Weight, choice: Choice, delta: Delta | None = None):
        self._weight, self._choice = weight, choice
        self._changed = _Changed(weight, delta)
        self._blocks = Blocks.of(weight.shape, choice)
        self._zeros = isinstance(weight, PackedSource) and weight.choice == choice and "zero" in weight.parts
        found = packed_layout.specs(choice, weight.shape, self._blocks.parts, self._zeros)
        self._parts = {part: Spec(*spec) for part, spec in found.items()}
        self.specs = {f"{weight.name}.{part}": spec for part, spec in self._parts.items()}

    def write(self, file: ShardFile, pool: Executor) -> dict[str, Any]:
        """Returns the weight's figures."""
        at_once = threading.Semaphore(in_work(self._weight, self._blocks))
        nested = self._choice.nested
        scales = torch.empty(self._parts["scale"].shape, dtype=torch.float32) if nested else None

        factors = self._changed.begin()

        def first(i: int) -> Figures:
            with at_once:
                return self._pack(file, i, factors, scales)

        def second(i: int) -> Figures:
            with at_once:
                return self._compare_again(file, i, factors, scales)

        starts = range(0, self._weight.shape[0], self._blocks.experts)
        total = functools.reduce(Figures.plus, pool.map(first, starts), Figures.none())
        if nested:
            codes, scale2 = formats.nested_scales(scales)
            file.write(f"{self._weight.name}.scale", 0, codes)
            file.write(f"{self._weight.name}.scale2", 0, scale2)
            stored = {part: file.stored[f"{self._weight.name}.{part}"].read() for part in ("scale", "scale2")}
            scales.copy_(unnested(self._choice, self._parts["codes"].shape, **stored))
            total = functools.reduce(Figures.plus, pool.map(second, starts), Figures.none())
        return total.told(self._weight.name)

    def _pack(self, file: ShardFile, i: int, factors: Any, scales: Tensor | None) -> Figures:
        total = Figures.none()
        group = self._choice.group_size or self._whole()
        for block, base, delta in self._changed.each(i, self._blocks, factors):
            values = base if delta is None else base + delta
            try:
                packed = formats.quantize(values, self._choice.format, group, zeros=self._zeros)
            except RuntimeError as error:
                raise MoeloraError(f"{self._weight.name} cannot be packed: {error}") from None
            for part, tensor in zip(packed_layout.PARTS, packed[:4], strict=True):
                if part == "scale" and scales is not None:
                    scales[block.i : block.j, block.a : block.b] = tensor
                elif tensor is not None:
                    file.write(f"{self._weight.name}.{part}", self._first(part, block), tensor)
            if scales is None:
                total = total.plus(Figures.of(self._read(file, block, None), base.float(), delta))
        return total

    def _compare_again(self, file: ShardFile, i: int, factors: Any, scales: Tensor) -> Figures:
        total = Figures.none()
        for block, base, delta in self._changed.each(i, self._blocks, factors):
            total = total.plus(Figures.of(self._read(file, block, scales), base.float(), delta))
        return total

    def _whole(self) -> int:
        """What `quantize` takes for a scale a row."""
        return 0 if FORMATS[self._choice.format].groups.kind == "grid" else self._weight.shape[2]

    def _row(self, part: str, a: int) -> int:
        """The row of a stored tensor that belongs to row `a` of the weight."""
        n, rows = self._weight.shape[1], self._parts[part].shape[1]
        if rows == n:
            return a
        return a * rows // n if part == "scale2" else a // FORMATS[self._choice.format].groups.least

    def _first(self, part: str, block: Block) -> int:
        """Where a block begins in a stored tensor."""
        shape = self._parts[part].shape
        width = math.prod(shape[2:])
        return block.i * shape[1] * width + self._row(part, block.a) * width

    def _read(self, file: ShardFile, block: Block, scales: Tensor | None) -> Tensor:
        """A block from the file, unpacked to float32."""
        parts = {}
        for part, spec in self._parts.items():
            if scales is not None and part != "codes":
                continue
            width = math.prod(spec.shape[2:])
            first, last = self._row(part, block.a), self._row(part, block.b - 1) + 1
            count = (block.j - block.i) * (last - first) * width  # rows are all where experts are several
            at = (block.i * spec.shape[1] + first) * width
            size = spec.dtype.itemsize
            flat = file.stored[f"{self._weight.name}.{part}"].read_bytes(at * size, count * size)
            parts[part] = flat.view(block.j - block.i, last - first, *spec.shape[2:])
        if scales is not None:
            parts["scale"] = scales[block.i : block.j, block.a : block.b]
        return PackedWeight(
            *(parts.get(part) for part in packed_layout.PARTS), format=self._choice.format
        ).dequantize(torch.float32)


def in_work(weight: Weight, blocks: Blocks) -> int:
    """How many blocks may be in work at once."""
    _, n, k = weight.shape
    held = blocks.experts * n * k * (4 if isinstance(weight, PackedSource) else weight.dtype.itemsize)
    return max(1, MEMORY // (2 * held + blocks.experts * blocks.rows * k * BYTES_A_NUMBER))
