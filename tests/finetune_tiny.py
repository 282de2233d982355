"""What tests of `python -m moelora finetune` share: a tiny checkpoint, its command line, error lines."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from model_tiny import build
from moelora.__main__ import main
from moelora.commands import default_model
from safetensors.torch import load_file, save_file

TEXT = "".join(f"{i} times {i + 1} is {i * (i + 1)}; a line of text to learn.\n" for i in range(120))
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
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
    """A run of four steps with two checkpoints, and nothing shown at its end."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return [
        *("finetune", "--model", str(model_dir), "--data", str(text), "--output", str(tmp_path / "out")),
        *("--steps", "4", "--save-every", "2", "--rank", "2", "--seq-length", "16", "--batch-size", "2"),
        *("--compare", "0", "--sample", "0", "--threads", "1"),
    ]


def changed(arguments: list[str], **values: object) -> list[str]:
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


def fails(arguments: list[str], capsys) -> str:
    """The one line with which the command ends, with status 2."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as stop:  # argparse's way
        status = stop.code
    errors = capsys.readouterr().err.splitlines()
    lines = [line for line in errors if line.strip() and "%|" not in line and ": loading " not in line]
    assert status == 2, lines
    assert len(lines) == 1 and lines[0].startswith("moelora: error: "), lines
    assert "above" not in lines[0]  # no reference to what is not shown
    return lines[0]


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def copy(directory: Path, to: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy of a checkpoint, with some tensors replaced or, for None, left out."""
    shutil.copytree(directory, to)
    if tensors:
        weights = load_file(to / WEIGHTS) | tensors
        save_file({name: t for name, t in weights.items() if t is not None}, to / WEIGHTS, {"format": "pt"})
    return to


def content(directory: Path) -> dict[str, bytes | None]:
    """Every path below a directory, and what is in it."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
        if ".moelora" not in path.parts
    }
