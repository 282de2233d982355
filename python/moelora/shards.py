"""Safetensors files written and read piece by piece; the library's own writer wants all of a file in memory.

Sizes are known before anything is written: the header goes first, and pieces of tensors, from any thread,
to where it says.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora.errors import MoeloraError, one_line

ALIGNMENT = 4096  # of the first tensor, so that a mapped file's tensors are aligned
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class Spec(NamedTuple):
    """A stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Stored(NamedTuple):
    """Where a tensor lies in a file."""

    path: Path
    spec: Spec
    offset: int  # bytes from the start of the file

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of its first dimension, all by default, in memory of their own.

        Raises: MoeloraError if the file ends before.
        """
        shape = self.spec.shape
        if stop is not None or start:
            stop = shape[0] if stop is None else stop
            row = self.spec.nbytes // shape[0]
            return self.read_bytes(start * row, (stop - start) * row).view(stop - start, *shape[1:])
        return self.read_bytes(0, self.spec.nbytes).view(shape)

    def read_bytes(self, start: int, count: int) -> Tensor:
        """`count` bytes from byte `start` of the tensor, as a flat tensor of its dtype."""
        buffer = torch.empty(count, dtype=torch.uint8)
        view = memoryview(buffer.numpy())
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start)
                done = 0
                while done < count:
                    if not (got := file.readinto(view[done:])):
                        raise MoeloraError(f"{self.path} ends in the middle of a tensor: it is not complete")
                    done += got
        except OSError as error:
            raise MoeloraError(f"cannot read {self.path}: {error.strerror}") from None
        return buffer.view(self.spec.dtype)


class ShardFile:
    """A safetensors file of known tensors, open for their pieces; a context manager."""

    def __init__(self, path: Path, specs: dict[str, Spec]):
        # The larger items first, as the library orders them: what follows them stays aligned.
        names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
        offsets, at = {}, 0
        for name in names:
            offsets[name] = at
            at += specs[name].nbytes
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name in names:
            spec, begin = specs[name], offsets[name]
            entries[name] = {
                "dtype": NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [begin, begin + spec.nbytes],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        start = 8 + len(text)
        self.path = path
        self.stored = {name: Stored(path, specs[name], start + offset) for name, offset in offsets.items()}
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.ftruncate(self._handle, start + at)
            self._put(struct.pack("<Q", len(text)) + text, 0)
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def write(self, name: str, first: int, values: Tensor) -> None:
        """Writes values, flat and in order, from element `first` of the tensor `name`."""
        where = self.stored[name]
        if values.dtype != where.spec.dtype:
            raise TypeError(f"{name} is {where.spec.dtype}, got {values.dtype}")
        size = where.spec.dtype.itemsize
        if (first + values.numel()) * size > where.spec.nbytes:
            raise ValueError(f"{name} has {where.spec.nbytes} bytes, got more")
        self._put(
            memoryview(values.contiguous().view(-1).view(torch.uint8).numpy()), where.offset + first * size
        )

    def _put(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._handle, view, at)
            view, at = view[done:], at + done


def stored(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, from its header.

    Raises: MoeloraError if that cannot be read, or a tensor is of a dtype that torch does not have.
    """
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            entries = json.loads(file.read(size))
        found = {}
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            spec = Spec(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            begin, end = entry["data_offsets"]
            if end - begin != spec.nbytes or 8 + size + end > path.stat().st_size:
                raise ValueError(f"{name} has another size than its header says, or the file is cut off")
            found[name] = Stored(path, spec, 8 + size + begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise MoeloraError(f"cannot read the header of {path}: {one_line(error)}") from None
    return found


def divided(groups: Iterable[dict[str, Spec]], most: int) -> list[list[int]]:
    """Which groups of tensors, by their number, go into one file: in order, at most `most` bytes unless one
    group has more.
    """
    files: list[list[int]] = []
    left = 0
    for number, group in enumerate(groups):
        size = sum(spec.nbytes for spec in group.values())
        if size > left or not files:
            files.append([])
            left = most
        files[-1].append(number)
        left -= size
    return files
