"""Tensors of a checkpoint on their way into another: as they are, or packed and compared with the original.

A few matrices at a time, or some rows of one; so many at once as memory is allowed for.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora import packed_layout
from moelora.checkpoint_reader import DenseWeight, PackedSource, kind, unnested
from moelora.errors import MoeloraError
from moelora.packed_layout import Choice
from moelora.shards import ShardFile, Spec, Stored
from torch_moelora import formats
from torch_moelora.formats import FORMATS, PackedWeight

MEMORY = 1 << 30  # bytes for all that is in work at once
NUMBERS = 1 << 21  # of a weight that are packed at once
WHOLE = 20_000_000  # as many where a scale is for all of an expert
BYTES_A_NUMBER = 24  # in work: copies in float32
COPIED = 1 << 25  # bytes at once

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


class Packed:
    """A weight, packed, read back from the file and compared.

    change: what is done to a block of the weight before, given (block, [experts, rows, K] in float32); it
        returns what is to be packed and figures to add up.
    """

    def __init__(self, weight: Weight, choice: Choice, change: Callable[[Block, Tensor], Any] | None = None):
        self._weight, self._choice, self._change = weight, choice, change
        self._blocks = Blocks.of(weight.shape, choice)
        found = packed_layout.specs(choice, weight.shape, self._blocks.parts)
        self._parts = {part: Spec(*spec) for part, spec in found.items()}
        self.specs = {f"{weight.name}.{part}": spec for part, spec in self._parts.items()}

    def write(self, file: ShardFile, pool: Executor) -> dict[str, Any]:
        """Returns the weight's name and kind, and the squared error and norm, summed."""
        at_once = threading.Semaphore(in_work(self._weight, self._blocks))
        nested = self._choice.nested
        scales = torch.empty(self._parts["scale"].shape) if nested else None

        def first(i: int) -> Tensor:
            with at_once:
                return self._pack(file, i, scales)

        def second(i: int) -> Tensor:
            with at_once:
                return self._compare_again(file, i, scales)

        starts = range(0, self._weight.shape[0], self._blocks.experts)
        total = sum(pool.map(first, starts), torch.zeros(2, dtype=torch.float64))
        if nested:
            codes, scale2 = formats.nested_scales(scales)
            file.write(f"{self._weight.name}.scale", 0, codes)
            file.write(f"{self._weight.name}.scale2", 0, scale2)
            stored = {part: file.stored[f"{self._weight.name}.{part}"].read() for part in ("scale", "scale2")}
            scales.copy_(unnested(self._choice, self._parts["codes"].shape, **stored))
            total = sum(pool.map(second, starts), torch.zeros(2, dtype=torch.float64))
        name = self._weight.name
        return {"name": name, "kind": kind(name), "error": total[0].item(), "norm": total[1].item()}

    def _each(self, i: int) -> Iterator[tuple[Block, Tensor]]:
        """The blocks from expert i, with what is to be packed."""
        experts, n, _ = self._weight.shape
        j = min(experts, i + self._blocks.experts)
        source = self._weight.read(i, j)
        for a in range(0, n, self._blocks.rows):
            block = Block(i, j, a, min(n, a + self._blocks.rows))
            values = source[:, block.a : block.b]
            yield block, values if self._change is None else self._change(block, values)

    def _pack(self, file: ShardFile, i: int, scales: Tensor | None) -> Tensor:
        total = torch.zeros(2, dtype=torch.float64)
        group = self._choice.group_size or self._whole()
        for block, values in self._each(i):
            try:
                packed = formats.quantize(values, self._choice.format, group)
            except RuntimeError as error:
                raise MoeloraError(f"{self._weight.name} cannot be packed: {error}") from None
            for part, tensor in zip(packed_layout.PARTS, packed[:4], strict=True):
                if part == "scale" and scales is not None:
                    scales[block.i : block.j, block.a : block.b] = tensor
                elif tensor is not None:
                    file.write(f"{self._weight.name}.{part}", self._first(part, block), tensor)
            if scales is None:
                total += _squares(self._read(file, block, None), values)
        return total

    def _compare_again(self, file: ShardFile, i: int, scales: Tensor) -> Tensor:
        return sum(
            (_squares(self._read(file, block, scales), values) for block, values in self._each(i)),
            torch.zeros(2, dtype=torch.float64),
        )

    def _whole(self) -> int:
        """What `quantize` takes for a scale a row."""
        return 0 if FORMATS[self._choice.format].groups.kind == "grid" else self._weight.shape[2]

    def _row(self, part: str, a: int) -> int:
        """The row of a stored tensor that belongs to row `a` of the weight."""
        n, rows = self._weight.shape[1], self._parts[part].shape[1]
        if rows == n:
            return a
        return a * rows // n if part == "scale2" else a // 128

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


def _squares(found: Tensor, expected: Tensor) -> Tensor:
    """(‖found - expected‖², ‖expected‖²)."""
    expected = expected.float()
    norm = expected.square().sum(dtype=torch.float64)
    return torch.stack((found.sub_(expected).square_().sum(dtype=torch.float64), norm))
