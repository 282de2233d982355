"""The two ways of a call: rows go to the weights, or the weights come to the rows. Forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelora.experts import Compute
from moelora.placement.beside.hot import BIASES, FACTORS, WEIGHTS, Hot
from moelora.placement.beside.link import Arrival, Link
from moelora.placement.beside.resident import Resident
from moelora.placement.beside.shared import Shared
from moelora.placement.beside.shares import Kept, Share, as_on

Tensors = dict[str, Tensor]
Gradients = dict[str | int, Tensor | None]
HOT = "hot "  # before the names of what is lent, among those of gradients


@dataclass
class Call:
    """One forward of a layer."""

    link: Link
    compute: Compute
    rest: dict[str, Any]  # `moe_mlp`'s arguments that are no tensors
    names: list[str]  # of those that are, all on the host
    lent: list[str]  # and then of those on the accelerator: factors of hot experts
    others: list[Tensor]  # leaves that `compute` reads itself
    hot: Hot | None  # experts that are on the accelerator too
    resident: Resident | None  # where the weights are brought; None: rows go to the host
    index: int  # of the layer there
    shared: Shared | None = None  # the block's own, which the accelerator computes meanwhile
    grad: bool = field(default_factory=torch.is_grad_enabled)  # of the block's pass
    threads: int = field(default_factory=torch.get_num_threads)  # of the host's share
    shares: tuple[Share, ...] = ()  # what the backward follows
    left: dict[int, Arrival] = field(default_factory=dict)  # gradients ahead of their backward, by its pass
    kept: tuple[Kept, ...] = ()  # what it reads, if hooks save it: of the accelerator's share, the host's

    def forward(
        self, x: Tensor, ids: Tensor, gates: Tensor, tensors: list[Tensor], needed: set[str]
    ) -> Tensor:
        """[T, H] on x's device."""
        if Kept.wanted() and (needed or self.others):
            self.kept = (Kept(), Kept())
        given = dict(zip(self.names, tensors[: len(self.names)], strict=True))
        lent = dict(zip(self.lent, tensors[len(self.names) :], strict=True))
        way = self._visit if self.resident is None else self._bring
        return way(x, ids, gates, given, lent, needed)

    def _visit(
        self, x: Tensor, ids: Tensor, gates: Tensor, given: Tensors, lent: Tensors, needed: set[str]
    ) -> Tensor:
        """The host computes its experts while the accelerator's are launched."""
        hot, link, kept = self.hot, self.link, bool(needed or self.others)
        rest = self.rest | ({"sum_fp32": True} if hot else {})
        with link.fetch(x, gates, ids) as arrival:

            def here() -> Share:
                # Page-locked memory is soon somebody else's; what the backward reads is not.
                x_here, gates_here, ids_here = (t.clone() if kept else t for t in arrival.wait())
                ids_here = hot.elsewhere(ids_here) if hot else ids_here
                inputs = {"x": x_here, "gates": gates_here} | given
                with self._keeping(1):
                    return as_on(
                        x.device, lambda: Share(self.compute, inputs, ids_here, rest, needed, self.others)
                    )

            def there() -> Share | None:
                first = self._hot(x, ids, gates, lent, needed) if hot else None
                if self.shared is not None:
                    self.shared.launch(self.grad)
                return first

            first, share = link.worker.both(there, here, self.threads) if hot else (there(), here())
            out = link.send(share.out)
        if kept:
            self.shares = (share,) if first is None else (first, share)
        if first is None:
            return out
        total = first.out + out
        return total if self.rest.get("sum_fp32") else total.to(_result_dtype(x))

    def _hot(self, x: Tensor, ids: Tensor, gates: Tensor, lent: Tensors, needed: set[str]) -> Share:
        rest = (
            {n: v for n, v in self.rest.items() if n not in WEIGHTS} | self.hot.weights | {"sum_fp32": True}
        )
        needed = needed & {"x", "gates"} | {name for name in lent if HOT + name in needed}
        with self._keeping(0):
            return Share(self.compute, {"x": x, "gates": gates} | lent, self.hot.here(ids), rest, needed)

    def _keeping(self, which: int) -> AbstractContextManager:
        return self.kept[which].hooks() if self.kept else nullcontext()

    def _bring(
        self, x: Tensor, ids: Tensor, gates: Tensor, given: Tensors, lent: Tensors, needed: set[str]
    ) -> Tensor:
        sent = {n: self.link.send(given[n]) for n in FACTORS + BIASES if n in given}
        for name, t in lent.items():
            sent[name].index_copy_(0, self.hot.rows, t.detach())
        inputs = {"x": x, "gates": gates} | sent
        needed = needed | {name for name in lent if HOT + name in needed}
        with self.resident.layer(self.index, bool(needed)) as weights:
            rest = {n: v for n, v in self.rest.items() if n not in WEIGHTS} | weights
            with self._keeping(0), self.resident.saved(self.index) if needed else nullcontext():
                share = Share(self.compute, inputs, ids, rest, needed)
        if needed:
            self.shares = (share,)
        return share.out

    def taken(self) -> list[Tensor]:
        """What autograd is to save, with whatever hooks there are."""
        return [t for kept in self.kept for t in kept.take()]

    def backward(self, dy: Tensor, saved: Callable[[], Sequence[Tensor]]) -> Gradients:
        """By the names of what needs one: of x and gates on the accelerator, of all else on the host.
        x's may be in float32, which autograd rounds.

        saved: returns what `taken` did.
        """
        if not self.shares:
            raise RuntimeError(
                "experts beside an accelerator: this backward is a second one, and the first has freed what "
                "it needs (retain_graph=True keeps it)"
            )
        retain = torch._C._autograd._get_current_graph_task_keep_graph()
        shares, self.shares = self.shares, self.shares if retain else ()
        again = iter(saved() if self.kept else ())
        for kept in self.kept:
            kept.give(list(islice(again, len(kept))))
        try:
            if self.resident is not None:
                return self._bring_backward(dy, shares[0], retain)
            return self._visit_backward(dy, shares, retain)
        finally:
            self.taken()

    def leaves(self, dy: Tensor) -> None:
        """The sum's gradient goes to the host; what autograd has launched until the backward is beside it."""
        if self.resident is None:
            self.left[torch._C._current_graph_task_id()] = self.link.fetch(dy)

    def _visit_backward(self, dy: Tensor, shares: tuple[Share, ...], retain: bool) -> Gradients:
        link, host = self.link, shares[-1]
        with self.left.pop(torch._C._current_graph_task_id(), None) or link.fetch(dy) as arrival:

            def there() -> Gradients:
                return shares[0].gradients(dy, retain)

            def here() -> Gradients:
                return host.gradients(arrival.wait()[0], retain)

            if not self.hot:
                found = here()
            else:
                first, found = link.worker.both(there, here, self.threads, host.apart)
                found |= {HOT + name: first.get(name) for name in self.lent}
        for name in ("x", "gates"):
            if found.get(name) is not None:
                second = link.send(found[name])
                # Of x in float32, which autograd rounds; a gate has a gradient in one of the places only.
                found[name] = first[name] + second if self.hot else second
        return found

    def _bring_backward(self, dy: Tensor, share: Share, retain: bool) -> Gradients:
        with self.resident.layer(self.index, True):
            found = share.gradients(dy, retain)
        lent = {HOT + name: self._taken(found[name]) for name in self.lent if found.get(name) is not None}
        names = [name for name, t in found.items() if t is not None and name not in ("x", "gates")]
        with self.link.fetch(*(found[name] for name in names)) as arrival:
            return found | lent | {name: t.clone() for name, t in zip(names, arrival.wait(), strict=True)}

    def _taken(self, gradient: Tensor) -> Tensor:
        """The hot experts' part of a gradient, which is taken out of it."""
        found = gradient.index_select(0, self.hot.rows)
        gradient.index_fill_(0, self.hot.rows, 0)
        return found


