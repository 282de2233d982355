"""`--resume` is the same run to the bit, or one line that says why it cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from finetune_tiny import (
    TEXT,
    WEIGHTS,
    adapter,
    changed,
    content,
    copy,
    fails,
    model_dir,  # noqa: F401  (a fixture)
)
from model_tiny import one_thread  # noqa: F401  (autouse)
from moelora import MoeloraError
from moelora.__main__ import main
from moelora.commands import fingerprints, options, results, resuming, saving
from safetensors.torch import load_file, save_file

STEPS = 4


class Stage:
    """A run that was interrupted, and what it was made from, to be changed."""

    def __init__(self, directory: Path, model: Path):
        self.out, self.data = directory / "out", directory / "data.txt"
        self.model = copy(model, directory / "model")
        self.data.write_text(TEXT)
        self.arguments = [
            *("finetune", "--model", str(self.model), "--data", str(self.data), "--output", str(self.out)),
            *("--steps", str(STEPS), "--save-every", "2", "--rank", "2", "--seq-length", "16"),
            *("--batch-size", "2", "--compare", "0", "--sample", "0", "--threads", "1"),
        ]
        self.resume = ["finetune", "--resume", "--output", str(self.out), "--compare", "0", "--sample", "0"]

    def restore(self, out: Path) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(out, self.out)


@pytest.fixture(scope="module")
def stage(tmp_path_factory, model_dir) -> Stage:  # noqa: F811
    return Stage(tmp_path_factory.mktemp("stage"), model_dir)


@pytest.fixture(scope="module")
def whole(stage, tmp_path_factory) -> Path:
    """The output of the run without interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(changed(stage.arguments, output=out)) == 0
    return out


def _interrupted(stage: Stage, tmp_path_factory, name: str, where: tuple[object, str], at: int) -> Path:
    out = tmp_path_factory.mktemp(name) / "out"
    kind, method = where
    real = getattr(kind, method)

    def stop(*args, **kwargs):
        if not at or args[2].global_step == at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, method, stop)
        assert main(changed(stage.arguments, output=out)) == 130
    return out


@pytest.fixture(scope="module")
def middle(stage, tmp_path_factory) -> Path:
    """Interrupted in step 4, after the checkpoint of step 2."""
    return _interrupted(stage, tmp_path_factory, "middle", (saving.Watch, "on_pre_optimizer_step"), 3)


@pytest.fixture(scope="module")
def end(stage, tmp_path_factory) -> Path:
    """Interrupted after the last checkpoint, before the adapter is written."""
    return _interrupted(stage, tmp_path_factory, "end", (results, "write_adapter"), 0)


def _equal(out: Path, expected: Path) -> bool:
    ours, theirs = adapter(out), adapter(expected)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _losses(out: Path) -> list:
    return json.loads((out / "summary.json").read_text())["losses"]


def test_in_the_middle(stage, whole, middle):
    assert resuming.verify(middle / "checkpoint-2")["trained"] is False
    stage.restore(middle)
    assert main(stage.resume) == 0
    assert _equal(stage.out, whole) and _losses(stage.out) == _losses(whole)


def test_after_the_last_step_no_further_one(stage, whole, end, capsys):
    stage.restore(end)
    checkpoint = content(stage.out / f"checkpoint-{STEPS}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.AtomicCheckpoints, "training_step", None)
        assert main(stage.resume) == 0
    assert _equal(stage.out, whole) and _losses(stage.out) == _losses(whole)
    assert content(stage.out / f"checkpoint-{STEPS}") == checkpoint
    before = content(stage.out)
    capsys.readouterr()
    assert main(stage.resume) == 0  # as a scheduler does that starts it again and again
    assert "is finished: nothing is left to train" in capsys.readouterr().out
    assert content(stage.out) == before


def test_extension_says_its_schedule(stage, whole, capsys):
    stage.restore(whole)
    assert main([*stage.resume, "--steps", "6"]) == 0
    assert "extended to 6 steps: from step 5 on, the rate follows the cosine" in capsys.readouterr().out
    assert [step for step, _ in _losses(stage.out)] == [1, 2, 3, 4, 5, 6]
    assert _losses(stage.out)[:STEPS] == _losses(whole) and not _equal(stage.out, whole)
    assert [path.name for path in stage.out.glob("checkpoint-*")] == ["checkpoint-6"]
    state = json.loads((stage.out / "checkpoint-6" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry]
    # A cosine over 6 steps with one of warm-up: (1 + cos(pi n / 5)) / 2 of 2e-4 after n steps.
    assert rates[4:] == pytest.approx([2e-4 * 0.3454915, 2e-4 * 0.0954915], rel=1e-4)
    assert "started with --steps 6, got 5" in fails([*stage.resume, "--steps", "5"], capsys)
    shutil.rmtree(stage.out / "checkpoint-6")
    assert "from its last checkpoint, which is gone" in fails([*stage.resume, "--steps", "9"], capsys)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*resuming.NEEDED, "adapter_model.safetensors", resuming.COMPLETE])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_damage_is_named(stage, middle, capsys, name, damage):
    stage.restore(middle)
    path = stage.out / "checkpoint-2" / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        _flip(path)
    before = content(stage.out)
    told = fails(stage.resume, capsys)
    assert (
        f"checkpoint-2 cannot be resumed: {name} is {'missing' if damage == 'missing' else 'damaged'}" in told
    )
    assert content(stage.out) == before


