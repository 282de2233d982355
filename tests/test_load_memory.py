"""Packed experts stay in their files: memory of a process that loads some 100 MB, and the cache of stacks."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace

import moelora
import pytest
import torch
from model_tiny import logits, one_thread  # noqa: F401  (one_thread: autouse)
from moelora import cache, loading
from moelora.errors import MoeloraError
from packed_files import LAYOUTS, write
from packed_models import checkpoints  # noqa: F401  (a fixture)
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

MEGABYTE = 2**20
# Resident bytes of a process that no file backs, and those that one does; the most of the former on the way.
SCRIPT = """
import json, re, sys, threading, time, torch, moelora
from moelora import weights
torch.set_num_threads(1)
def resident():
    status = open("/proc/self/status").read()
    return [int(re.search(name + r":\\s+(\\d+)", status)[1]) * 1024 for name in ("RssAnon", "RssFile")]
most, done = [0], threading.Event()
def watch():
    while not done.wait(0.002):
        most[0] = max(most[0], resident()[0])
ids = torch.arange(512).view(2, 256) % 64
with torch.no_grad():  # what imports and warms up
    moelora.from_pretrained(sys.argv[2], cache_dir=sys.argv[2] + "/cache")(input_ids=ids)
before = resident()
threading.Thread(target=watch, daemon=True).start()
model = moelora.from_pretrained(sys.argv[1], cache_dir=sys.argv[1] + "/cache")
loaded = resident()
with torch.no_grad():
    model(input_ids=ids)
