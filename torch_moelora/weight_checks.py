"""Checks of a packed weight, from its format's row of `formats.FORMATS`: for the operators, where the
arguments are called weight, weight_scale, …, and for `formats`, where they are fields of a tuple. One
wording for both, and for csrc/ops. Nothing here reads a tensor's contents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """`torch._check`, which takes its time also where nothing is symbolic and all is well."""
    if condition is not True:
        torch._check(condition, message)


def text(sizes: Iterable) -> str:
    """As messages print shapes: `[4, 8]`."""
    return "[" + ", ".join(str(d) for d in sizes) + "]"


def either(names: Iterable) -> str:
    """`a, b or c`."""
    *most, last = (str(name) for name in names)
    return f"{', '.join(most)} or {last}" if most else last


class _Check(NamedTuple):
    """The checks of one weight; `op` heads every message."""

    op: str
    row: Format
    weight: PackedWeight
    names: Names

    def require(self, condition: bool, message: Callable[[], str]) -> None:
        require(condition, lambda: f"{self.op}: {message()}")

    @property
    def when(self) -> str:
        return f"when {self.names.format} is {self.row.name}"

    @property
    def letters(self) -> tuple[str, str]:
        """What rows and columns of the stored matrix are."""
        return ("K", "N") if self.weight.transposed else ("N", "K")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, rows and columns as stored."""
        e, rows, columns = self.weight.codes.shape
        return e, rows, columns * self.row.per_byte

    def absent(self, name: str, t: Tensor | None, why: str) -> None:
        self.require(t is None, lambda: f"{name} must be None {why}, got shape {text(t.shape)}")

    def present(self, name: str, t: Tensor | None, why: str) -> None:
        """There, and on the device of the codes."""
        self.require(t is not None, lambda: f"{name} must be given {why}, got None")
        where = self.weight.codes.device
        self.require(
            t.device == where,
            lambda: f"{name} must be on device {where} (that of {self.names.codes}), got {t.device}",
        )

    def shaped(self, name: str, t: Tensor, expected: tuple, why: str) -> None:
        def message() -> str:
            return f"{name} must have shape {text(expected)} ({why}), got {text(t.shape)}"

        self.require(t.dim() == len(expected), message)
        for size, want in zip(t.shape, expected, strict=True):
            self.require(size == want, message)

    def codes(self, experts: int | None) -> None:
        codes, name, row = self.weight.codes, self.names.codes, self.row
        letters = ", ".join(self.letters) + ("/2" if row.per_byte == 2 else "")
        self.require(
            codes.dim() == 3,
            lambda: f"{name} must be a 3-D tensor [E, {letters}], got shape {text(codes.shape)}",
        )
        self.require(
            codes.dtype == row.storage,
            lambda: f"{name} must have dtype {row.storage} {self.when}, got {codes.dtype}",
        )
        self.require(
            experts is None or codes.shape[0] == experts,
            lambda: (
                f"{name} must have {experts} experts (the length of expert_offsets), "
                f"got shape {text(codes.shape)}"
            ),
        )
        for size in codes.shape[1:]:
            self.require(
                size >= 1, lambda: f"{name} must have N and K of at least 1, got shape {text(codes.shape)}"
            )
        self.require(
            codes.shape[2] == 1 or codes.stride(2) == 1,
            lambda: f"{name} must have a last stride of 1 {self.when}, got {codes.stride(2)}",
        )

    def scale(self) -> None:
        scale, name, dtypes = self.weight.scale, self.names.scale, self.row.scale_dtypes
        self.present(name, scale, self.when)
        self.require(
            scale.dtype in dtypes,
            lambda: f"{name} must have dtype {either(dtypes)} {self.when}, got {scale.dtype}",
        )
        e, rows, columns = self.sizes
        if self.row.groups.kind == "grid":
            self.grid(e, rows, columns)
            return
        down, along = self.letters
        group = self.group(columns, along)
        why = f"E={e}, {down}={rows}, {along}/{group}"
        self.shaped(name, scale, (e, rows, columns // group), why)

    def group(self, columns: int, letter: str) -> int:
        """G of a weight whose rows have `columns` numbers."""
        scale, groups = self.weight.scale, self.row.groups
        if groups.kind == "fixed":
            self.require(
                columns % groups.least == 0,
                lambda: (
                    f"{self.names.codes} must have {letter} that is a multiple of {groups.least} "
                    f"{self.when}, got {letter}={columns}"
                ),
            )
            return groups.least
        parts = scale.shape[2] if scale.dim() == 3 else 0
        group = columns // parts if parts >= 1 and columns % parts == 0 else 0
        rule = {"power": "a power of two, at least", "multiple": "all or of a multiple of"}[groups.kind]
        self.require(
            groups.allow(group, columns),
            lambda: (
                f"{self.names.scale} must have a last size that divides {letter}={columns} into groups of "
                f"{rule} {groups.least} {self.when}, got shape {text(scale.shape)}"
            ),
        )
        return group

    def grid(self, e: int, rows: int, columns: int) -> None:
        scale, name, block = self.weight.scale, self.names.scale, self.row.groups.least
        down, along = (rows, -(-rows // block), 1), (-(-columns // block), 1)

        def message() -> str:
            r, c = (" or ".join(map(str, sizes)) for sizes in (down, along))
            letters = self.letters
            return (
                f"{name} must have shape [{e}, {r}, {c}] ({letters[0]}={rows}, {letters[1]}={columns} "
                f"in tiles of {block}), got {text(scale.shape)}"
            )

        self.require(scale.dim() == 3, message)
        self.require(scale.shape[0] == e, message)
        self.require(any(scale.shape[1] == size for size in down), message)
        self.require(any(scale.shape[2] == size for size in along), message)

    def scale2(self) -> None:
        scale, scale2, name = self.weight.scale, self.weight.scale2, self.names.scale2
        nested = self.row.nested and scale.dtype == torch.uint8
        if not nested and self.row.scale2 == "":
            why = f"when {self.names.scale} has dtype {scale.dtype}" if self.row.nested else self.when
            self.absent(name, scale2, why)
            return
        why = f"when {self.names.scale} has dtype torch.uint8" if nested else self.when
        self.present(name, scale2, why)
        self.require(
            scale2.dtype == torch.float32,
            lambda: f"{name} must have dtype torch.float32, got {scale2.dtype}",
        )
        if nested:
            count = scale.numel()
            self.shaped(name, scale2, (-(-count // RUN), 2), f"one for {RUN} of {count} scales")
        else:
            self.parts(name, scale2)

    def parts(self, name: str, scale2: Tensor) -> None:
        e, rows, _ = self.sizes

        def message() -> str:
            want = f"[{e}, P] with P that divides {self.letters[0]}={rows}"
            return f"{name} must have shape {want}, got {text(scale2.shape)}"

        self.require(scale2.dim() == 2, message)
        self.require(scale2.shape[0] == e, message)
        self.require(scale2.shape[1] >= 1, message)
        self.require(rows % scale2.shape[1] == 0, message)

    def zero(self) -> None:
        zero, name = self.weight.zero, self.names.zero
        if not self.row.zero:
            self.absent(name, zero, self.when)
        elif zero is not None:
            self.present(name, zero, self.when)
            self.require(
                zero.dtype == torch.uint8,
                lambda: f"{name} must have dtype torch.uint8, got {zero.dtype}",
            )
            self.shaped(name, zero, tuple(self.weight.scale.shape), f"that of {self.names.scale}")


def packed(
    op: str, row: Format, weight: PackedWeight, names: Names = FIELDS, experts: int | None = None
) -> None:
    """Raises RuntimeError, headed by `op`, unless `weight` is what its format takes, with `experts` experts.
    Of a dense one the tensor itself is not looked at.
    """
    check = _Check(op, row, weight, names)
    if row.bits is None:
        for name, t in zip(names[1:4], weight[1:4], strict=True):
            check.absent(name, t, check.when)
        check.require(
            not weight.transposed, lambda: f"{names.transposed} must be False {check.when}, got True"
        )
        return
    check.codes(experts)
    check.scale()
    check.scale2()
    check.zero()
