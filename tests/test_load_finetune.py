"""`python -m moelora finetune` on a packed checkpoint: as on any other."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from finetune_tiny import TEXT, adapter, changed
from model_tiny import one_thread  # noqa: F401  (autouse)
from moelora.__main__ import main
from moelora.commands import default_model
from packed_files import LAYOUTS, write


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("packed")
    write(LAYOUTS["ours nf4 nested"], home, vocab_size=257)
    default_model.byte_tokenizer().save_pretrained(home)
    return home


@pytest.fixture
def arguments(directory, tmp_path) -> list[str]:
    (tmp_path / "text.txt").write_text(TEXT)
    return [
        *("finetune", "--model", str(directory), "--data", str(tmp_path / "text.txt")),
        *("--output", str(tmp_path / "out"), "--steps", "6", "--save-every", "3", "--rank", "2"),
        *("--seq-length", "32", "--batch-size", "4", "--learning-rate", "0.01", "--compare", "1"),
        *("--sample", "0", "--threads", "1"),
    ]


def test_it_trains_and_its_adapter_reloads(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "Qwen3MoeExperts, nf4, " in out and " kB" in out
    assert "adapter reloaded with PEFT on packed experts: logits agree" in out
    assert "no comparison: transformers' experts + PEFT cannot run this model (its experts are packed" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["held_out_loss"]["tuned"] < summary["held_out_loss"]["base"] - 0.05
    assert all(math.isfinite(loss) for _, loss in summary["losses"])
    assert any(bool(t.any()) for name, t in adapter(tmp_path / "out").items() if "experts" in name)


def test_a_resumed_run_goes_on(arguments, tmp_path):
    assert main(changed(arguments, compare=0)) == 0
    before = adapter(tmp_path / "out")
    assert main(changed(arguments, compare=0, steps=8, resume=True)) == 0
    after = adapter(tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(bool(t.isfinite().all()) for t in after.values())
    assert any(not torch.equal(t, before[name]) for name, t in after.items())
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 8


@pytest.mark.parametrize("command", ["chat", "finetune"])
def test_stacking_shows_how_far_it_is(command, arguments, tmp_path, monkeypatch, capsys):
    """Though the commands silence transformers' bars: it takes minutes of a large checkpoint."""
    home = tmp_path / "apart"
    write(LAYOUTS["awq"], home, vocab_size=257)
    default_model.byte_tokenizer().save_pretrained(home)
    monkeypatch.setattr("moelora.cache.HF_HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    line = ["chat", str(home)] if command == "chat" else changed(arguments, model=home, compare=0, steps=1)
    assert main(line) == 0
    shown = capsys.readouterr().err
    assert "Stacking experts" in shown and "2/2" in shown
    assert "Loading weights" not in shown


def test_inspect_reads_it(directory, capsys):
    assert main(["inspect", str(directory), "--rank", "2"]) == 0
    out = capsys.readouterr().out
    assert "tensors of all experts, " in out and "U8" in out