def test_damaged_run_can_be_overwritten(stage, middle):
    stage.restore(middle)
    _flip(stage.out / "checkpoint-2" / "optimizer.pt")
    assert main(changed(stage.arguments, overwrite=True, steps=1)) == 0


@pytest.fixture
def restored(stage):
    """What the run was made from, put back after the test."""
    kept = {path: path.read_bytes() for path in [stage.data, *stage.model.iterdir()]}
    yield
    for path in [stage.data, *stage.model.iterdir()]:
        if path not in kept:
            path.unlink()
    for path, old in kept.items():
        path.write_bytes(old)


def _weights(model: Path) -> None:
    weights = load_file(model / WEIGHTS)
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, model / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda stage: stage.data.write_text(TEXT.replace("7 times 8", "8 times 7")), "data changed: "),
        (lambda stage: _weights(stage.model), f"base changed: {WEIGHTS} changed"),
        (
            lambda stage: (stage.model / "tokenizer.json").write_text(
                (stage.model / "tokenizer.json").read_text() + "\n"
            ),
            "base changed: tokenizer.json changed",
        ),
        (lambda stage: (stage.model / "chat_template.jinja").write_text(""), "chat_template.jinja is new"),
    ],
)
def test_another_base_or_other_data(stage, middle, restored, capsys, change, told):
    stage.restore(middle)
    change(stage)
    assert told in fails(stage.resume, capsys)


def test_other_options(stage, middle, capsys):
    stage.restore(middle)
    for name, value in (("rank", "3"), ("seed", "1"), ("steps", "3"), ("learning-rate", "1")):
        assert f"was started with --{name} " in fails([*stage.resume, f"--{name}", value], capsys)


def test_fingerprints(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_text(path.name)
    one = fingerprints.files(paths)
    assert [Path(path).name for path in one] == ["a", "b"] and len(set(one.values())) == 2
    fingerprints.compare({"data": one}, {"data": one}, "checkpoint-2")
    fingerprints.compare({"data": one}, {"data": fingerprints.files(paths[:1])}, "checkpoint-2")  # not read
    paths[1].unlink()
    with pytest.raises(MoeloraError, match=r"data changed: .*b is gone since the run of checkpoint-2"):
        fingerprints.compare({"data": one}, {"data": fingerprints.files(paths[:1])}, "checkpoint-2")
    assert fingerprints.texts(["ab", "c"]) != fingerprints.texts(["a", "bc"])
    with pytest.raises(MoeloraError, match=r"cannot read .*nothing"):
        fingerprints.file(tmp_path / "nothing")


def test_a_checkpoint_with_folders(tmp_path):
    """As transformers saves a tokenizer of several chat templates."""
    checkpoint = tmp_path / "checkpoint-2"
    for name in (*resuming.NEEDED, "additional_chat_templates/tool.jinja", "other/tool.jinja"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text(name)
    resuming.complete(checkpoint, {}, {"step": 2})
    assert resuming.verify(checkpoint) == {"step": 2}
    (checkpoint / "other" / "tool.jinja").write_text("other/tool.Jinja")
    with pytest.raises(MoeloraError, match=r"other/tool\.jinja is damaged"):
        resuming.verify(checkpoint)


def test_a_base_with_folders(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("config.json", "additional_chat_templates/tool.jinja"):
        (tmp_path / name).write_text(name)
    stamps = fingerprints.stamps(tmp_path)
    recorded = fingerprints.base(tmp_path, {}, {}, stamps)
    assert recorded.keys() == stamps.keys() == {"config.json", "additional_chat_templates/tool.jinja"}
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("another")
    again = fingerprints.base(tmp_path, recorded, stamps, fingerprints.stamps(tmp_path))
    assert [name for name in again if again[name] != recorded[name]] == [
        "additional_chat_templates/tool.jinja"
    ]


def test_what_a_resumed_run_keeps():
    """All that it was started with, but what is of one call."""
    recorded = {"report_to": ["jsonl"], "save_every": 500, "prompt": "p", "overwrite": True, "profile": 3}
    kept = options.settle({"resume": True}, recorded)
    assert (kept.report_to, kept.save_every, kept.prompt) == (["jsonl"], 500, "p")
    assert not kept.overwrite and kept.profile == options.DEFAULTS["profile"]
    assert options.settle({"save_every": 7}, recorded).save_every == 7
    assert options.settle({"report_to": ["none"]}, recorded).report_to == []


def test_only_more_extends():
    assert options.settle({"steps": 9}, {"steps": 4}).steps == 9
    assert options.extended({"steps": 9}, {"steps": 4}) and not options.extended({"steps": 4}, {"steps": 4})
    assert not options.extended({}, {"steps": 4}) and not options.extended({"steps": 9}, {"steps": None})
    with pytest.raises(MoeloraError, match="started with --steps 4, got 3"):
        options.settle({"steps": 3}, {"steps": 4})
