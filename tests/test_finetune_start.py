"""What a run does before its first step: little, whatever the size of the base. The rest goes on beside."""

from __future__ import annotations

import itertools
import mmap
import os
import sys
import threading
import time

import numpy
import psutil
import pytest
import torch
from checkpoint_tiny import CONFIGS
from finetune_tiny import (
    WEIGHTS,
    arguments,  # noqa: F401  (a fixture)
    changed,
    copy,
    fails,
    model_dir,  # noqa: F401  (a fixture)
)
from model_tiny import adapt, build, one_thread, tokens  # noqa: F401  (one_thread is autouse)
from moelora import MoeloraError
from moelora.__main__ import main
from moelora.commands import depth, fingerprints, finite, resuming, threads, training, vetting
from moelora.disk import sync
from moelora.experts import is_experts
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


@pytest.fixture
def slow(monkeypatch):
    """A base whose reading goes on when the given step begins, and the run waits for nothing before."""
    read, gate = finite.check_weight, threading.Event()
    monkeypatch.setattr(vetting, "PATIENCE", 0.0)

    def wait(*args):
        assert gate.wait(60)
        read(*args)

    monkeypatch.setattr(finite, "check_weight", wait)
    begin = training.Progress.on_step_begin

    def at(step: int) -> None:
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                gate.set()
            begin(self, args, state, control, **kwargs)

        monkeypatch.setattr(training.Progress, "on_step_begin", on_step_begin)

    yield at
    gate.set()


def test_the_training_does_not_wait_for_it(arguments, model_dir, tmp_path, slow):  # noqa: F811
    slow(2)
    assert main(changed(arguments, steps=3, save_every=2)) == 0
    facts = resuming.verify(tmp_path / "out" / "checkpoint-3")
    assert facts["made_from"]["base"] == fingerprints.base(model_dir, {}, {}, facts["stamps"])


def test_a_bad_base_stops_the_training_when_it_is_found(arguments, model_dir, tmp_path, capsys, slow):  # noqa: F811
    """A row of the embedding that no token of the data has."""
    name = "model.embed_tokens.weight"
    weight = load_file(model_dir / WEIGHTS)[name]
    weight[1, 2] = torch.nan
    directory = copy(model_dir, tmp_path / "m", **{name: weight})
    slow(3)
    given = changed(arguments, model=directory, steps=40, save_every=30)
    assert f"are not finite: {name} has 1 NaN among" in fails(given, capsys)
    assert not (tmp_path / "out" / "adapter").exists()


def test_reading_ends_with_the_run(model_dir):  # noqa: F811
    began, gate = threading.Event(), threading.Event()

    model = build("qwen3_moe")
    with pytest.raises(KeyboardInterrupt), vetting.Vetting() as vets, pytest.MonkeyPatch.context() as patch:

        def read(name, tensor, where, over):
            began.set()
            while not over():
                gate.wait(0.01)

        patch.setattr(finite, "check_weight", read)
        vets.start(model, model_dir, {})
        assert began.wait(60)
        raise KeyboardInterrupt
    assert not vets._thread.is_alive()
    with pytest.raises(MoeloraError, match="have not been read through"):
        vets.digests()


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_was_read_through_leaves_memory(tied, tmp_path):
    """2 MB of it, mapped; a head is needed as a whole."""
    if sys.platform != "linux":
        pytest.skip("MADV_PAGEOUT is Linux's")
    inside = [p for p in psutil.disk_partitions(all=True) if tmp_path.is_relative_to(p.mountpoint)]
    if max(inside, key=lambda p: len(p.mountpoint)).fstype in ("tmpfs", "ramfs"):
        pytest.skip("files are in memory here")
    table = torch.randn(1 << 13, 64)
    save_file({"table": table}, tmp_path / WEIGHTS)
    sync(tmp_path / WEIGHTS)  # pages that are not written yet stay
    model = torch.nn.Sequential(torch.nn.Embedding(1 << 13, 64), torch.nn.Linear(64, 1 << 13, bias=False))
    model[0].weight = torch.nn.Parameter(load_file(tmp_path / WEIGHTS)["table"])
    if tied:
        model[1].weight = model[0].weight
    with vetting.Vetting() as vets:
        vets.start(model, tmp_path, {})
        vets.digests()
        resident = _resident(model[0].weight)
    assert resident > 0.9 * table.nbytes if tied else resident < 0.2 * table.nbytes
    assert torch.equal(model[0].weight, table)


