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
    """The forward of a block's shared experts, which `block` has as `name`.

    like: the module, the routed experts or the block, whose first argument they are called with behind the
    routed experts; None if they are called before.
    """

    def __init__(self, block: nn.Module, name: str, like: nn.Module | None) -> None:
        self.module, self.name, self.first = getattr(block, name), name, like is None
        self._own = vars(self.module).get("forward")  # accelerate's, perhaps
        self._now = threading.local()  # block, given, kept, number: of this thread's pass of the block
        self._handles = [
            block.register_forward_pre_hook(self._begin),
            block.register_forward_hook(self._end, always_call=True),
        ]
        if like not in (None, block):
            self._handles.append(like.register_forward_pre_hook(self._give))
        self.module.forward = self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_now"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _now=threading.local())

    def release(self) -> None:
        """Gives the module its forward back."""
        for handle in self._handles:
            handle.remove()
        if vars(self.module).get("forward") is self:
            del self.module.forward
            if self._own is not None:
                self.module.forward = self._own

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """Their own forward."""
        if self._own is not None:
            return self._own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        given, found = vars(self._now).pop("kept", (None, None))
        if given is not None and len(args) == 1 and args[0] is given and not kwargs:
            return found
        x = args[0] if args else None
        if self.first and isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            self._now.number = x.view_as(x).grad_fn._sequence_nr()
        return self.plain(*args, **kwargs)

    def _begin(self, block: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling():
            self._now.block = block
            self._give(block, args)

    def _give(self, _: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling():
            self._now.given = args[0] if args else None

    def _end(self, *_: Any) -> None:
        """Nothing is kept of a pass that is over, whatever became of it."""
        if not torch.compiler.is_compiling():
            vars(self._now).clear()

    def launch(self, grad: bool) -> None:
        """Runs them now, if the block will ask for it. grad: whether the block's pass is differentiated.

        Hooks of the module itself have a claim to come when the block calls it, and so has what somebody else
        has put in its place or its forward's.
        """
        block, given = (vars(self._now).get(name) for name in ("block", "given"))
        asked = getattr(block, self.name, None) is self.module and vars(self.module).get("forward") is self
        hooked = any(getattr(self.module, hooks) for hooks in _HOOKS)
        if asked and not self.first and not hooked and isinstance(given, Tensor):
            with torch.set_grad_enabled(grad):
                self._now.kept = (given, self.plain(given))

    def number(self) -> int | None:
        """In autograd's order the last before theirs, if they were called before the routed experts."""
        return vars(self._now).pop("number", None)


def shared_of(block: nn.Module, name: str, experts: nn.Module) -> Shared | None:
    """The shared experts beside `experts`, which `block` has as `name`: None where its forward shows none."""
    for other in NAMES:
        forward = _forward(type(block)) if isinstance(getattr(block, other, None), nn.Module) else None
        routed, theirs = (_call(forward, one) for one in (name, other)) if forward else (None, None)
        if routed is None or theirs is None:
            continue
        if _at(theirs) < _at(routed):
            return Shared(block, other, None)
        like = _whose(forward, routed, theirs)
        if like is not None:
            return Shared(block, other, {"experts": experts, "block": block}[like])
    return None


def _forward(kind: type) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, TypeError, SyntaxError):  # no source, or such that lines begin before the function does
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


def _at(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _call(forward: ast.FunctionDef, name: str) -> ast.Call | None:
    """The first call of a submodule."""
    calls = (node for node in ast.walk(forward) if isinstance(node, ast.Call))
    return min((call for call in calls if ast.unparse(call.func) == f"self.{name}"), key=_at, default=None)


def _whose(forward: ast.FunctionDef, routed: ast.Call, theirs: ast.Call) -> str | None:
    """Whose first argument they are given: that of the "experts" or of the "block"; None if it is neither."""
    if len(theirs.args) != 1 or theirs.keywords or not isinstance(theirs.args[0], ast.Name):
        return None  # more than what somebody was given, or made of it
    name, own = theirs.args[0].id, [argument.arg for argument in forward.args.args[1:2]]

    def bound(name: str, since: tuple[int, int], until: tuple[int, int]) -> list[ast.Assign]:
        """Where the name is given something else; at the end of a statement."""
        found = (node for node in ast.walk(forward) if isinstance(node, ast.Assign))
        stores = ((one, inner) for one in found for target in one.targets for inner in ast.walk(target))
        named = [one for one, inner in stores if isinstance(inner, ast.Name) and inner.id == name]
        return [one for one in named if since <= (one.end_lineno, one.end_col_offset) < until]

    if routed.args and ast.dump(routed.args[0]) == ast.dump(theirs.args[0]):
        return None if bound(name, _at(routed), _at(theirs)) else "experts"
    before = bound(name, (0, 0), _at(theirs))
    if name in own:
        return None if before else "block"
    value = before[0].value if len(before) == 1 else None
    alias = isinstance(value, ast.Name) and value.id in own
    return "block" if alias and not bound(own[0], (0, 0), _at(before[0])) else None
