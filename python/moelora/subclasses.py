"""An instance gets a subclass of its own class: its parameters, names and isinstance relations stay."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class Before(nn.Module):
    """What comes before the class of a module. Subclasses say what they do instead, or first."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, type(self).__bases__, self.__dict__


def put(before: type[Before], module: nn.Module) -> None:
    """Puts `before` in front of the module's class."""
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
