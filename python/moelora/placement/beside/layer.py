"""A layer whose experts are in host memory while its tokens are on an accelerator."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from moelora import weights
from moelora.experts import POST_NORM, Compute, projections
from moelora.placement.beside import rates as rule
from moelora.placement.beside import ways
from moelora.placement.beside.hot import BIASES, WEIGHTS, Hot, Lent
from moelora.placement.beside.link import Link, link_of
from moelora.placement.beside.order import after, for_all_calls, mark
from moelora.placement.beside.resident import Load, Resident
from moelora.placement.beside.shared import Shared
from torch_moelora.formats import PackedWeight

WAYS = ("auto", "compute", "bring")
IDLE = ", not in use: their LoRA is not there. Call moelora.enable(model), unless it is parametrized"


class Neighbours:
    """A model's layers in the order in which they run, and the buffers that they share on each device."""

    def __init__(self) -> None:
        self.layers: list[Beside] = []
        self.way, self.rates = "auto", None  # the rule's choice and what is measured, unless somebody says
        self._resident: dict[torch.device, Resident] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "way": self.way, "rates": self.rates}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has buffers of its own."""
        vars(self).update(state, _resident={}, _lock=threading.Lock())

    def resident(self, link: Link) -> Resident:
        """The buffers on the link's device. Raises: ValueError for weights that cannot be brought."""
        with self._lock:
            if link.device not in self._resident:
                loads = [Load.of(layer.stored()) for layer in self.layers]
                self._resident[link.device] = Resident(link, loads)
            return self._resident[link.device]

    def changed(self, layer: Beside) -> None:
        """A layer's weights are others now."""
        with self._lock:
            for resident in self._resident.values():
                resident.replace(layer.index, Load.of(layer.stored()))


