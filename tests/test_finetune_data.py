"""Runs on conversations: evaluation, the best adapter, options in a file, a dry run, chat."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from finetune_tiny import WEIGHTS, adapter, arguments, changed, copy, fails, model_dir  # noqa: F401  (fixtures)
from model_tiny import (
    build,
    one_thread,  # noqa: F401  (autouse)
)
from moelora import checkpoints
from moelora.__main__ import main
from moelora.commands import config, default_model, lora, options, plan, training
from peft import PeftConfig
from safetensors.torch import load_file, save_file

TEMPLATE = Path(__file__).parent / "chat_template.jinja"


@pytest.fixture
def chat(arguments, tmp_path) -> list[str]:  # noqa: F811
    """A run on conversations, evaluated at every second step."""
    rows = tmp_path / "chat.jsonl"
    turns = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": str(i) * 3 if i else None}]
        for i in range(12)
    ]
    rows.write_text("".join(json.dumps({"messages": m}) + "\n" for m in turns))
    given = {"data": rows, "chat_template": TEMPLATE, "seq_length": 64, "eval_every": 2, "save_every": None}
    return changed(arguments, **given)


def _summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def test_a_run_on_conversations(chat, model_dir, tmp_path, capsys, monkeypatch):  # noqa: F811
    out = tmp_path / "out"
    options = {
        "packing": "bfd",
        "sample": 4,
        "report_to": "jsonl",
        "scheduler": "linear",
        "weight_decay": 0.1,
    }
    assert main(changed(chat, **options)) == 0
    printed = capsys.readouterr().out
    assert "chat.jsonl, 11 rows of format chat" in printed and "1 rows with no assistant's turn" in printed
    assert "of them in the loss" in printed and "step 2: held-out loss" in printed
    summary = _summary(out)
    assert [step for step, _ in summary["evaluations"]] == [2, 4, 4] and len(summary["losses"]) == 4
    assert summary["prompt"].endswith("<assistant>")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    seconds = [entry["seconds"] for entry in log]
    assert log[0] == {"step": 0, "seconds": seconds[0]} and seconds == sorted(seconds)
    assert seconds[0] <= summary["seconds_to_first_step"] + 0.5 and log[-2]["base_loss"] > 0
    assert PeftConfig.from_pretrained(out / "adapter").base_model_name_or_path == str(model_dir)
    card = (out / "adapter" / "README.md").read_text()
    for expected in (f"base_model: {model_dir}", "chat.jsonl", f"{summary['held_out_loss']['tuned']:.4f}"):
        assert expected in card
    # the options in the file make the same run elsewhere
    again = tmp_path / "again"
    monkeypatch.chdir(tmp_path / "out")
    assert main(["finetune", "--config", str(out / "config.yaml"), "--output", str(again)]) == 0
    assert all(torch.equal(value, adapter(out)[name]) for name, value in adapter(again).items())
    assert _summary(again)["losses"] == summary["losses"]


@pytest.fixture
def losses(monkeypatch):
    """Held-out losses at the evaluations in the training: 3, 1, 2, 2, then what they are."""
    listed = [3.0, 1.0, 2.0, 2.0]
    loop = training.TunedTrainer.evaluation_loop

    def evaluation_loop(self, *values, **keywords):
        out = loop(self, *values, **keywords)
        if self.state.global_step and listed:
            out.metrics["eval_loss"] = listed.pop(0)
        return out

    monkeypatch.setattr(training.TunedTrainer, "evaluation_loop", evaluation_loop)


def test_the_best_adapter_is_kept_and_the_run_stops_early(chat, tmp_path, losses, capsys, monkeypatch):
    kept = {}
    save = training.TunedTrainer._save_checkpoint

    def watched(self, *values):
        save(self, *values)
        path = tmp_path / "out" / f"checkpoint-{self.state.global_step}" / "adapter_model.safetensors"
        kept[self.state.global_step] = load_file(path)

    monkeypatch.setattr(training.TunedTrainer, "_save_checkpoint", watched)
    assert main(changed(chat, steps=20, keep_best=True, early_stopping=2)) == 0
    assert "the lowest held-out loss was at step 4" in capsys.readouterr().out
    summary = _summary(tmp_path / "out")
    assert summary["best_step"] == 4 and summary["losses"][-1][0] == 8  # two evaluations without a better one
    found = adapter(tmp_path / "out")
    assert all(torch.equal(value, kept[4][name]) for name, value in found.items())
    assert not all(torch.equal(value, kept[8][name]) for name, value in found.items())


def test_a_resumed_run_keeps_the_same_best_adapter(chat, tmp_path, monkeypatch):
    """And its early stopping counts on."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    chat = changed(chat, steps=8, keep_best=True, early_stopping=3, learning_rate=0.05)
    assert main(changed(chat, output=whole)) == 0
    begin = training.Progress.on_step_begin
    with monkeypatch.context() as patch:

        def interrupted(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt
            begin(self, args, state, control, **kwargs)

        patch.setattr(training.Progress, "on_step_begin", interrupted)
        assert main(changed(chat, output=parts)) == 130
    assert main(["finetune", "--resume", "--output", str(parts)]) == 0
    one, other = _summary(whole), _summary(parts)
    assert one["best_step"] == other["best_step"] and one["evaluations"] == other["evaluations"]
    assert one["losses"] == other["losses"]
    assert all(torch.equal(value, adapter(whole)[name]) for name, value in adapter(parts).items())


def test_packing_that_a_model_cannot_do_is_refused(chat, tmp_path, capsys):
    model = build("gpt_oss")
    model.resize_token_embeddings(257)
    model.save_pretrained(tmp_path / "gpt_oss")
    default_model.byte_tokenizer().save_pretrained(tmp_path / "gpt_oss")
    message = fails(changed(chat, model=tmp_path / "gpt_oss", packing="bfd"), capsys)
    assert "does not keep packed texts apart here" in message


# ---- how long, in which steps


@pytest.mark.parametrize(
    ("given", "rows", "steps", "rising"),
    [
        ({}, 100, 120, 6),
        ({"epochs": 1.0, "batch_size": 8}, 100, 13, 1),
        ({"epochs": 2.5, "batch_size": 8, "grad_accumulation": 2}, 100, 18, 1),
        ({"steps": 40, "warmup": 0.5}, 7, 40, 20),
        ({"steps": 40, "warmup": 3.0}, 7, 40, 3),
        ({"steps": 40, "warmup": 0.0}, 7, 40, 0),
    ],
)
def test_steps_and_warmup(given, rows, steps, rising):
    chosen = options.settle(given)
    assert plan.steps(chosen, rows) == steps
    assert plan.warmup(chosen.warmup, steps) == rising


def test_epochs_see_every_row_so_often(chat, tmp_path):
    assert main(changed(chat, steps=None, epochs=2, eval_every=None, batch_size=3)) == 0
    assert len(_summary(tmp_path / "out")["losses"]) == 8  # 10 rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1}, "--steps and --epochs both say how long"),
        ({"early_stopping": 2}, "--early-stopping needs --keep-best"),
        ({"keep_best": True, "eval_every": None}, "--keep-best needs --eval-every"),
        ({"format": "chat", "field": "body"}, "--field names text, which rows of --format chat are not"),
        ({"report_to": "nonsense"}, "--report-to nonsense is not installed or unknown, here can be: jsonl"),
        ({"format": "instruction"}, 'expected rows with "instruction" and "output", got the fields messages'),
        ({"chat_template": "/no/such"}, "cannot read --chat-template /no/such"),
        ({"chat_template": None}, "the tokenizer has no chat template for them"),
        ({"scheduler": "sine"}, "argument --scheduler: invalid choice: 'sine'"),
        ({"weight_decay": -1}, "argument --weight-decay: expected a number of at least 0, got '-1'"),
    ],
)
def test_contradictions(chat, tmp_path, capsys, changes, message):
    assert message in fails(changed(chat, **changes), capsys)
    assert not (tmp_path / "out").exists()