def _result_dtype(x: Tensor) -> torch.dtype:
    """A single place's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Placed(torch.autograd.Function):
    """A call as one step of autograd, whose backward runs on the accelerator's thread: it launches what is
    the accelerator's while the worker computes what is the host's. Sums have one order, whoever is first.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, ids: Tensor, gates: Tensor, *tensors: Tensor) -> Tensor:
        ctx.call = call
        lent = [HOT + name for name in call.lent]
        ctx.names = ["", "x", "", "gates", *call.names, *lent, *range(len(call.others))]
        needed = {n for n, need in zip(ctx.names, ctx.needs_input_grad, strict=True) if need}
        own = {n for n in needed if isinstance(n, str)}
        out = call.forward(x, ids, gates, list(tensors[: len(call.names) + len(lent)]), own)
        ctx.save_for_backward(*call.taken())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.call.backward(dy, lambda: ctx.saved_tensors)
        wanted = zip(ctx.names, ctx.needs_input_grad, strict=True)
        return tuple(found.get(name) if need else None for name, need in wanted)


class _Leaving(torch.autograd.Function):
    """Before whatever else the gradient is for: it leaves for the host."""

    @staticmethod
    def forward(ctx: Any, call: Call, out: Tensor) -> Tensor:
        ctx.call = call
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        ctx.call.leaves(dy)
        return None, dy


def run(call: Call, x: Tensor, ids: Tensor, gates: Tensor, tensors: list[Tensor]) -> Tensor:
    """[T, H], with gradients for whoever needs one."""
    inputs = (x, gates, *tensors, *call.others)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        out = _Placed.apply(call, x, ids, gates, *tensors, *call.others)
        if call.shared is None:
            return out
        number = call.shared.number()
        if number is not None:  # autograd takes the highest first
            out.grad_fn._set_sequence_nr(number)
        return _Leaving.apply(call, out)
    call.others = []
    return call.forward(x, ids, gates, tensors, set())
