"""Experts that every token takes, where a block has them: the accelerator's while the host is at work.

A block calls them before its routed experts, and the router is behind them. Or behind those, with what it was
given itself: then they are launched when the rows are on their way to the host, and the block's call is given
the result. In a backward either kind comes before the routed ones, whose gradients are on the way.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("shared_expert", "shared_experts", "shared_mlp")
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)


class Shared:
    """The forward of a block's shared experts `module`.

    like: the module, the routed experts or the block, whose first argument they are called with behind the
    routed experts; None if they are called before.
    """

    def __init__(self, module: nn.Module, like: nn.Module | None) -> None:
        self.module, self.plain = module, module.forward
        self._own = vars(module).get("forward")  # accelerate's, perhaps
        self._now = threading.local()  # given, kept, number: of this thread's pass of the block
        self._handle = None if like is None else like.register_forward_pre_hook(self._begin)
        module.forward = self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_now"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _now=threading.local())

    def release(self) -> None:
        """Gives the module its forward back."""
        if self._handle is not None:
            self._handle.remove()
        if vars(self.module).get("forward") is self:
            del self.module.forward
            if self._own is not None:
                self.module.forward = self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        given, found = vars(self._now).pop("kept", (None, None))
        if given is not None and len(args) == 1 and args[0] is given and not kwargs:
            return found
        x = args[0] if args else None
        if self._handle is None and isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            self._now.number = x.view_as(x).grad_fn._sequence_nr()
        return self.plain(*args, **kwargs)

    def _begin(self, _: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling():
            self.forget()
            self._now.given = weakref.ref(args[0]) if args else None

    def forget(self) -> None:
        """Nothing is kept of a pass that came to no end."""
        vars(self._now).clear()

    def launch(self, grad: bool) -> None:
        """Runs them now, if the block will ask for it. grad: whether the block's pass is differentiated.

        Hooks of the module itself have a claim to come when the block calls it, and so has a forward that
        somebody else has put in this one's place.
        """
        given = vars(self._now).pop("given", None)
        given = None if given is None else given()
        asked = vars(self.module).get("forward") is self and not any(getattr(self.module, h) for h in _HOOKS)
        if asked and isinstance(given, Tensor):
            with torch.set_grad_enabled(grad):
                self._now.kept = (given, self.plain(given))

    def number(self) -> int | None:
        """In autograd's order the last before theirs, if they were called before the routed experts."""
        return vars(self._now).pop("number", None)


def shared_of(block: nn.Module, name: str, experts: nn.Module) -> Shared | None:
    """The shared experts beside `experts`, which `block` has as `name`: None where its forward shows none."""
    for other in NAMES:
        module = getattr(block, other, None)
        calls = _calls(type(block), name, other) if isinstance(module, nn.Module) else None
        if calls is None:
            continue
        if isinstance(vars(module).get("forward"), Shared):
            return module.forward
        routed, theirs = calls
        if len(theirs.args) != 1 or theirs.keywords or not isinstance(theirs.args[0], ast.Name):
            continue  # more than what somebody was given, or made of it
        if (theirs.lineno, theirs.col_offset) < (routed.lineno, routed.col_offset):
            return Shared(module, None)
        same = bool(routed.args and theirs.args) and ast.dump(routed.args[0]) == ast.dump(theirs.args[0])
        return Shared(module, experts if same else block)
    return None


def _calls(kind: type, *names: str) -> list[ast.Call] | None:
    """The first call of each of these submodules in a class' forward, None if it does not show them all."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, TypeError, SyntaxError):
        return None
    found: dict[str, ast.Call] = {}
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and ast.unparse(called.value) == "self":
            first = found.setdefault(called.attr, node)
            if (node.lineno, node.col_offset) < (first.lineno, first.col_offset):
                found[called.attr] = node
    return [found[name] for name in names] if found.keys() >= set(names) else None
