"""Checkpoints whose layers are packed in different ways: loaded, trained, saved, described, merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import moelora
import packed_files
import pytest
import torch
from model_tiny import one_thread, tokens  # noqa: F401  (one_thread: autouse)
from moelora import weights
from moelora.__main__ import main
from moelora.checkpoint_reader import Source
from moelora.packed_layout import Choice, read
from packed_files import EXPERTS, LAYOUTS, write
from packed_models import adapted, experts, one_family  # noqa: F401  (one_family: a fixture)
from transformers import AutoModelForCausalLM

LAYER = 4 + 3 * EXPERTS  # matrices of one


def _by_layer(*kinds: Callable) -> Callable:
    """A kind for each layer, whose matrices are drawn one after the other."""
    drawn = count()
    return lambda rows, columns, gen: kinds[next(drawn) // LAYER % len(kinds)](rows, columns, gen)


def _groups_of(group: int) -> Callable:
    return lambda rows, columns, gen: packed_files.int4(rows, columns, gen, group=group)


# What the two layers are, and how our own layout says it.
MIXED = {
    "two groups": ([_groups_of(64), _groups_of(32)], Choice("int4", 64), Choice("int4", 32)),
    "two formats": ([packed_files.fp8_rows, _groups_of(32)], Choice("fp8", 0), Choice("int4", 32)),
}


@pytest.mark.parametrize("kind", MIXED)
def test_trained_saved_and_merged(kind, one_family, tmp_path, capsys):  # noqa: F811
    """Every weight is said to be what it is, and computes what plain transformers does of its numbers."""
    kinds, first, second = MIXED[kind]
    packed, dense, saved, adapter = (tmp_path / n for n in ("packed", "dense", "saved", "adapter"))
    write(replace(LAYOUTS["compressed int4 asymmetric"], matrix=_by_layer(*kinds)), packed, dense)
    model = moelora.from_pretrained(packed, cache_dir=tmp_path / "cache")
    model.save_pretrained(saved)
    layout = read(json.loads((saved / "config.json").read_text())["quantization_config"])
    choices = {name: weight.choice for name, weight in Source(saved).weights.items()}
    assert len(choices) == 2 * 6
    for name, choice in choices.items():
        assert choice == layout.choice(name, "experts" in name) == (first, second)[".1." in name], name
    assert layout.experts == layout.linears == first and len(layout.others) == 6
    tuned, other = (
        adapted(m) for m in (moelora.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(dense))
    )
    report = moelora.enable(tuned, linears=True)
    moelora.enable(other, linears=True)
    assert [row.format for row in report.layers] == [first.format, second.format]
    assert report.layers[0].nbytes != report.layers[1].nbytes and len(str(report).splitlines()) > 3
    _same_step(tuned, other)
    tuned.save_pretrained(adapter)
    _merged(tuned, saved, adapter, tmp_path, choices)
    capsys.readouterr()
    assert main(["inspect", str(saved), "--no-measure"]) == 0
    assert str(first) in (told := capsys.readouterr().out) and str(second) in told


def _same_step(model: torch.nn.Module, other: torch.nn.Module) -> None:
    grads = []
    for one in (model, other):
        loss = one(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in one.parameters() if p.grad is not None)])
    assert len(grads[0]) == len(grads[1]) > 8 and all(map(torch.equal, *grads))


def _merged(tuned: torch.nn.Module, saved: Path, adapter: Path, home: Path, choices: dict) -> None:
    assert main(["merge", str(saved), str(adapter), str(home / "out"), "--format", "float32"]) == 0
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(home / "out")(tokens()).logits
        expected = tuned.float()(input_ids=tokens()).logits
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert main(["merge", str(saved), str(adapter), str(home / "same")]) == 0
    assert {name: weight.choice for name, weight in Source(home / "same").weights.items()} == choices
    again, merged = moelora.from_pretrained(home / "same"), AutoModelForCausalLM.from_pretrained(home / "out")
    for module, other in zip(experts(again), experts(merged), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            numbers, dense = weights.weight_of(module, name).dequantize(torch.float32), getattr(other, name)
            assert (numbers - dense).norm() < 0.2 * dense.norm()


def test_quantised_anew_the_linear_layers_stay_as_they_are(tmp_path):
    kinds, first, second = MIXED["two groups"]
    write(replace(LAYOUTS["compressed int4"], family="qwen3_moe", matrix=_by_layer(*kinds)), tmp_path / "in")
    moelora.from_pretrained(tmp_path / "in", cache_dir=tmp_path / "cache").save_pretrained(tmp_path / "saved")
    assert main(["quantize", str(tmp_path / "saved"), str(tmp_path / "out"), "--format", "int8"]) == 0
    for name, weight in Source(tmp_path / "out").weights.items():
        expected = Choice.of("int8") if "experts" in name else (first, second)[".1." in name]
        assert weight.choice == expected, name


def test_a_wrong_configuration_is_refused(tmp_path):
    write(LAYOUTS["ours nf4 nested"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    name = "model.layers.1.mlp.experts.down_proj"
    for others, told in (
        ({name: {"format": "nf5"}}, "others.model.layers.1.*'nf5'"),
        ([name], "expected formats by names of weights"),
        ({name: {"format": "fp8", "group_size": 128}}, f"{name}: .*uint8"),
    ):
        config["quantization_config"] |= {"version": 2, "others": others}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(moelora.MoeloraError, match=told):
            moelora.from_pretrained(tmp_path)
