"""`python -m moelora finetune` in miniature: what it writes, resuming, interruption, and every error line."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_tiny import model
from model_tiny import (
    build,
    one_thread,  # noqa: F401  (autouse)
)
from moelora import MoeloraError
from moelora.__main__ import main
from moelora.commands import data, default_model, directory, lora, options, threads, training
from peft import PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TEXT = "".join(f"{i} times {i + 1} is {i * (i + 1)}; a line of text to learn.\n" for i in range(300))
FILES = {"adapter", "config.yaml", "loss.png", "summary.json"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A checkpoint with bytes as tokens."""
    directory = tmp_path_factory.mktemp("model")
    model = build("qwen3_moe")
    model.resize_token_embeddings(257)
    model.save_pretrained(directory)
    default_model.byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def arguments(model_dir, tmp_path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return [
        *("finetune", "--model", str(model_dir), "--data", str(text), "--output", str(tmp_path / "out")),
        *("--steps", "6", "--save-every", "2", "--rank", "3", "--seq-length", "32", "--batch-size", "2"),
        *("--compare", "1", "--sample", "8", "--threads", "1"),
    ]


def _set(arguments: list[str], **values: object) -> list[str]:
    """The arguments with some options changed, added or, for None, left out."""
    out = list(arguments)
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if flag in out:
            at = out.index(flag)
            del out[at : at + 2]
        if value is True:
            out.append(flag)
        elif value is not None:
            out += [flag, *map(str, value if isinstance(value, list) else [value])]
    return out


def _adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def _written(out: Path) -> set[str]:
    """What a run leaves, beside what it needs to be extended."""
    kept = {".moelora", *(path.name for path in out.glob("checkpoint-*"))}
    return {path.name for path in out.iterdir()} - kept


def _summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


# ---- a whole run


def test_run_writes_adapter_curve_and_summary(arguments, model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(_set(arguments, steps=30, learning_rate=0.01, save_every=100)) == 0
    assert _written(out) == FILES
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = _summary(out)
    loss = summary["held_out_loss"]
    assert loss["tuned"] < loss["base"] - 0.2
    assert [step for step, _ in summary["losses"]] == list(range(1, 31))
    assert summary["reload_difference"] < 1e-4 and summary["race"]["speedup"] > 0
    assert {layer["path"] for layer in summary["experts"]["layers"]} == {"operators"}
    assert all(a["gradient"] for layer in summary["experts"]["layers"] for a in layer["adapters"])
    printed = capsys.readouterr().out
    for expected in ("held-out loss before", "held-out loss after", "transformers' experts + PEFT", "tuned"):
        assert expected in printed
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), out / "adapter")
    assert plain.peft_config["default"].r == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"projections": "gate_up", "dtype": "bfloat16"},
        {"projections": "down", "target_modules": ["q_proj", "v_proj"], "grad_accumulation": 2},
        {"gradient_checkpointing": True, "compare": 0, "sample": 0},
    ],
)
def test_options(arguments, tmp_path, changes):
    assert main(_set(arguments, steps=2, **changes)) == 0
    names = " ".join(_adapter(tmp_path / "out"))
    assert ("q_proj" in names) == ("target_modules" in changes)
    assert len(_adapter(tmp_path / "out")) == (8 if changes.get("gradient_checkpointing") else 4) + 8 * (
        "target_modules" in changes
    )


def test_profile(arguments, tmp_path, capsys):
    assert main(_set(arguments, steps=4, profile=2, compare=0, sample=0)) == 0
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    operators = (
        "flatten_sort_count",
        "scatter_lora",
        "scatter_lora_backward",
        "glu",
        "glu_backward",
    )
    assert {f"moelora::{name}" for name in operators} <= names
    table = (tmp_path / "out" / "profile.txt").read_text()
    assert "moelora::scatter_lora" in table and table in capsys.readouterr().out


