"""What tests/test_placement.py checks in processes of their own: ranks that fail, and memory."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moelora
import pytest
import torch
from model_tiny import adapt, build, tokens
from moelora.errors import MoeloraError
from torch import Tensor, nn
from torch.utils.data import DataLoader

LATEST = 20.0  # seconds: the group's time-out is 5, and 5 more are for asking who is there


def _model() -> nn.Module:
    torch.manual_seed(4)
    model = adapt(build("qwen3_moe"))
    moelora.enable(model)
    moelora.place(model)
    return model


def _told(here: Any, model: nn.Module, told: str, backward: bool = False) -> None:
    """Whoever has not failed itself ends in time, and knows who did."""
    begun = time.monotonic()
    with pytest.raises(MoeloraError, match=told):
        loss = model(input_ids=tokens(2), labels=tokens(2)).loss
        if backward:
            loss.backward()
    assert time.monotonic() - begun < LATEST


def _lives_on(here: Any, name: str) -> None:
    """Until the others have found out: so long, this rank answers whoever asks for it."""
    others = [rank for rank in range(here.world) if rank != here.rank]
    files = [here.directory / f"{here.world}.{name}.{rank}.json" for rank in others]
    end = time.monotonic() + LATEST
    while not all(file.exists() for file in files) and time.monotonic() < end:
        time.sleep(0.05)


def killed(here: Any) -> None:
    model = _model()
    model(input_ids=tokens(2))
    if here.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _told(
        here,
        model,
        r"rank 1 did not come to the exchange.*rank 1 was last heard of in model\.layers\.1\.mlp\.experts, "
        r"forward\. Rank \d was in model\.layers\.0\.mlp\.experts, forward",
    )


def failing(here: Any) -> None:
    """One rank cannot compute its share in the second layer, and lives on."""
    model = _model()
    if here.rank != 1:
        _told(here, model, r"rank 1 failed in model\.layers\.1\.mlp\.experts, forward: ValueError: no more")
        return

    def activation(h: Tensor) -> Tensor:
        raise ValueError("no more")

    layers = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeExperts"]
    layers[1]._moelora.activation = {"activation": activation}
    with pytest.raises(ValueError, match="no more"):
        model(input_ids=tokens(2))
    _lives_on(here, "failing")


def failing_backward(here: Any) -> None:
    model = _model()
    if here.rank != 1:
        _told(
            here,
            model,
            r"rank 1 was last heard of in model\.layers\.1\.mlp\.experts, backward\. "
            r"Rank \d was in model\.layers\.0\.mlp\.experts, backward",
            True,
        )
        return

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            raise ValueError("no more")

    layer = model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda module, args, out: Failing.apply(out))
    with pytest.raises(ValueError, match="no more"):
        model(input_ids=tokens(2), labels=tokens(2)).loss.backward()
    _lives_on(here, "failing_backward")


class _Broken(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        raise ValueError("no more")


def _broken(*_: Any) -> None:
    raise ValueError("no more")


def _two_steps(here: Any, where: str) -> None:
    """Rank 1 has something broken beside its experts."""
    model, rows = _model(), [{"input_ids": row, "labels": row} for row in tokens(4)]
    broken = here.rank == 1 and where
    optimizer = (_Broken if broken == "optimizer" else torch.optim.SGD)(model.parameters(), lr=1e-3)
    if broken == "attention":
        model.get_base_model().model.layers[1].self_attn.register_forward_pre_hook(_broken)
    for number, batch in enumerate(DataLoader(rows, batch_size=2)):
        if broken == "dataloader" and number == 1:
            _broken()
        model(**batch).loss.backward()
        optimizer.step()


def _elsewhere(where: str, last: str, waits: str) -> Callable[[Any], None]:
    """Rank 1 ends with an error that is no expert layer's; the others know of it at once."""

    def check(here: Any) -> None:
        if here.rank == 1:
            return _two_steps(here, where)
        begun = time.monotonic()
        layer = r"model\.layers\.{}\.mlp\.experts, {}"
        told = (
            f"rank 1 ended after {layer.format(*last)} with ValueError: no more\\. "
            f"Rank {here.rank} was in {layer.format(*waits)}"
        )
        with pytest.raises(MoeloraError, match=told):
            _two_steps(here, "")
        assert time.monotonic() - begun < LATEST
        return None

    return check


raises_in_attention = _elsewhere("attention", (0, "forward"), (1, "forward"))
raises_in_dataloader = _elsewhere("dataloader", (0, "backward"), (0, "forward"))
raises_in_optimizer = _elsewhere("optimizer", (0, "backward"), (0, "forward"))


def _resident(*names: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.partition(":")[0] in names)


def memory(here: Any) -> None:
    """`from_pretrained` with owners never has more in memory than its experts and what it reads at once."""
    for name, private in (("large", 1.25), ("large packed", 1.25)):
        gc.collect()
        most, done = [0], threading.Event()
        before = _resident("RssAnon")

        def watch(most: list = most, done: threading.Event = done) -> None:
            while not done.wait(0.001):
                most[0] = max(most[0], _resident("RssAnon"))

        thread = threading.Thread(target=watch)
        thread.start()
        model = moelora.from_pretrained(here.directory / name, owners="spread")
        done.set()
        thread.join()
        own = sum(layer.nbytes for layer in moelora.report(model).layers)
        rest = sum(p.nbytes for n, p in model.named_parameters() if "experts" not in n)
        assert own > 5e6
        assert most[0] - before < private * own + rest + 4e6, (name, most[0] - before, own, rest)
        del model


def keeps_nothing(here: Any) -> None:
    """500 steps: the process has the memory that it had."""
    model = _model()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def steps(count: int) -> int:
        for _ in range(count):
            loss = model(input_ids=tokens(2), labels=tokens(2)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            model.zero_grad()
        gc.collect()
        if trim:
            trim(0)
        return _resident("RssAnon")

    before = steps(100)
    grown = steps(500) - before
    # torch.distributed keeps a record of its last calls; a message that stays is more in each step.
    assert grown < 500 * (12 << 10), f"{grown / 500:.0f} bytes a step"
