"""An instance gets a subclass of its own class: its parameters, names and isinstance relations stay."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class Before(nn.Module):
    """A mixin that `put` has in front of a module's class. It overrides what that does, or adds to it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, type(self).__bases__, self.__dict__


def put(before: type[Before], module: nn.Module) -> None:
    """Gives the module a subclass of `before` and its own class, with the latter's name."""
    module.__class__ = _subclass(before, type(module))


def remove(module: Before) -> None:
    """Gives the module its own class back."""
    _, module.__class__ = type(module).__bases__


@cache
def _subclass(before: type[Before], kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (before, kind), {"__module__": kind.__module__})


def _new(before: type[Before], kind: type[nn.Module]) -> nn.Module:
    subclass = _subclass(before, kind)
    return subclass.__new__(subclass)