def test_layers_called_like_projections_of_experts(arguments):
    """--target-rank is theirs, not the experts'; where PEFT takes the name for the experts', that is told."""
    pattern = lora.of_modules("down_proj", {"experts.down_proj", "experts.gate_up_proj"})
    assert get_pattern_key([pattern], "model.layers.1.mlp.shared_experts.down_proj") == pattern
    assert get_pattern_key([pattern], "model.layers.1.mlp.down_proj") == pattern
    assert get_pattern_key([pattern], "model.layers.1.mlp.experts.down_proj") != pattern
    assert lora.of_modules("q_proj", {"experts.down_proj"}) == "q_proj"
    with pytest.raises(MoeloraError, match="PEFT takes down_proj for a projection of the experts"):
        lora.adapt(model("deepseek_v2"), 4, 8.0, "both", ["down_proj"], 2)


def test_a_run_that_trains_nothing_is_an_error(arguments, monkeypatch, capsys):
    """Adapters whose gradients never come."""
    adapt = lora.adapt

    def useless(*values):
        adapted = adapt(*values)
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                torch.nn.init.zeros_(parameter)  # as B is: neither has a gradient
        return adapted

    monkeypatch.setattr(lora, "adapt", useless)
    assert main(_set(arguments, steps=1, compare=0, sample=0)) == 2
    assert "4 adapted parameters, model.layers.0.mlp.experts" in capsys.readouterr().err


