"""What comes before what, on streams and on the host: the only places where somebody waits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def mark(device: torch.device, stream: torch.Stream | None = None) -> torch.Event:
    """An event behind all that a stream, or the device's current one, has been given so far."""
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device) if stream is None else stream)
    return event


def after(stream: torch.Stream, event: torch.Event) -> None:
    """What the stream is given from now on comes after `event`; the host goes on."""
    stream.wait_event(event)


def wait(event: torch.Event) -> None:
    """The host waits for `event`, and for nothing that was given to the device behind it."""
    event.synchronize()


@contextlib.contextmanager
def for_all_calls() -> Iterator[None]:
    """What is made within outlives the call: in inference mode it would be of no use to those that train."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextlib.contextmanager
def on(stream: torch.Stream) -> Iterator[None]:
    """`with stream`, for one that threads share: torch keeps in the stream itself what was current before."""
    index, own = torch.accelerator.current_device_index(), torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(own)
        torch.accelerator.set_device_index(index)
