"""Signals: SIGTERM and SIGINT end a run with a checkpoint, SIGUSR1 asks for one, at any time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetune_tiny import (
    adapter,
    arguments,  # noqa: F401  (a fixture)
    changed,
    model_dir,  # noqa: F401  (a fixture)
)
from model_tiny import one_thread  # noqa: F401  (autouse)
from moelora import checkpoints
from moelora.__main__ import main
from moelora.commands import directory, saving, signals


@pytest.fixture(autouse=True)
def interruptible():
    """Even where the caller ignores Ctrl-C, as nohup and `&` do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _send_in_step(monkeypatch, signum: int, step: int) -> None:
    real = saving.Watch.on_pre_optimizer_step

    def send(self, args, state, control, **kwargs):
        if state.global_step + 1 == step:
            os.kill(os.getpid(), signum)
        return real(self, args, state, control, **kwargs)

    monkeypatch.setattr(saving.Watch, "on_pre_optimizer_step", send)


@pytest.mark.parametrize("signum", signals.ENDING, ids=signals.name)
def test_end_finishes_the_step_and_writes_a_checkpoint(arguments, tmp_path, capsys, monkeypatch, signum):  # noqa: F811
    out = tmp_path / "out"
    whole = tmp_path / "whole"
    assert main(changed(arguments, output=whole, save_every=100)) == 0
    with monkeypatch.context() as patch:
        _send_in_step(patch, signum, 3)
        assert main(changed(arguments, save_every=100)) == 128 + signum
    told = capsys.readouterr().err
    name = signals.name(signum)
    assert f"moelora: {name}: finishing the step, then a checkpoint; once more ends at once" in told
    assert told.rstrip().endswith(
        f"interrupted by {name}: {out / 'checkpoint-3'} is complete; go on with: "
        f"python -m moelora finetune --resume --output {out}"
    )
    assert [path.name for path in out.iterdir() if path.name != ".moelora"] == ["checkpoint-3"]
    assert main(["finetune", "--resume", "--output", str(out)]) == 0
    expected = adapter(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter(out).items())


def test_save_writes_a_checkpoint_and_goes_on(arguments, tmp_path, capsys, monkeypatch):  # noqa: F811
    _send_in_step(monkeypatch, signal.SIGUSR1, 1)
    written = []
    real = directory.publish
    monkeypatch.setattr(
        directory, "publish", lambda out, name, write: written.append(name) or real(out, name, write)
    )
    assert main(changed(arguments, save_every=100, steps=3)) == 0
    assert written[:2] == ["checkpoint-1", "checkpoint-3"]
    assert "SIGUSR1: a checkpoint follows this step" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1], ids=signals.name)
def test_before_the_training(arguments, tmp_path, capsys, monkeypatch, signum):  # noqa: F811
    real = checkpoints.load

    def load(*args):
        os.kill(os.getpid(), signum)
        return real(*args)

    monkeypatch.setattr(checkpoints, "load", load)
    status = main(changed(arguments, steps=1))
    told = capsys.readouterr().err
    if signum == signal.SIGUSR1:
        assert status == 0 and "SIGUSR1: nothing to save now, going on" in told
    else:
        assert status == 143 and told.endswith(
            "moelora: interrupted by SIGTERM before the first checkpoint\n"
        )
        assert not (tmp_path / "out").exists()


def _python(code: str) -> subprocess.CompletedProcess:
    """Of the standard library only, hence quick."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_the_second_ends_at_once():
    run = _python(
        """
import os, signal
from moelora.commands import signals
with signals.handled(), signals.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    print("on", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not reached")
"""
    )
    assert run.returncode == -signal.SIGTERM and run.stdout == "on\n"


def test_forked_workers_end_by_default():
    run = _python(
        """
import os, signal, time
from moelora.commands import signals
with signals.handled(), signals.deferred():
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), signals.ending())
"""
    )
    assert run.stdout == f"{-signal.SIGTERM} None\n", run


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = [signal.getsignal(signum) for signum in (*signals.ENDING, signals.SAVING)]
    with signals.handled():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        with pytest.raises(signals.Stopped, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(signals.Stopped), signals.deferred():
            raise AssertionError("not reached")
    assert [signal.getsignal(signum) for signum in (*signals.ENDING, signals.SAVING)] == before


def _caught(process: subprocess.Popen) -> bool:
    """Whether the process has its handler."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_at_the_very_start(arguments):  # noqa: F811
    """Before the libraries are there, which take seconds."""
    command = [sys.executable, "-m", "moelora", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not _caught(process) and process.poll() is None:
            time.sleep(0.002)
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert "SIGUSR1: nothing to save now" in errors
    assert "\nmoelora: interrupted by SIGTERM" in errors and "Traceback" not in errors