def test_jsonl_with_a_field(arguments, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": line}) + "\n" for line in TEXT.splitlines()))
    assert main(_set(arguments, data=rows, field="body", steps=1, compare=0, sample=0)) == 0


def _shrink_the_default_model(monkeypatch) -> None:
    smaller = {
        "MODEL": {"hidden_size": 32, "moe_intermediate_size": 16},
        "PRETRAINING": {"characters": 300_000, "steps": 2},
    }
    for name, changes in smaller.items():
        monkeypatch.setattr(default_model, name, getattr(default_model, name) | changes)
    monkeypatch.setitem(options.DEFAULTS, "eval_rows", 4)


def test_without_options_pretrains_a_base_once(tmp_path, monkeypatch, capsys):
    _shrink_the_default_model(monkeypatch)
    monkeypatch.chdir(tmp_path)
    arguments = ["finetune", "--cache-dir", "cache", "--steps", "2", "--sample", "4", "--compare", "1"]
    assert main(arguments) == 0
    (directory,) = (tmp_path / "cache").iterdir()
    made = directory.stat().st_mtime_ns
    assert main([*arguments, "--overwrite"]) == 0
    assert not json.loads((directory / "config.json").read_text())["output_router_logits"]
    assert directory.stat().st_mtime_ns == made and len(list((tmp_path / "cache").iterdir())) == 1
    assert _written(tmp_path / "out") == FILES


def test_module_prints_help():
    run = subprocess.run(
        [sys.executable, "-m", "moelora", "finetune", "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0
    for name in options.DEFAULTS:
        assert "--" + name.replace("_", "-") in run.stdout


# ---- interruption and resuming


def _interrupt_at(monkeypatch, step: int) -> None:
    """Ctrl-C in the middle of a step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt
        self._started = time.perf_counter()

    monkeypatch.setattr(training.Progress, "on_step_begin", on_step_begin)


def test_resumed_run_equals_an_uninterrupted_one(arguments, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(_set(arguments, output=whole)) == 0
    with pytest.MonkeyPatch.context() as patch:
        _interrupt_at(patch, 5)
        assert main(_set(arguments, output=parts)) == 130
    assert "checkpoint-4 is complete; go on with" in capsys.readouterr().err
    assert sorted(path.name for path in parts.iterdir()) == [".moelora", "checkpoint-4"]
    assert main(["finetune", "--resume", "--output", str(parts)]) == 0
    assert _summary(parts)["losses"] == _summary(whole)["losses"]
    assert _summary(parts)["held_out_loss"] == _summary(whole)["held_out_loss"]
    expected = _adapter(whole)
    assert all(torch.equal(value, expected[name]) for name, value in _adapter(parts).items())


def test_unfinished_run_is_not_lost(arguments, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        _interrupt_at(patch, 3)
        assert main(arguments) == 130
    _fails(arguments, "holds an unfinished run (checkpoint-2): --resume goes on with it", capsys)
    _fails(
        [*arguments, "--resume", "--rank", "5"], "was started with --rank 3, got 5: leave --rank out", capsys
    )
    assert main(_set(arguments, overwrite=True, steps=1, compare=0, sample=0)) == 0


def test_interrupt_before_the_first_checkpoint(arguments, tmp_path, capsys, monkeypatch):
    _interrupt_at(monkeypatch, 1)
    assert main(arguments) == 130
    assert capsys.readouterr().err.endswith("moelora: interrupted by SIGINT before the first checkpoint\n")


@contextlib.contextmanager
def _interruptible():
    """What starts within can be interrupted, even where the caller ignores Ctrl-C, as nohup and `&` do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_signal_leaves_a_usable_checkpoint(arguments, model_dir, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "moelora", *_set(arguments, steps=100_000, sample=0)]
    with _interruptible():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while (
            directory.look(out).checkpoint is None and process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    checkpoint = directory.look(out).checkpoint
    assert f"{checkpoint} is complete" in errors.splitlines()[-1]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), checkpoint)


# ---- errors


def _fails(arguments: list[str], message: str, capsys) -> None:
    """The command ends with status 2 and one line that has `message` in it."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as stop:  # argparse's way
        status = stop.code
    errors = capsys.readouterr().err.splitlines()
    lines = [line for line in errors if line.strip() and "%|" not in line and ": loading " not in line]
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith("moelora: error: ") and message in lines[0], lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "argument --rank: expected a whole number of at least 1, got '0'"),
        ({"alpha": "-1"}, "argument --alpha: expected a number above 0, got '-1'"),
        ({"learning_rate": "nan"}, "argument --learning-rate: expected a number above 0, got 'nan'"),
        ({"steps": "many"}, "argument --steps: expected a whole number of at least 1, got 'many'"),
        ({"seq_length": 1}, "argument --seq-length: expected a whole number of at least 2, got '1'"),
        ({"held_out": 1.5}, "argument --held-out: expected a fraction between 0 and 1, got '1.5'"),
        ({"dtype": "int8"}, "argument --dtype: invalid choice: 'int8'"),
        ({"model": "/no/such"}, "/no/such is not a directory, expected a local transformers checkpoint"),
        ({"data": "/no/such.txt"}, "cannot read /no/such.txt: No such file or directory"),
        ({"seq_length": 129}, "--seq-length is 129, the model reads at most 128 tokens"),
        ({"held_out": 1e-6}, "the held-out text is 1 tokens long, expected at least --seq-length (32)"),
        ({"target_modules": "nonsense"}, "--target-modules nonsense names no layer of Qwen3MoeForCausalLM"),
        ({"target_modules": "lm_head"}, "--target-modules has lm_head, the head of Qwen3MoeForCausalLM"),
        ({"target_modules": "mlp"}, "PEFT cannot adapt Qwen3MoeForCausalLM"),
        ({"profile": 5}, "--profile is 5, expected at most 4: --steps is 6"),
        ({"resume": True}, "expected a checkpoint of an unfinished run"),
        ({"output": "/dev/null"}, "--output /dev/null is a file, expected a directory"),
        ({"output": "/proc/no/such"}, "cannot write /proc/no/such: No such file or directory"),
    ],
)
def test_wrong_arguments(arguments, tmp_path, capsys, changes, message):
    _fails(_set(arguments, **changes), message, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty, expected text"),
        ("a.txt", b" \n", "a.txt is empty, expected text"),
        ("a.txt", b"\xff\xfe\xfa", "a.txt is not UTF-8 text"),
        ("a.txt", b"short", "the training text is 5 tokens long, expected at least --seq-length (32)"),
        ("a.jsonl", b"", "a.jsonl is empty, expected text"),
        ("a.jsonl", b'{"text": "x"}\n{oops}\n', "a.jsonl line 2 is not JSON"),
        (
            "a.jsonl",
            b'{"body": "x"}\n',
            "a.jsonl is of no known format, it has the fields body: expected text, messages, prompt with",
        ),
        ("a.jsonl", b"[1]\n", 'a.jsonl row 1: expected text in "text", got int'),
    ],
)
def test_wrong_data(arguments, tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    _fails(_set(arguments, data=tmp_path / name), message, capsys)
    assert not (tmp_path / "out").exists()


def test_wrong_models(arguments, tmp_path, capsys):
    directory = tmp_path / "model"
    directory.mkdir()
    wrong = _set(arguments, model=directory)
    _fails(wrong, "is not a transformers checkpoint: expected a config.json in it", capsys)
    config = LlamaConfig(
        vocab_size=257, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    config.save_pretrained(directory)
    _fails(wrong, "is not a transformers checkpoint: expected weights (model.safetensors, or", capsys)
    LlamaForCausalLM(config).save_pretrained(directory)
    default_model.byte_tokenizer().save_pretrained(directory)
    _fails(wrong, "holds a LlamaForCausalLM, which has no expert layers", capsys)
    (directory / "config.json").write_text("{")
    _fails(wrong, "cannot load the configuration from", capsys)


def test_operators_not_built(arguments, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "moelora.commands.finetune", None)
    monkeypatch.delattr("moelora.commands.finetune")
    _fails(arguments, "moelora.commands.finetune", capsys)


def test_damaged_weights(arguments, model_dir, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in model_dir.iterdir():
        content = path.read_bytes()
        (damaged / path.name).write_bytes(
            content[: len(content) // 2] if path.suffix == ".safetensors" else content
        )
    _fails(_set(arguments, model=damaged), "cannot load a language model from", capsys)


def test_diverging_loss(arguments, capsys):
    _fails(_set(arguments, learning_rate=1e30), "lower --learning-rate", capsys)


@contextlib.contextmanager
def _files_of_at_most(size: int):
    """Writing past `size` bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(("size", "reason"), [(1000, "File too large"), (15_000, "cannot write")])
def test_disk_full_at_a_checkpoint(arguments, tmp_path, capsys, size, reason):
    with _files_of_at_most(size):
        _fails(arguments, reason, capsys)
    assert not (tmp_path / "out").exists()


def test_disk_full_at_the_end_leaves_the_checkpoint(arguments, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("moelora.commands.results.Figure.savefig", _no_space)
        _fails(arguments, f"cannot write {out / 'loss.png'}: No space left on device", capsys)
    assert {path.name for path in out.iterdir()} == {".moelora", "adapter", "checkpoint-6"}
    assert main(["finetune", "--resume", "--output", str(out)]) == 0
    assert _written(out) == FILES


def _no_space(*args, **kwargs):
    raise OSError(28, os.strerror(28))


def test_disk_full_while_pretraining_leaves_no_base(tmp_path, monkeypatch, capsys):
    _shrink_the_default_model(monkeypatch)
    cache = tmp_path / "cache"
    arguments = ["finetune", "--cache-dir", str(cache), "--output", str(tmp_path / "out")]
    with _files_of_at_most(10_000):
        _fails(arguments, "cannot write", capsys)
    assert list(cache.iterdir()) == [] and not (tmp_path / "out").exists()


# ---- pieces


@pytest.mark.parametrize("busy", [True, False])
def test_threads_are_chosen_by_what_is_faster(busy):
    torch.set_num_threads(2)
    chosen = threads.choose(lambda: time.sleep(0.02 * (torch.get_num_threads() == (2 if busy else 1))))
    assert chosen == torch.get_num_threads() == (1 if busy else 2)


def test_split_keeps_documents_whole_and_is_repeatable():
    documents = [f"document {i} " * (i + 1) for i in range(40)]
    train, held_out = data.split(documents, 0.2, seed=3)
    assert sorted(train + held_out) == sorted(documents) and not set(train) & set(held_out)
    assert 0.2 <= sum(map(len, held_out)) / sum(map(len, documents)) < 0.3
    assert data.split(documents, 0.2, seed=3) == (train, held_out)
    assert data.split(documents, 0.2, seed=4) != (train, held_out)


def test_split_cuts_the_end_of_few_documents():
    assert data.split(["abcdefghij", "0123456789"], 0.3, seed=0) == (["abcdefg", "0123456"], ["hij", "789"])


def test_byte_tokenizer_is_lossless():
    tokenizer = default_model.byte_tokenizer()
    text = "naïve Ωμέγα \t\r\n 🙂 <tag>"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and max(ids) < 256 and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 256


def test_options_of_a_resumed_run():
    assert options.settle({"output": "b"}, {"rank": 4, "output": "a"}).rank == 4
    assert options.settle({"rank": 4}, {"rank": 4}).alpha == 8
    with pytest.raises(MoeloraError, match="started with --steps 10, got 5"):
        options.settle({"steps": 5}, {"steps": 10})
