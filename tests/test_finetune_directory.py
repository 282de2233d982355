"""The output directory: nobody else's file is touched, one run at a time, everything whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from finetune_tiny import (
    adapter,
    arguments,  # noqa: F401  (a fixture)
    changed,
    content,
    fails,
    model_dir,  # noqa: F401  (a fixture)
)
from model_tiny import one_thread  # noqa: F401  (autouse)
from moelora import MoeloraError
from moelora.__main__ import main
from moelora.commands import directory, finetune


def _write(text: str):
    return lambda path: path.write_text(text)


def _tree(**files: str):
    def write(path: Path) -> None:
        path.mkdir()
        for name, text in files.items():
            (path / name).write_text(text)

    return write


def _finished(out: Path) -> None:
    """What a run leaves."""
    with directory.held(out):
        directory.publish(out, "checkpoint-4", _tree(a="1"))
        directory.publish(out, "adapter", _tree(weights="w", card="c"))
        directory.publish(out, "loss.png", _write("p"))
        directory.publish(out, "summary.json", _write("{}"))


STRANGERS = {
    "adapter/mine.txt": lambda out: _put(out / "adapter" / "mine.txt"),
    "adapter": lambda out: _put(out / "adapter"),
    "summary.json": lambda out: _put(out / "summary.json" / "x"),
    "loss.png": lambda out: _put(out / "loss.png"),
    "checkpoint-4": lambda out: _put(out / "checkpoint-4"),
    "checkpoint-12": lambda out: _put(out / "checkpoint-12" / "optimizer.pt"),
    "link": lambda out: (out / "checkpoint-7").symlink_to(out.parent),
    "dangling": lambda out: (out / "adapter").symlink_to("nowhere"),
    "trace.json": lambda out: _put(out / "trace.json"),
}


def _put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_are_refused_before_anything(tmp_path, stranger, overwrite):
    out = tmp_path / "out"
    out.mkdir()
    STRANGERS[stranger](out)
    before = content(tmp_path)
    with pytest.raises(MoeloraError, match=r"was not written by a run, .* move it away"):  # noqa: SIM117
        with directory.held(out, overwrite=overwrite):
            raise AssertionError("not reached")
    assert content(tmp_path) == before and not (out / ".moelora").exists()


@pytest.mark.parametrize("name", ["checkpoint-best", "notes.txt", "data", ".moelora.txt", "checkpoint-1x"])
def test_other_names_stay(tmp_path, name):
    out = tmp_path / "out"
    _put(out / name / "mine")
    _finished(out)
    with directory.held(out, overwrite=True):
        directory.remove(out)
    assert content(out) == {name: None, f"{name}/mine": b"mine"} and not (out / ".moelora").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda out: _put(out / "adapter" / "mine.txt"), r"mine.txt was not written by a run"),
        (lambda out: _put(out / "checkpoint-4" / "mine.txt"), r"mine.txt was not written by a run"),
        (lambda out: _put(out / "adapter" / "card"), r"card was changed since a run wrote it"),
        (lambda out: (out / "loss.png").write_text("q"), r"loss.png was changed since a run wrote it"),
        (lambda out: _put(out / ".moelora" / "manifest.json"), r"manifest.json is damaged"),
    ],
)
def test_overwrite_takes_only_what_a_run_wrote(tmp_path, change, told):
    out = tmp_path / "out"
    _finished(out)
    change(out)
    before = content(tmp_path)
    with pytest.raises(MoeloraError, match=told), directory.held(out, overwrite=True):
        raise AssertionError("not reached")
    assert content(tmp_path) == before


def test_a_copied_directory_is_still_known(tmp_path):
    """Other times, the same content."""
    out = tmp_path / "out"
    _finished(out)
    for path in out.rglob("*"):
        os.utime(path, (1, 1))
    with directory.held(out, overwrite=True):
        directory.remove(out)
    assert content(out) == {}


def test_what_came_during_the_run_stays(tmp_path):
    out = tmp_path / "out"
    with directory.held(out):
        directory.publish(out, "checkpoint-2", _tree(a="1"))
        _put(out / "checkpoint-2" / "mine")
        _put(out / "adapter" / "mine")
        directory.publish(out, "checkpoint-4", _tree(a="2"))
        directory.remove_checkpoints(out, keep=1)
        with pytest.raises(MoeloraError, match="adapter was not written by a run"):
            directory.publish(out, "adapter", _tree(weights="w"))
    assert {name for name, text in content(out).items() if text == b"mine"} == {
        "checkpoint-2/mine",
        "adapter/mine",
    }
    assert not (out / "checkpoint-2" / "a").exists() and (out / "checkpoint-4" / "a").exists()


def test_an_earlier_run_is_kept_unless_told(tmp_path):
    out = tmp_path / "out"
    _finished(out)
    before = content(out)
    with pytest.raises(MoeloraError, match="holds a finished run: --overwrite replaces it"):
        directory.held(out).__enter__()
    with directory.held(out, resume=True) as found:
        assert found == (True, out / "checkpoint-4")
    with directory.held(out, overwrite=True):
        pass  # it failed before it wrote anything
    assert content(out) == before
    (out / "summary.json").unlink()
    with pytest.raises(MoeloraError, match=r"an unfinished run \(checkpoint-4\): --resume goes on"):
        directory.held(out).__enter__()


def test_one_run_at_a_time(tmp_path):
    out = tmp_path / "out"
    with directory.held(out):
        told = f"another run .process {os.getpid()} on .*. is writing into"
        for keywords in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(MoeloraError, match=told):
                directory.held(out, **keywords).__enter__()
        directory.publish(out, "loss.png", _write("p"))
    with directory.held(out, overwrite=True):
        pass
    assert content(out) == {"loss.png": b"p"}


def test_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(ZeroDivisionError), directory.held(out):
        raise ZeroDivisionError
    assert not out.exists()
    out.mkdir()
    with directory.held(out):
        pass
    assert list(out.iterdir()) == []


def test_interrupted_writing_leaves_nothing(tmp_path):
    out = tmp_path / "out"

    def interrupted(path: Path) -> None:
        _tree(a="1")(path)
        raise KeyboardInterrupt

    with directory.held(out):
        directory.publish(out, "adapter", _tree(a="0"))
        with pytest.raises(KeyboardInterrupt):
            directory.publish(out, "adapter", interrupted)
        assert (out / "adapter" / "a").read_text() == "0"
        directory.publish(out, "adapter", _tree(b="2"))
    assert content(out) == {"adapter": None, "adapter/b": b"2"}
    assert sorted(json.loads((out / ".moelora" / "manifest.json").read_text())["files"]) == ["adapter/b"]


def _killed(n: int, out: Path) -> bool:
    """A run in another process that dies at its n-th change of the disk; whether it got that far."""
    child = os.fork()
    if not child:
        left = [n]

        def dying(real):
            def call(*args, **kwargs):
                left[0] -= 1
                if not left[0]:
                    os._exit(9)
                return real(*args, **kwargs)

            return call

        for module, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "write_text")):
            setattr(module, name, dying(getattr(module, name)))
        try:
            _finished(out)
            with directory.held(out, overwrite=True):
                directory.publish(out, "checkpoint-6", _tree(a="3"))
                directory.remove_checkpoints(out, keep=1)
                directory.publish(out, "loss.png", _write("new"))
                directory.publish(out, "adapter", _tree(other="o"))
                directory.remove(out, "summary.json")
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_killed_at_any_point(tmp_path):
    """What is there under its name is whole, and nothing of it stands in the way of the next run."""
    allowed = {
        "adapter": [{"weights": b"w", "card": b"c"}, {"other": b"o"}],
        "checkpoint-4": [{"a": b"1"}],
        "checkpoint-6": [{"a": b"3"}],
    }
    n = 1
    while _killed(n, out := tmp_path / str(n)):
        for name, wholes in allowed.items():
            if (out / name).exists():
                assert content(out / name) in wholes, n
        if (out / "loss.png").exists():
            assert (out / "loss.png").read_text() in ("p", "new")
        with directory.held(out, overwrite=True):
            assert not (out / ".moelora" / "staging").exists()
            directory.publish(out, "checkpoint-8", _tree(a="8"))
            directory.publish(out, "adapter", _tree(a="8"))
            directory.remove(out)
        assert content(out) == {}
        n += 1
    assert n > 30


# ---- the command


def test_command_refuses_before_it_loads_anything(arguments, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(finetune, "prepare", None)  # it would fail otherwise than in words
    out = tmp_path / "out"
    told = fails([*arguments, "--resume", "--overwrite"], capsys)
    assert "expected one of them, got both" in told and not out.exists()
    for name in ("model", "output", "data", "cache_dir"):
        told = fails(changed(arguments, **{name: ""}), capsys)
        assert f"--{name.replace('_', '-')} is empty, expected a path" in told
    assert "File name too long" in fails(changed(arguments, output="x" * 300), capsys)
    link = tmp_path / "link"
    link.symlink_to("/no/such")
    assert "link is a link to nothing" in fails(changed(arguments, output=link), capsys)
    _put(out / "summary.json" / "x")
    assert "summary.json was not written by a run" in fails(arguments, capsys)


def test_command_keeps_what_is_there(arguments, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    _put(out / "checkpoint-best" / "w.bin")
    assert main(arguments) == 0
    before = content(out)
    assert "holds a finished run" in fails(arguments, capsys)
    assert "holds a finished run" in fails(changed(arguments, rank=3), capsys)
    assert "/no/such is not" in fails(changed(arguments, overwrite=True, model="/no/such"), capsys)
    assert content(out) == before
    assert main(changed(arguments, overwrite=True, rank=3, steps=2)) == 0
    assert (out / "checkpoint-best" / "w.bin").read_text() == "mine"
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-best", "checkpoint-2"}
    assert {15} == {t.shape[0] for name, t in adapter(out).items() if "lora_A" in name}  # 5 experts, rank 3
