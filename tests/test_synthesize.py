"""`python -m moelora synthesize`: shapes, layout and scale of what it writes, always the same bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import moelora
import pytest
import torch
from checkpoint_tiny import (
    CONFIGS,
    digests,
    interrupt_in_file,
    interruptible,  # noqa: F401  (autouse)
    tensors,
    weight,
)
from finetune_tiny import fails
from model_tiny import one_thread  # noqa: F401  (autouse)
from moelora import checkpoint_writer, known_models, model_names, packed_layout
from moelora.__main__ import main
from moelora.commands import signals
from transformers import AutoModelForCausalLM, AutoTokenizer

from torch_moelora import formats

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed

from benchmarks.registry import SHAPES

# Parameters that the makers state, or that their checkpoints have.
PARAMETERS = {
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3.5-35b-a3b": 34_660_610_688,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v2-lite": 15_706_484_224,
    "mixtral-8x7b": 46_702_792_704,
    "olmoe-1b-7b": 6_919_161_856,
}
PACKED = [*packed_layout.formats(), "nf4-nested", "fp4-nested"]


@pytest.fixture
def config_dir(tmp_path):
    def make(kind: str):
        CONFIGS[kind]().save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


def arguments(form: str) -> list[str]:
    name = form.removesuffix("-nested")
    group = ["--group-size", "64"] if name in ("nf4", "fp4", "int4", "int8") else []
    return ["--format", name, *group, *(["--nested"] if form.endswith("-nested") else [])]


@pytest.mark.parametrize("name", known_models.MODELS)
def test_known_models_have_their_published_sizes(name):
    names = model_names.Names(model_names.outline(known_models.config(name)))
    own = names.own()
    assert sum(tensor.numel() for tensor in own.values()) == PARAMETERS[name]
    if name in SHAPES:
        shape = SHAPES[name]
        weight, module = next(iter(names.experts().items()))
        found = model_names.oriented(module, own[weight]).shape
        assert tuple(found) == (shape.experts, *shape.projections["gate_up"])


@pytest.mark.parametrize("form", PACKED)
def test_packed_weights_are_as_quantize_makes_them(config_dir, tmp_path, form):
    """dtypes and shapes, and values of a sane scale."""
    out = tmp_path / "out"
    assert main(["synthesize", str(config_dir("gpt_oss")), str(out), *arguments(form)]) == 0
    layout = packed_layout.read(json.loads((out / "config.json").read_text())["quantization_config"])
    assert layout.linears is None
    choice, there = layout.experts, tensors(out)
    for projection, n, k in (("gate_up_proj", 128, 128), ("down_proj", 128, 64)):
        name = f"model.layers.1.mlp.experts.{projection}"
        expected = formats.quantize(torch.randn(4, n, k), choice.format, choice.group_size, choice.nested)
        for part, tensor in packed_layout.tensors(name, expected).items():
            assert (there[part].dtype, there[part].shape) == (tensor.dtype, tensor.shape), part
        values = weight(out, name, choice)
        assert values.isfinite().all()
        assert 0.7 < values.std().item() / 0.02 < 1.4
        assert values.mean().abs().item() < 0.005
        assert len({tuple(row) for row in values[:, 0].tolist()}) == 4  # experts differ


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_loads_and_runs(config_dir, tmp_path, kind):
    out = tmp_path / "out"
    assert main(["synthesize", str(config_dir(kind)), str(out), *arguments("nf4-nested")]) == 0
    with torch.no_grad():
        logits = moelora.from_pretrained(out)(torch.arange(16)[None]).logits.float()
    assert 0.01 < logits.std().item() < 10


def test_packed_linears(config_dir, tmp_path):
    out = tmp_path / "out"
    command = ["synthesize", str(config_dir("deepseek_v2")), str(out), "--format", "nf4", "--linears", "int8"]
    assert main(command) == 0
    there = tensors(out)
    assert there["model.layers.0.self_attn.q_proj.weight.codes"].shape == (1, 128, 128)
    assert there["model.layers.1.mlp.shared_experts.up_proj.weight.scale"].shape == (1, 64, 1)
    for dense in ("lm_head.weight", "model.norm.weight", "model.layers.1.mlp.gate.weight"):
        assert there[dense].is_floating_point()


@pytest.mark.parametrize("kind", CONFIGS)
def test_dense_is_a_checkpoint_of_transformers(config_dir, tmp_path, kind):
    out = tmp_path / "out"
    assert main(["synthesize", str(config_dir(kind)), str(out), "--format", "bf16"]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[which] for which in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path / "again")
    assert {k: v.shape for k, v in tensors(out).items()} == {
        k: v.shape for k, v in tensors(tmp_path / "again").items()
    }
    tokens = AutoTokenizer.from_pretrained(out)("bytes", return_tensors="pt")
    assert tokens["input_ids"].shape == (1, 5)
    logits = model(tokens["input_ids"]).logits.float()
    assert 0.01 < logits.std().item() < 10
    assert all(p.std() > 0 for n, p in model.named_parameters() if n.endswith("proj.weight"))


def test_bytes_depend_on_the_seed_alone(config_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("moelora.synthetic.PIECE", 1 << 10)
    command = ["synthesize", str(config_dir("qwen3_moe"))]
    for out, more in (("one", ["--threads", "1"]), ("three", ["--threads", "3"]), ("other", ["--seed", "1"])):
        assert main([*command, str(tmp_path / out), *arguments("nf4-nested"), *more]) == 0
    one, three, other = (digests(tmp_path / out) for out in ("one", "three", "other"))
    assert one == three
    weights = next(name for name in one if name.endswith(".safetensors"))
    assert one[weights] != other[weights]


@pytest.mark.parametrize("signum", signals.ENDING, ids=signals.name)
def test_interrupted_goes_on(config_dir, tmp_path, monkeypatch, capsys, signum):
    monkeypatch.setattr(checkpoint_writer, "LARGEST", 100_000)
    command = ["synthesize", str(config_dir("qwen3_moe"))]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*command, str(whole), *arguments("nf4")]) == 0
    with monkeypatch.context() as patch:
        interrupt_in_file(patch, 3, signum)
        assert main([*command, str(out), *arguments("nf4")]) == 128 + signum
    assert "the same command goes on" in capsys.readouterr().err
    assert not out.exists()
    partial = tmp_path / "out.unfinished"
    first = partial / sorted(p.name for p in partial.glob("*.safetensors"))[0]
    damaged = first.read_bytes()
    first.write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    other = fails([*command, str(out), *arguments("int8")], capsys)
    assert "an unfinished run with another layout: remove it" in other
    assert main([*command, str(out), *arguments("nf4")]) == 0
    assert "2 of them from before" in capsys.readouterr().out  # three were finished, and one was damaged
    assert digests(out) == digests(whole)
    assert not partial.exists()


def test_some_layers(config_dir, tmp_path, capsys):
    source, out = str(config_dir("deepseek_v2")), tmp_path / "out"
    told = fails(["synthesize", source, str(out), "--format", "nf4", "--layers", "1"], capsys)
    assert "DeepseekV2ForCausalLM has no expert layers" in told  # its first is dense
    source = str(config_dir("qwen3_moe"))
    assert main(["synthesize", source, str(out), "--format", "nf4", "--layers", "1"]) == 0
    assert not [name for name in tensors(out) if "layers.1." in name]
    assert len(moelora.from_pretrained(out).model.layers) == 1


def test_refusals(config_dir, tmp_path, capsys):
    model, out = str(config_dir("qwen3_moe")), str(tmp_path / "out")
    for given, expected in (
        (["nosuch", out, "--format", "nf4"], "NAME is 'nosuch', expected one of qwen3-30b-a3b"),
        ([model, out, "--format", "nf5"], "--format nf5: the format is 'nf5', expected one of nf4"),
        ([model, out, "--format", "int8", "--nested"], "nested scales are for nf4, fp4, got int8"),
        ([model, out, "--format", "bf16", "--nested"], "--nested is for packed weights"),
        ([model, out, "--format", "nf4", "--linears", "x"], "--linears x: the format is 'x'"),
        ([model, out, "--format", "nf4", "--group-size", "48"], "the group size is 48, which nf4 does not"),
        ([model, out, "--format", "int4"], "down_proj cannot be packed: K is 64, which int4, groups of 128"),
        ([model, out, "--format", "nf4", "--layers", "3"], "--layers is 3, expected at most the model's 2"),
        ([model, model, "--format", "nf4"], "is there already, and nothing is overwritten"),
        ([model, " ", "--format", "nf4"], "OUT is empty, expected a path"),
        ([model, out, "--format", "nf4", "--threads", "1000"], "--threads is 1000, expected at most"),
    ):
        assert expected in fails(["synthesize", *given], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["qwen3_moe"]
