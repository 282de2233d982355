"""Whether training reaches an adapter: gradients are seen where autograd hands them over."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

_LOCK = threading.Lock()


class Watch:
    """Remembers whether a gradient other than zero has reached any of an adapter's parameters.

    Parameters are followed from the first `follow` on. What stands in a parameter's place for one forward (a
    view of FSDP1's flat parameter, what `torch.func.functional_call` was given) is followed in that forward.

    It lives beside the model and not in it: a copy of a watch, pickled or deep, is a fresh one.
    """

    def __init__(self) -> None:
        self._seen: bool | Tensor = False
        self._adapter: weakref.ref | None = None
        self._handles: list[RemovableHandle] = []
        self._passed = False  # a tensor that stood in a parameter's place was followed
        self.blind = False  # one could not be

    def follow(self, a: nn.Module, b: nn.Module, running: bool) -> None:
        """Watch what the adapter's linear layers hold now, each tensor once; frozen ones are left alone.

        `running`: a forward is about to use them, so tensors that autograd computed are the ones that count.
        """
        if self._adapter is None or self._adapter() is not a:  # an adapter of the same name was deleted
            self.stop()
            self._seen = self._passed = self.blind = False
            self._adapter = weakref.ref(a)
        if self._seen is True:
            return
        with _LOCK:
            self._handles = [handle for handle in self._handles if handle.hooks_dict_ref() is not None]
            for tensor in (*held(a), *held(b)):
                stays = isinstance(tensor, nn.Parameter)
                if tensor.requires_grad and (running or stays) and not self._follows(tensor):
                    self._add(tensor, stays)

    def _follows(self, tensor: Tensor) -> bool:
        # By its hooks and not by a reference: tensors with weak references cannot be swapped, as FSDP2's are.
        hooks = tensor._backward_hooks
        return hooks is not None and any(handle.hooks_dict_ref() is hooks for handle in self._handles)

    def _add(self, tensor: Tensor, stays: bool) -> None:
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            self.blind = True  # what comes back is wrapped too, and may have no value to look at
            return
        self._handles.append(tensor.register_hook(self._look))
        if not stays:
            self._passed = True
        elif tensor.is_leaf:  # FSDP2 calls these for what it puts into a shard's grad
            handle = tensor.register_post_accumulate_grad_hook(lambda parameter: self._look(parameter.grad))
            self._handles.append(handle)

    def stop(self) -> None:
        """Leave the parameters alone again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def seen(self) -> bool | None:
        """Whether a gradient came; None if one may have come unseen."""
        if bool(self._seen):
            return True
        if self.blind:
            return None
        alive = any(handle.hooks_dict_ref() is not None for handle in self._handles)
        return False if self._passed or alive else None

    def _look(self, gradient: Tensor | None) -> None:
        if self._seen is True or gradient is None:
            return
        if not has_values(gradient):
            self.blind = True
            return
        found = nonzero(gradient)
        with _LOCK:
            if found.device.type == "cpu":
                self._seen = bool(found) or self._seen
            else:  # the answer stays there: reading it would wait for the whole backward
                before = self._seen
                self._seen = found | (before.to(found.device) if isinstance(before, Tensor) else before)

    def __reduce__(self) -> tuple[Callable[[], Watch], tuple]:
        return Watch, ()


def held(factor: nn.Module) -> list[Tensor]:
    """The tensors behind one LoRA factor: its weight, or what a parametrization makes the weight of."""
    return [*factor.parameters(), *([factor.weight] if replaced(factor) else [])]


def replaced(factor: nn.Module) -> bool:
    """Whether something stands in the place of a LoRA factor's weight that is no parameter."""
    return not is_parametrized(factor, "weight") and not isinstance(factor.weight, nn.Parameter)


def nonzero(gradient: Tensor) -> Tensor:
    """Whether any element of this rank's part of a gradient is not zero, as a 0-d bool tensor."""
    return getattr(gradient, "to_local", lambda: gradient)().any()


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor can be looked at: those on the meta device and fake ones are shapes only."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