class Beside:
    """The placement of one layer: its experts on the host, some of them perhaps on the accelerator too.

    A token's sum is made of the accelerator's share and the host's, added in this order in float32 and
    rounded once. With tokens on the host it does nothing.
    """

    def __init__(self, module: nn.Module, experts: int, together: Neighbours) -> None:
        self.module, self.experts, self.together = module, experts, together
        self.index = len(together.layers)
        together.layers.append(self)
        self.ids: list[int] = []  # of the hot experts
        self.device: torch.device | None = None  # of the tokens that came last
        self.rates: rule.Rates | None = None
        self.counts: Tensor | None = None  # [E], while the choices of experts are counted
        self.reason: str | None = None  # why all of it stays on the host
        self._elsewhere = False  # whether the hot ones' LoRA is not there, so that they are not used
        self.shared: Shared | None = None  # the block's own
        self._top_k = 0
        self._hot: Hot | None = None
        self._copied: torch.Event | None = None  # when its copies are there
        self._key: tuple | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("_lock", "_hot", "_copied", "_key")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's hot experts are copied anew, from its own weights."""
        vars(self).update(state, _lock=threading.Lock(), _hot=None, _copied=None, _key=None)

    def sum(
        self, x: Tensor, ids: Tensor, gates: Tensor, parameters: dict[str, Any], compute: Compute
    ) -> Tensor:
        """As `experts.Placement` says. Raises what the host's part raises, in the call that it belongs to."""
        if self.counts is not None:
            kept = ids[(ids >= 0) & (ids < self.experts)].flatten().cpu()
            self.counts += torch.bincount(kept, minlength=self.experts)
        parameters, lent = Lent.of(parameters)
        if x.device == parameters["down_weight"].device or x.device.type in ("cpu", "meta"):
            return compute(x, ids, gates, lent.joined(parameters))
        return self._sum(x, ids, gates, parameters, lent, compute)

    @torch.compiler.disable(reason="experts in host memory are beside the graph of the accelerator")
    def _sum(
        self,
        x: Tensor,
        ids: Tensor,
        gates: Tensor,
        parameters: dict[str, Any],
        lent: Lent,
        compute: Compute,
    ) -> Tensor:
        self.device, self._top_k = x.device, ids.shape[1]
        link = link_of(x.device)
        self._follow(parameters)
        movable = self._movable(parameters)
        self._elsewhere = bool(self.ids) and not lent.complete(parameters, self.ids, x.device)
        hot = self._hot_on(x.device, parameters) if movable and self.ids and not self._elsewhere else None
        if hot is None:
            parameters, lent = lent.joined(parameters), Lent()
        call = ways.Call(
            link=link,
            compute=compute,
            rest={n: v for n, v in parameters.items() if not isinstance(v, Tensor)},
            names=[n for n, v in parameters.items() if isinstance(v, Tensor)],
            others=[p for p in self._others() if p.requires_grad],
            lent=list(lent.factors),
            hot=hot,
            resident=self._resident_for(link, x, ids, parameters, compute) if movable else None,
            index=self.index,
            shared=self.shared,
        )
        tensors = [*(parameters[name] for name in call.names), *lent.factors.values()]
        return ways.run(call, x, ids, gates, tensors)

    def stored(self) -> dict[str, Tensor | PackedWeight]:
        """The weights as they are in host memory, by `moe_mlp`'s names for them."""
        names = zip(WEIGHTS, projections(self.module), strict=True)
        return {
            argument: weights.oriented(self.module, weights.weight_of(self.module, name))
            for argument, name in names
        }

    def _others(self) -> list[nn.Parameter]:
        """Parameters of the module that are not its projections': of a gate or a norm of its own."""
        known = {part for name in projections(self.module) for part in (*weights.parts(name), f"{name}_bias")}
        return [p for name, p in self.module.named_parameters() if name not in known]

    def _movable(self, parameters: dict[str, Any]) -> bool:
        """Whether another device than the host can compute some of it, with copies of frozen weights."""
        frozen = not any(
            isinstance(parameters.get(n), Tensor) and parameters[n].requires_grad for n in WEIGHTS + BIASES
        )
        own = parameters.get("activation") is not None or hasattr(self.module, POST_NORM)
        stays = own and (self._others() or any(True for _ in self.module.buffers()))
        self.reason = "its gate or norm is here" if stays else None if frozen else "its weights are trained"
        return self.reason is None

    def _follow(self, parameters: dict[str, Any]) -> None:
        """Copies are made anew where weights have changed, by a merge or a load."""
        key = tuple(
            (t.data_ptr(), 0 if t.is_inference() else t._version)
            for name in WEIGHTS + BIASES
            if (weight := parameters.get(name)) is not None
            for t in (weight.tensors if isinstance(weight, PackedWeight) else (weight,))
        )
        with self._lock:
            if key == self._key:
                return
            before, self._key, self._hot = self._key, key, None
        if before is not None:
            self.together.changed(self)

    def _hot_on(self, device: torch.device, parameters: dict[str, Any]) -> Hot:
        with self._lock:
            if self._hot is None:
                with for_all_calls():
                    self._hot = Hot(self.ids, self.experts, parameters, device)
                self._copied = mark(device)
            stream = torch.accelerator.current_stream(device)  # perhaps not the one of the copies
            after(stream, self._copied)
            self._hot.used_on(stream)
            return self._hot

    def forget(self) -> None:
        """Makes copies anew: the weights have changed in a way that tensors do not tell."""
        with self._lock:
            self._hot = None
        self.together.changed(self)

    def keep(self, ids: list[int], device: torch.device | None) -> None:
        """Lets these experts be on `device`, and no others."""
        with self._lock:
            self.ids, self._hot = sorted(ids), None
            self.device = self.device or device

    def _resident_for(
        self, link: Link, x: Tensor, ids: Tensor, parameters: dict[str, Any], compute: Compute
    ) -> Resident | None:
        """The buffers that this call's weights are to be brought into, or None to compute on the host."""
        way = self.together.way
        if way == "auto":
            rates = self._measured(link, compute, parameters, x.dtype)
            way = rule.better(x.shape[0], ids.shape[1], rule.Size.of(parameters), rates)
        if way != "bring":
            return None
        try:
            return self.together.resident(link)
        except ValueError as error:
            self.reason = str(error)
            return None

    def _measured(self, link: Link, compute: Compute, parameters: dict[str, Any], dtype: Any) -> rule.Rates:
        """Of the first layer of its kind, once."""
        if self.together.rates is not None:
            self.rates = self.together.rates
        if self.rates is None:
            with self.together._lock:
                size = rule.Size.of(parameters)
                alike = (o for o in self.together.layers if o.rates and rule.Size.of(o.stored()) == size)
                found = next(alike, None)
                self.rates = found.rates if found else rule.measure(link, compute, parameters, dtype)
        return self.rates

    def __str__(self) -> str:
        told = f"on {self.stored()['down_weight'].device} beside {self.device or 'an accelerator'}"
        notes = [f"{len(self.ids)} of them there{IDLE if self._elsewhere else ''}"] if self.ids else []
        if self.reason:
            notes.append(f"computed on the host: {self.reason}")
        elif self.together.way != "auto":
            notes.append({"compute": "computed on the host", "bring": "brought over"}[self.together.way])
        elif self.rates is None:
            notes.append("rates not measured yet")
        else:
            tokens = rule.turning_point(self._top_k, rule.Size.of(self.stored()), self.rates)
            notes.append("never brought over" if tokens is None else f"brought over from {tokens} tokens")
            notes.append(str(self.rates))
        return f"{told} ({'; '.join(notes)})"