# ---- options in a file


def test_options_in_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "rank: 4\nlearning-rate: 1e-3\ntarget_modules: [q_proj, v_proj]\nkeep_best: true\ndata: null\n"
        "gradient_checkpointing: true\nprompt: --dashes"
    )
    given = ["finetune", "--config", str(path), "--rank", "8", "--no-gradient-checkpointing"]
    found = config.parse(given)
    assert found == {
        "command": "finetune",
        "rank": 8,
        "learning_rate": 1e-3,
        "target_modules": ["q_proj", "v_proj"],
        "keep_best": True,
        "gradient_checkpointing": False,
        "prompt": "--dashes",
    }


def test_what_is_written_is_what_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = options.settle(
        {"data": ["a.txt", "b"], "alpha": 3.5, "epochs": 2.0, "keep_best": True, "eval_every": 5}
    )
    (tmp_path / "c.yaml").write_text(config.written(vars(chosen)))
    read = config.parse(["finetune", "--config", "c.yaml"])
    read.pop("command")
    again = options.settle(read)
    assert again.data == [str(tmp_path / "a.txt"), str(tmp_path / "b")]
    again.data = chosen.data
    assert vars(again) == vars(chosen)
    assert "output" not in yaml.safe_load((tmp_path / "c.yaml").read_text())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: [", "line 1 is not YAML"),
        ("- rank", "expected options with their values, got list"),
        ("colour: red", "colour is no option"),
        ("keep_best: maybe", "keep_best is 'maybe', expected true or false"),
        ("rank: none", "argument --rank: expected a whole number of at least 1, got 'none'"),
    ],
)
def test_files_with_other_things(tmp_path, capsys, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert message in fails(["finetune", "--config", str(path)], capsys)


# ---- before and after a run


def test_a_dry_run_tells_and_writes_nothing(chat, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moelora.checkpoints.load", None)  # no weights are read
    assert main([*changed(chat, steps=None, epochs=3), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for expected in ("tokens", "15 steps of 2 rows", "memory ", "GB weights", "time     about", "s a step"):
        assert expected in printed
    assert not (tmp_path / "out").exists()


def test_chat(chat, model_dir, tmp_path, capsys, monkeypatch):  # noqa: F811
    out = tmp_path / "out"
    assert main(changed(chat, steps=1, eval_every=None)) == 0
    said = []
    for given in ([], ["--temperature", "0"]):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n\nnever read\n"))
        command = ["chat", str(model_dir), str(out / "adapter"), "--tokens", "4", "--system", "short", *given]
        assert main(command) == 0
        captured = capsys.readouterr()
        said.append(captured.out)
        assert "a conversation" in captured.err and captured.out.count("\n") >= 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main(["chat", str(model_dir), "--tokens", "2"]) == 0  # the base, without a template
    assert "no chat template" in capsys.readouterr().err
    assert "cannot load /no/such onto" in fails(["chat", str(model_dir), "/no/such"], capsys)


def test_chat_with_what_has_no_answer(model_dir, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Neither a traceback nor a made-up answer."""
    norm = "model.norm.weight"
    bad = copy(
        model_dir,
        tmp_path / "bad",
        **{norm: torch.full_like(load_file(model_dir / WEIGHTS)[norm], torch.nan)},
    )
    for temperature in ("0", "1"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        command = ["chat", str(bad), "--tokens", "2", "--temperature", temperature]
        capsys.readouterr()
        assert main(command) == 2
        told = capsys.readouterr().err
        assert f"the weights in {bad} are not finite: {norm} has" in told
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert main(["chat", str(model_dir), "--tokens", "2"]) == 2
    assert "the standard input is no UTF-8 text" in capsys.readouterr().err
    wrong = copy(model_dir, tmp_path / "wrong")
    settings = json.loads((wrong / "config.json").read_text()) | {"num_experts_per_tok": 99}
    (wrong / "config.json").write_text(json.dumps(settings))
    for command in (["chat", str(wrong)], ["inspect", str(wrong), "--no-measure"]):
        assert main(command) == 2
        assert "cannot load what the model computes from" in capsys.readouterr().err
    assert "--system is no UTF-8 text" in fails(["chat", str(model_dir), "--system", "a\udcff"], capsys)


def test_chat_with_a_damaged_adapter(model_dir, tmp_path, capsys, monkeypatch):  # noqa: F811
    whole = tmp_path / "whole"
    lora.adapt(checkpoints.load(model_dir, "float32")[0], 2, 4, "both", []).save_pretrained(whole)
    tensors = load_file(whole / "adapter_model.safetensors")
    first = min(tensors)
    settings = json.loads((whole / "adapter_config.json").read_text())
    damages = {
        "have no tensor in it": {name: t for name, t in tensors.items() if name != first},
        "tensors have no place": tensors | {first.replace("layers.0", "layers.9"): tensors[first].clone()},
        f"has NaN or Inf in {first}": tensors | {first: torch.full_like(tensors[first], torch.nan)},
        "cannot load": [],
        f"onto {model_dir}": settings | {"lora_alpha": None},
    }
    for number, (told, damage) in enumerate(damages.items()):
        directory = shutil.copytree(whole, tmp_path / str(number))
        if told.startswith(("cannot", "onto")):
            (directory / "adapter_config.json").write_text(json.dumps(damage))
        else:
            save_file(damage, directory / "adapter_model.safetensors")
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        capsys.readouterr()
        assert main(["chat", str(model_dir), str(directory), "--tokens", "2"]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("error:") == 1, error
        assert main(["merge", str(model_dir), str(directory), str(tmp_path / "merged")]) == 2
        assert not (tmp_path / "merged").exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main(["chat", str(model_dir), str(whole), "--tokens", "2"]) == 0
    with pytest.raises(SystemExit):
        main(["chat", str(model_dir), "--temperature", "1e-300"])
    assert "expected 0 or a number of at least 0.001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (["chat", ""], "MODEL_DIR"),
        (["chat", "m", " "], "ADAPTER"),
        (["inspect", ""], "MODEL_DIR"),
        (["quantize", "m", "", "--format", "nf4"], "OUT"),
        (["synthesize", "", "o", "--format", "nf4"], "NAME"),
        (["merge", "m", "", "o"], "ADAPTER"),
    ],
)
def test_an_empty_argument_is_not_the_current_directory(command, what, capsys):
    assert f"{what} is empty, expected a path" in fails(command, capsys)


def test_nobody_reads_the_output(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["models"]) == 128 + 13


@pytest.mark.parametrize("command", [["finetune"], ["inspect", "/no/such"], ["chat", "/no/such"], ["models"]])
def test_every_command_says_something_before_it_imports_what_takes_seconds(command):
    code = f"""
import os, sys
import moelora.__main__
class First:
    def write(self, text):
        heavy = {{"torch", "transformers", "datasets", "numpy", "pandas"}} & set(sys.modules)
        os.write(1, f"{{text}} {{heavy}}".encode())
        os._exit(0)
    def flush(self): pass
sys.stdout = sys.stderr = First()
moelora.__main__.main({command})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == f"moelora {command[0]}: loading torch and transformers set()", run