used = resident()
done.set()
size = sum(layer.nbytes for layer in moelora.enable(model).layers)
print(json.dumps({"before": before, "loaded": loaded, "used": used, "most": most[0], "size": size}))
"""


def drawn(rows: int, columns: int, gen: torch.Generator, experts: int = 1):
    """NF4 in our own layout, of random bytes: quickly made."""
    codes = torch.randint(0, 256, (experts, rows, columns // 2), generator=gen, dtype=torch.uint8)
    scale = torch.rand(experts, rows, columns // 64, generator=gen) * 0.01
    return {".codes": codes, ".scale": scale}, torch.empty(0)


def rows_of_fp8(rows: int, columns: int, gen: torch.Generator):
    codes = torch.randint(0, 120, (rows, columns), generator=gen, dtype=torch.uint8)
    return {
        "weight": codes.view(torch.float8_e4m3fn),
        "weight_scale": torch.full((rows, 1), 1e-3, dtype=torch.bfloat16),
    }, torch.empty(0)


OWN = replace(LAYOUTS["ours nf4 nested"], matrix=drawn)
APART = replace(LAYOUTS["fp8 rows"], matrix=rows_of_fp8, linears=False)
LARGE = {
    "mapped as they lie": (OWN, {"num_experts": 64, "moe_intermediate_size": 1024}),
    "stacked in a cache": (APART, {"num_experts": 64, "moe_intermediate_size": 1024}),
}


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no Linux")
@pytest.mark.parametrize("kind", LARGE)
def test_no_private_memory_but_what_is_small(kind, tmp_path, checkpoints):  # noqa: F811
    """A model of 50 or 100 MB of experts: less than a tenth of it is private memory, at any time."""
    layout, sizes = LARGE[kind]
    write(layout, tmp_path / "large", **sizes)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "large"), str(checkpoints(layout.name).packed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["size"] > 45 * MEGABYTE
    private = found["loaded"][0] - found["before"][0]
    assert private < 0.1 * found["size"], found
    assert found["used"][0] - found["before"][0] < 0.25 * found["size"], found  # and what the forward takes
    assert found["most"] - found["before"][0] < 0.25 * found["size"], found
    mapped = found["used"][1] - found["before"][1]
    assert mapped > 0.4 * found["size"], found  # nearly every expert was read


def files(checkpoint):
    return sorted(checkpoint.cache.rglob("*.safetensors"))


def test_the_cache_is_written_once_and_said(checkpoints, caplog):  # noqa: F811
    checkpoint = checkpoints("awq")
    with caplog.at_level(logging.WARNING, "moelora"):
        expected = logits(checkpoint.model())
    written = {path: path.stat().st_mtime_ns for path in files(checkpoint)}
    assert [path.name for path in written] == [f"model.layers.{i}.mlp.experts.safetensors" for i in (0, 1)]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "moelora"):
        assert torch.equal(logits(checkpoint.model()), expected)
    assert not [r for r in caplog.records if "stacked in" in r.getMessage()]
    assert {path: path.stat().st_mtime_ns for path in files(checkpoint)} == written
    home = files(checkpoint)[0].parent
    files(checkpoint)[0].unlink()  # half of it
    with caplog.at_level(logging.WARNING, "moelora"):
        assert torch.equal(logits(checkpoint.model()), expected)
    (told,) = (r.getMessage() for r in caplog.records if "stacked in" in r.getMessage())
    assert str(home) in told and "GB" in told and "delete it" in told
    assert files(checkpoint) == list(written)


def test_a_changed_checkpoint_has_another_cache(checkpoints):  # noqa: F811
    checkpoint = checkpoints("modelopt nvfp4")
    checkpoint.model()
    shard = sorted(checkpoint.packed.glob("*.safetensors"))[0]
    before = {path.parent for path in files(checkpoint)}
    os.utime(shard, ns=(1, 1))
    checkpoint.model()
    assert len({path.parent for path in files(checkpoint)} - before) == 1


def test_another_checkpoint_of_the_same_sizes_and_times_has_another_cache(checkpoints, tmp_path):  # noqa: F811
    """As in images and archives whose files all have one time."""
    checkpoint = checkpoints("awq")
    directories = [shutil.copytree(checkpoint.packed, tmp_path / name / "model") for name in "ab"]
    found = []
    for directory, turned in zip(directories, (False, True), strict=True):
        for path in directory.glob("*.safetensors"):
            tensors = load_file(path)
            if turned:
                tensors = {n: t.flip(0).contiguous() if "qweight" in n else t for n, t in tensors.items()}
            save_file(tensors, path, {"format": "pt"})
            os.utime(path, ns=(1, 1))
        model = moelora.from_pretrained(directory, cache_dir=tmp_path / "cache")
        found.append(model.model.layers[0].mlp.experts.down_proj_packed.codes)
    assert not torch.equal(*found)


def test_tensors_in_the_cache_are_aligned(checkpoints):  # noqa: F811
    checkpoint = checkpoints("compressed int4")
    model = checkpoint.model()
    for path in files(checkpoint):
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % cache.ALIGNMENT == 0
    codes = model.model.layers[1].mlp.experts.gate_up_proj_packed.codes
    assert codes.data_ptr() % cache.ALIGNMENT == 0


def test_an_interrupted_or_failed_writer_leaves_nothing(checkpoints, tmp_path, monkeypatch):  # noqa: F811
    checkpoint = checkpoints("compressed nvfp4")._replace(cache=tmp_path)
    put, calls = cache._put, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        put(*arguments)

    monkeypatch.setattr(cache, "_put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.model()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setattr(cache, "_put", put)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MoeloraError, match=r"cannot write .*layers\.0.*: No space left on device"):
        checkpoint.model()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.undo()
    (left := next(tmp_path.iterdir()) / "old.part").write_text("")
    os.utime(left, (1, 1))
    checkpoint.model()
    assert not left.exists() and len(files(checkpoint)) == 2


@pytest.fixture
def own_processes(monkeypatch):
    """Threads that do not wait for each other, as processes do not. What they share is put back."""
    monkeypatch.setattr(loading, "LOADING", nullcontext())
    tie = PreTrainedModel.tie_weights  # which transformers replaces while it loads
    yield
    torch.set_default_dtype(torch.float32)
    PreTrainedModel.tie_weights = tie


def test_several_processes_stack_at_once(checkpoints, tmp_path, own_processes):  # noqa: F811
    _load_at_once(checkpoints, tmp_path)


def test_threads_load_at_once(checkpoints, tmp_path):  # noqa: F811
    _load_at_once(checkpoints, tmp_path)
    assert torch.get_default_dtype() == torch.float32


def _load_at_once(checkpoints, tmp_path):  # noqa: F811
    checkpoint = checkpoints("gptq")._replace(cache=tmp_path)
    expected, found = logits(checkpoints("gptq").model()), []
    threads = [threading.Thread(target=lambda: found.append(checkpoint.model())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(torch.equal(logits(model), expected) for model in found)
    assert not list(tmp_path.rglob("*.part")) and len(files(checkpoint)) == 2


def test_the_default_is_beside_transformers_own_cache():
    from huggingface_hub.constants import HF_HOME

    assert str(cache.default_directory()).startswith(HF_HOME)
    assert moelora.from_pretrained.__doc__.count("HF_HOME") == 1
