"""Checks of a packed weight, from its format's row of `formats.FORMATS`: for the operators, where the
arguments are called weight, weight_scale, …, and for `formats`, where they are fields of a tuple. One
wording for both and for csrc/ops. Nothing here reads a tensor's contents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .formats import Format, PackedWeight


class Names(NamedTuple):
    """What the parts of a weight are called in messages."""

    codes: str
    scale: str
    scale2: str
    zero: str
    format: str
    transposed: str


# Scales of a nested weight that share a row of scale2.
RUN = 256
FIELDS = Names("codes", "scale", "scale2", "zero", "format", "transposed")
ARGUMENTS = Names(
    "weight", "weight_scale", "weight_scale2", "weight_zero", "weight_format", "weight_transposed"
)


def text(sizes) -> str:
    """As messages print shapes and strides: `[4, 8]`."""
    return "[" + ", ".join(str(d) for d in sizes) + "]"


def dtypes_text(dtypes: tuple[torch.dtype, ...]) -> str:
    """`a, b or c`."""
    names = [str(d) for d in dtypes]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


class _Check(NamedTuple):
    """The checks of one weight; `op` heads every message."""

    op: str
    row: Format
    weight: PackedWeight
    names: Names

    def require(self, condition: bool, message: Callable[[], str]) -> None:
        torch._check(condition, lambda: f"{self.op}: {message()}")

    @property
    def when(self) -> str:
        return f"when {self.names.format} is {self.row.name}"

    def letters(self, last: str) -> tuple[str, str]:
        """The stored matrix in words, `last` being what its columns are divided by: [N, K/2]."""
        rows, columns = ("K", "N") if self.weight.transposed else ("N", "K")
        return rows, f"{columns}{last}"

    def absent(self, name: str, t: Tensor | None, why: str) -> None:
        self.require(t is None, lambda: f"{name} must be None {why}, got shape {text(t.shape)}")

    def present(self, name: str, t: Tensor | None, why: str, dtypes: tuple[torch.dtype, ...]) -> None:
        """There, on the device of the codes, with one of the dtypes."""
        self.require(t is not None, lambda: f"{name} must be given {why}, got None")
        where = self.weight.codes.device
        self.require(
            t.device == where,
            lambda: f"{name} must be on device {where} (that of {self.names.codes}), got {t.device}",
        )
        self.require(
            t.dtype in dtypes,
            lambda: f"{name} must have dtype {dtypes_text(dtypes)} {self.when}, got {t.dtype}",
        )

    def shaped(self, name: str, t: Tensor, expected: tuple, why: str) -> None:
        """`expected` may hold strings for free dimensions."""

        def message() -> str:
            return f"{name} must have shape {text(expected)} ({why}), got {text(t.shape)}"

        self.require(t.dim() == len(expected), message)
        for size, want in zip(t.shape, expected, strict=True):
            if not isinstance(want, str):
                self.require(size == want, message)

    def codes(self) -> None:
        codes, name, row = self.weight.codes, self.names.codes, self.row
        rows, columns = self.letters("/2" if row.per_byte == 2 else "")
        self.require(
            codes.dim() == 3,
            lambda: f"{name} must be a 3-D tensor [E, {rows}, {columns}], got shape {text(codes.shape)}",
        )
        self.require(
            codes.dtype == row.storage,
            lambda: f"{name} must have dtype {row.storage} {self.when}, got {codes.dtype}",
        )
        for size in codes.shape[1:]:
            self.require(
                size >= 1, lambda: f"{name} must have N and K of at least 1, got shape {text(codes.shape)}"
            )
        self.require(
            codes.shape[2] == 1 or codes.stride(2) == 1,
            lambda: f"{name} must have a last stride of 1 {self.when}, got strides {text(codes.stride())}",
        )

    def scale(self) -> None:
        scale, name, groups = self.weight.scale, self.names.scale, self.row.groups
        self.present(name, scale, self.when, self.row.scale_dtypes)
        e, rows, columns = self.weight.codes.shape
        columns = columns * self.row.per_byte
        if groups.kind == "grid":
            self.grid(e, rows, columns)
            return
        across, along = self.letters("/G")
        self.shaped(name, scale, (e, rows, along), f"E={e}, {across}={rows}")
        count = scale.shape[2]
        rule = {
            "power": f"a power of 2 of at least {groups.least} that divides",
            "multiple": f"all of, or of a multiple of {groups.least} that divides,",
            "fixed": f"{groups.least} that divide",
        }[groups.kind]
        self.require(
            count >= 1 and columns % count == 0 and groups.allow(columns // count, columns),
            lambda: f"{name} must have groups of {rule} {along[0]}={columns}, got shape {text(scale.shape)}",
        )

    def grid(self, e: int, rows: int, columns: int) -> None:
        scale, name, block = self.weight.scale, self.names.scale, self.row.groups.least
        down, along = (rows, -(-rows // block), 1), (-(-columns // block), 1)

        def message() -> str:
            r, c = (", ".join(map(str, sizes)) for sizes in (down, along))
            return (
                f"{name} must have shape [{e}, r, c], r one of {r} and c one of {c}, got {text(scale.shape)}"
            )

        self.require(scale.dim() == 3, message)
        self.require(scale.shape[0] == e, message)
        self.require(scale.shape[1] in down, message)
        self.require(scale.shape[2] in along, message)

    def scale2(self) -> None:
        scale2, name, row = self.weight.scale2, self.names.scale2, self.row
        floats = (torch.float32,)
        e, rows, _ = self.weight.codes.shape
        if row.nested:
            dtype = self.weight.scale.dtype
            why = f"when {self.names.scale} has dtype {dtype}"
            if dtype != torch.uint8:
                self.absent(name, scale2, why)
                return
            self.present(name, scale2, why, floats)
            runs = -(-self.weight.scale.numel() // RUN)
            self.shaped(name, scale2, (runs, 2), f"a row for {RUN} scales")
        elif row.scale2 == "parts":
            self.present(name, scale2, self.when, floats)
            self.shaped(name, scale2, (e, "P"), f"E={e}")
            letter = self.letters("")[0]
            self.require(
                scale2.shape[1] >= 1 and rows % scale2.shape[1] == 0,
                lambda: f"{name} must have a P that divides {letter}={rows}, got shape {text(scale2.shape)}",
            )
        else:
            self.absent(name, scale2, self.when)

    def zero(self) -> None:
        zero, name = self.weight.zero, self.names.zero
        if not self.row.zero:
            self.absent(name, zero, self.when)
        elif zero is not None:
            self.present(name, zero, self.when, (torch.uint8,))
            self.shaped(name, zero, tuple(self.weight.scale.shape), f"that of {self.names.scale}")


def packed(op: str, row: Format, weight: PackedWeight, names: Names) -> None:
    """Raises RuntimeError, headed by `op`, unless `weight` is what its format takes."""
    check = _Check(op, row, weight, names)
    if row.bits is None:
        for name, t in zip(names[1:4], weight[1:4], strict=True):
            check.absent(name, t, check.when)
        check.require(
            not weight.transposed, lambda: f"{names.transposed} must be False {check.when}, got True"
        )
        return
    check.codes()
    check.scale()
    check.scale2()
    check.zero()
