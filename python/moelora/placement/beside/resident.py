"""Whole layers brought over: two resident buffers on the accelerator, one in use and the next one filling.

Weights travel as they are stored, codes packed. Forward the next layer is on its way while one computes, in
the backward (recomputed layers too) the one before.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora.placement.beside.buffers import typed
from moelora.placement.beside.link import Link
from moelora.placement.beside.order import after, for_all_calls, mark, on
from torch_moelora.formats import PackedWeight

CHUNK = 16 << 20  # bytes that are staged at a time
ALIGNMENT = 256


class Part(NamedTuple):
    """One tensor of a layer's weights, and where it stands in a buffer."""

    tensor: Tensor  # contiguous
    start: int
    turned: bool  # the weight is its transpose


class Load(NamedTuple):
    """All that is to be brought of one layer: argument of `moe_mlp` → its parts, None for what it lacks."""

    parts: dict[str, tuple[Part | None, ...]]
    kinds: dict[str, tuple | None]  # of a packed weight: format and transposed
    nbytes: int

    @classmethod
    def of(cls, weights: dict[str, Tensor | PackedWeight]) -> Load:
        """Raises: ValueError, which ends a sentence, for a weight whose bytes do not stand together."""
        parts, kinds, end = {}, {}, 0
        for name, weight in weights.items():
            packed = isinstance(weight, PackedWeight)
            kinds[name] = weight[4:] if packed else None
            several: list[Part | None] = []
            for t in weight[:4] if packed else (weight,):
                if t is None:
                    several.append(None)
                    continue
                turned = not t.is_contiguous()
                t = t.detach().transpose(1, 2) if turned and t.ndim == 3 else t.detach()
                if not t.is_contiguous():
                    raise ValueError(f"{name} has strides {t.stride()}")
                several.append(Part(t, end, turned))
                end += -(-t.nbytes // ALIGNMENT) * ALIGNMENT
            parts[name] = tuple(several)
        return cls(parts, kinds, end)

    def views(self, buffer: Tensor) -> dict[str, Tensor | PackedWeight]:
        """The weights, in a buffer that has their bytes."""
        found = {}
        for name, several in self.parts.items():
            tensors = []
            for part in several:
                if part is None:
                    tensors.append(None)
                    continue
                t = typed(buffer[part.start :], part.tensor)
                tensors.append(t.transpose(1, 2) if part.turned else t)
            kind = self.kinds[name]
            found[name] = tensors[0] if kind is None else PackedWeight(*tensors, *kind)
        return found


class Slot:
    """One resident buffer."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.layer: int | None = None  # what is in it, or on its way
        self.users: list[int] = []  # threads whose calls compute with it just now
        self.used: list[torch.Event] = []  # what computes with it on the device
        self.arrived: Future | None = None  # → the event of its last copy


class Resident:
    """The two buffers of a model's layers on one device, and who is in them."""

    def __init__(self, link: Link, loads: list[Load]) -> None:
        self.link, self.loads = link, loads
        self.bytes_brought = 0
        self._slots: list[Slot] = []
        self._changed = threading.Condition()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="moelora-bring")

    @contextlib.contextmanager
    def layer(self, index: int, returns: bool) -> Iterator[dict[str, Tensor | PackedWeight]]:
        """The weights of a layer on the device, for launches within `with` on the current stream.

        The layer that will be asked for next is then on its way. returns: a backward follows.
        Raises what a copy raised.
        """
        with self._changed:
            slot = self._claim(index, wait=True)
            slot.users.append(threading.get_ident())
        try:
            after(torch.accelerator.current_stream(self.link.device), slot.arrived.result())
            with self._changed:
                following = self._following(index, returns)
                if following is not None:
                    self._claim(following, wait=False, beside=slot)
            yield self.loads[index].views(slot.buffer)
        finally:
            event = mark(self.link.device)
            with self._changed:
                slot.used.append(event)
                slot.users.remove(threading.get_ident())
                if slot.arrived.done() and slot.arrived.exception() is not None and not slot.users:
                    slot.layer = None  # to be tried again
                self._changed.notify_all()

    def replace(self, index: int, load: Load) -> None:
        """A layer's weights are others now: what was brought of it is brought again. Not within `layer`."""
        with self._changed:
            self.loads[index] = load
            for slot in self._slots:
                if slot.layer == index:
                    slot.layer = None

    def _following(self, index: int, returns: bool) -> int | None:
        """Which layer comes next: the one before in a backward, and round again where there is none."""
        if torch._C._current_graph_task_id() != -1:
            return index - 1 if index else None
        if index + 1 < len(self.loads):
            return index + 1
        return None if returns else 0

    def _claim(self, index: int, wait: bool, beside: Slot | None = None) -> Slot | None:
        """The slot that has the layer or will have it; None if there is none to take and not to `wait`."""
        self._allocate()
        while True:
            for slot in self._slots:
                if slot.layer == index:
                    return slot
            free = [slot for slot in self._slots if not slot.users and slot is not beside]
            if free or not wait:
                break
            if any(threading.get_ident() in slot.users for slot in self._slots):
                # A device's autograd thread takes up another thread's backward within one: no waiting.
                free = [self._allocate_one()]
                break
            self._changed.wait()
        if not free:
            return None
        # Of two free ones: that which does not have a neighbour of the layer.
        slot = max(free, key=lambda s: len(self.loads) if s.layer is None else abs(s.layer - index))
        self._fill(slot, index)
        return slot

    def _allocate(self) -> None:
        while len(self._slots) < 2:
            self._allocate_one()

    @for_all_calls()
    def _allocate_one(self) -> Slot:
        size = max(load.nbytes for load in self.loads)
        slot = Slot(torch.empty(size, dtype=torch.uint8, device=self.link.device))
        slot.used.append(mark(self.link.device))  # whoever had this memory before is done with it
        self._slots.append(slot)
        return slot

    def _fill(self, slot: Slot, index: int) -> None:
        slot.layer, used, slot.used = index, slot.used, []
        slot.arrived = self._worker.submit(self._bring, slot.buffer, self.loads[index], used)

    @torch.no_grad()
    def _bring(self, buffer: Tensor, load: Load, used: list[torch.Event]) -> torch.Event:
        """Sends the copies of a layer; on a thread of its own, since staging them takes the host's time."""
        inward = self.link.inward
        for event in used:
            after(inward, event)
        for several in load.parts.values():
            for part in several:
                if part is None:
                    continue
                source = part.tensor.view(-1).view(torch.uint8)
                target = buffer[part.start : part.start + source.numel()]
                for start in range(0, source.numel(), CHUNK):
                    self._copy(target[start : start + CHUNK], source[start : start + CHUNK])
        self.bytes_brought += load.nbytes
        return mark(self.link.device, inward)

    def _copy(self, to: Tensor, source: Tensor) -> None:
        inward = self.link.inward
        with on(inward):
            if source.is_pinned():
                to.copy_(source, non_blocking=True)
                return
            buffers = self.link.buffers
            staged = buffers.take(source.nbytes)
            try:
                typed(staged, source).copy_(source)
                to.copy_(typed(staged, source), non_blocking=True)
            finally:
                buffers.give(staged, mark(self.link.device, inward))

    def saved(self, index: int) -> Any:
        """Within `with`, what autograd saves of a layer's weights is where they stand, not what is there now:
        the backward reads them where the layer is then. All else goes the way it would have gone.
        """
        ambient = torch._C._autograd._top_saved_tensors_default_hooks(False)
        pack, unpack = ambient if ambient is not None else (lambda t: t, lambda t: t)
        with self._changed:
            (slot,) = (slot for slot in self._slots if slot.layer == index)
        storage = slot.buffer.untyped_storage().data_ptr()

        def place(t: Tensor) -> Any:
            if t.device == self.link.device and t.untyped_storage().data_ptr() == storage:
                return _Place(t.dtype, t.shape, t.stride(), t.storage_offset())
            return pack(t)

        def find(kept: Any) -> Tensor:
            if not isinstance(kept, _Place):
                return unpack(kept)
            with self._changed:
                (slot,) = (slot for slot in self._slots if slot.layer == index)
            whole = slot.buffer[: slot.buffer.numel() // 8 * 8].view(kept.dtype)
            return whole.as_strided(kept.shape, kept.stride, kept.offset)

        return torch.autograd.graph.saved_tensors_hooks(place, find)


class _Place(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