def _resident(tensor):
    """Bytes of the pages of a tensor that are in this process's page table."""
    page = mmap.PAGESIZE
    first, last = tensor.data_ptr() // page, (tensor.data_ptr() + tensor.nbytes) // page
    with open("/proc/self/pagemap", "rb") as pages:
        pages.seek(8 * first)
        entries = numpy.frombuffer(pages.read(8 * (last - first)), numpy.uint64)
    return page * int((entries >> numpy.uint64(63)).sum())


def test_what_is_measured_waits_for_the_reader(tmp_path, monkeypatch):
    """The thread that vets a base is not in the middle of a piece while threads are measured."""
    (tmp_path / "model.safetensors").write_bytes(b"x")
    reading, pieces = threading.Event(), []

    def read(path, ended):
        while not ended():
            reading.set()
            pieces.append("begun")
            time.sleep(0.02)
            pieces[-1] = "done"

    monkeypatch.setattr(fingerprints, "file", read)
    with vetting.Vetting() as vets:
        vets.start(torch.nn.Linear(2, 2), tmp_path, {})
        assert reading.wait(5)
        for _ in range(3):
            with vets.paused():
                count = len(pieces)
                assert pieces[-1] == "done"
                time.sleep(0.05)
                assert len(pieces) == count
            time.sleep(0.05)
        assert len(pieces) > count
        with pytest.raises(TimeoutError), vets.paused():
            raise TimeoutError


def test_threads_are_measured_while_nothing_is_read(arguments, monkeypatch):  # noqa: F811
    pieces, measured, until = itertools.count(), [], time.monotonic() + 60

    def read(name, tensor, where, over):
        while not over() and not measured and time.monotonic() < until:
            next(pieces)

    def choose(step):
        before = next(pieces)
        time.sleep(0.1)
        measured.append(next(pieces) - before)
        step()

    monkeypatch.setattr(finite, "check_weight", read)
    monkeypatch.setattr(threads, "choose", choose)
    assert main(changed(arguments, steps=1, threads=None)) == 0
    assert measured == [1]


def test_a_base_that_nobody_touched_is_not_read_again(arguments, model_dir, tmp_path, monkeypatch):  # noqa: F811
    directory = copy(model_dir, tmp_path / "m")
    given = changed(arguments, model=directory, steps=2)
    assert main(given) == 0
    read, real = [], fingerprints.file

    def file(path, *rest):
        read.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(fingerprints, "file", file)
    resumed = ["finetune", "--resume", "--output", str(tmp_path / "out"), "--compare", "0", "--sample", "0"]
    assert main([*resumed, "--steps", "3"]) == 0
    assert "text.txt" in read and WEIGHTS not in read
    os.utime(directory / WEIGHTS)
    assert main([*resumed, "--steps", "4"]) == 0
    assert WEIGHTS in read
    facts = resuming.verify(tmp_path / "out" / "checkpoint-4")
    assert facts["stamps"] == fingerprints.stamps(directory)


def test_threads_are_measured_on_the_first_layers(monkeypatch):
    model = adapt(build("qwen3_moe"))
    layers = depth.layers(model)
    whole, seen = list(layers), []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: seen.append(number))
    now = [0.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])

    def forward():
        now[0] += 10.0 * len(layers)
        model.get_base_model().base_model(tokens())

    step = threads.piece(model, forward)
    seen.clear()
    step()
    assert seen == [0] and list(layers) == whole
    monkeypatch.setattr(threads, "PIECE", 20.0)
    step = threads.piece(model, forward)
    seen.clear()
    step()
    assert seen == [0, 1] and list(layers) == whole


def test_the_first_layers_have_experts():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["deepseek_v2"]())
    layers = depth.layers(model)
    first = depth.least(layers)
    assert any(map(is_experts, layers[first - 1].modules()))
    assert not any(is_experts(m) for layer in layers[: first - 1] for m in layer.modules())
