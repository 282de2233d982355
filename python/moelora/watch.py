"""Whether training reaches an adapter: gradients are seen where autograd leaves them."""

from __future__ import annotations

import weakref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Watch:
    """Remembers whether a gradient other than zero has reached any of an adapter's parameters.

    It lives beside the model and not in it: a copy of a watch, pickled or deep, is a fresh one.
    """

    def __init__(self) -> None:
        self._seen: bool | Tensor = False
        self._followed: list[tuple[weakref.ref, RemovableHandle]] = []

    def follow(self, *parameters: nn.Parameter) -> None:
        """Watch these parameters too, once each; frozen ones are left alone."""
        alive = [(reference, handle) for reference, handle in self._followed if reference() is not None]
        if not alive:
            self._seen = False  # an adapter of the same name was deleted
        for parameter in parameters:
            if parameter.requires_grad and not any(reference() is parameter for reference, _ in alive):
                handle = parameter.register_post_accumulate_grad_hook(self._look)
                alive.append((weakref.ref(parameter), handle))
        self._followed = alive

    def stop(self) -> None:
        """Leave the parameters alone again."""
        for _, handle in self._followed:
            handle.remove()
        self._followed.clear()

    @property
    def seen(self) -> bool:
        return bool(self._seen)

    def _look(self, parameter: nn.Parameter) -> None:
        if self._seen is True:
            return
        found = nonzero(parameter.grad)
        # On an accelerator the answer stays there: reading it would wait for the whole backward.
        self._seen = found | self._seen if found.device.type != "cpu" else bool(found)

    def __reduce__(self) -> tuple:
        return Watch, ()


def nonzero(gradient: Tensor) -> Tensor:
    """Whether any element of this rank's part of a gradient is not zero, as a 0-d bool tensor."""
    return getattr(gradient, "to_local", lambda: gradient)().any()
