"""`python -m moelora merge`: what it writes is what PEFT's own merge gives, and what is lost is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import moelora
import pytest
import torch
from checkpoint_tiny import (
    CONFIGS,
    digests,
    interrupt_in_file,
    interruptible,  # noqa: F401  (autouse)
    model,
    save,
    tensors,
    weight,
)
from finetune_tiny import fails
from model_tiny import fill, one_thread  # noqa: F401  (autouse)
from moelora import checkpoint_writer, model_names, packed_layout, packing
from moelora.__main__ import main
from moelora.commands import signals
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from torch_moelora import formats

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# Options of an adapter → what they add.
ADAPTERS = {
    "experts": {"target_parameters": EXPERTS},
    "down": {"target_parameters": ["experts.down_proj"], "use_rslora": True},
    "both": {"target_parameters": EXPERTS, "target_modules": ["q_proj", "o_proj", "lm_head"]},
    "patterns": {
        "target_parameters": EXPERTS,
        "target_modules": ["q_proj"],
        "rank_pattern": {"layers.1.mlp.experts.down_proj": 5, "layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.0.mlp.experts.gate_up_proj": 3, "layers.1.self_attn.q_proj": 1},
    },
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """kind, dtype → a dense checkpoint."""
    made = {}

    def make(kind: str, dtype: torch.dtype = torch.bfloat16):
        if (kind, dtype) not in made:
            made[kind, dtype] = save(model(kind, dtype), tmp_path_factory.mktemp("dense") / kind)
        return made[kind, dtype]

    return make


def adapt(directory, to, size: float = 0.02, **options):
    """An adapter of a checkpoint, written by PEFT."""
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    options = {"r": 3, "lora_alpha": 7, "target_modules": []} | options
    adapted = get_peft_model(base, LoraConfig(**options))
    fill(adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data *= size / 0.3
    adapted.save_pretrained(to)
    return to


def merged(directory, adapter, dtype: torch.dtype) -> torch.nn.Module:
    """By PEFT, in memory."""
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def difference(found: dict, expected: dict) -> float:
    """The largest relative one."""
    assert found.keys() == expected.keys()
    return max(
        ((found[n].double() - e.double()).norm() / e.double().norm().clamp(min=1e-9)).item()
        for n, e in expected.items()
    )


@pytest.mark.parametrize("which", ADAPTERS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_dense_is_what_peft_merges(dense, tmp_path, monkeypatch, kind, which):
    monkeypatch.setattr(packing, "NUMBERS", 40_000)
    base = dense(kind)
    adapter = adapt(base, tmp_path / "adapter", **ADAPTERS[which])
    out, exact = tmp_path / "out", tmp_path / "exact"
    assert main(["merge", str(base), str(adapter), str(out)]) == 0
    assert main(["merge", str(base), str(adapter), str(exact), "--format", "float32"]) == 0
    wide = merged(base, adapter, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(exact)
    assert loaded.dtype == torch.float32
    assert difference(loaded.state_dict(), wide.state_dict()) < 1e-6
    tokens = torch.arange(16)[None]
    assert torch.allclose(loaded(tokens).logits, wide(tokens).logits, atol=1e-4)
    # In bfloat16 rounded once, where PEFT also rounds the change before it adds it.
    now, before = tensors(out), tensors(base)
    assert now.keys() == before.keys()
    assert {t.dtype for t in now.values()} == {t.dtype for t in before.values()}
    state = AutoModelForCausalLM.from_pretrained(out).state_dict()
    nearest = {name: t.bfloat16() for name, t in wide.state_dict().items()}
    assert difference(state, nearest) < 2e-4  # a tie here and there
    assert difference(state, merged(base, adapter, torch.bfloat16).state_dict()) < 4e-3
    names = [n for n in before if not torch.equal(now[n], before[n])]
    assert names and not [n for n in names if "norm" in n or "embed" in n]


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_packed_in_its_own_format(dense, tmp_path, capsys, kind):
    """Unpacked, changed and packed again; what has no adapter stays to the bit; the share is as told."""
    base, out = tmp_path / "base", tmp_path / "out"
    pack = ["--format", "int8", "--group-size", "32", "--linears", "nf4"]
    assert main(["quantize", str(dense(kind)), str(base), *pack]) == 0
    options = {"target_parameters": EXPERTS[1:], "target_modules": ["q_proj"]}
    adapter = adapt(dense(kind), tmp_path / "adapter", **options)
    capsys.readouterr()
    assert main(["merge", str(base), str(adapter), str(out)]) == 0
    told = capsys.readouterr().out
    layout = packed_layout.read(json.loads((out / "config.json").read_text())["quantization_config"])
    before, now = tensors(base), tensors(out)
    plain = AutoModelForCausalLM.from_pretrained(dense(kind), dtype=torch.float32)
    changed = merged(dense(kind), adapter, torch.float32)
    kept = wanted = 0.0
    for name, module in model_names.Names(plain).experts().items():
        if "gate_up" in name:
            assert now[f"{name}.codes"].equal(before[f"{name}.codes"])
            continue
        delta = changed.get_parameter(name).detach() - plain.get_parameter(name).detach()
        delta = model_names.oriented(module, delta)
        packed = weight(base, name, layout.experts)
        expected = formats.quantize(packed + delta, "int8", 32).dequantize(torch.float32)
        found = weight(out, name, layout.experts)
        assert (found - expected).norm() / expected.norm() < 1e-3
        kept += ((found - packed) * delta).sum().item()
        wanted += delta.square().sum().item()
    row = next(line for line in told.splitlines() if line.startswith("model.layers.*.mlp.experts.down_proj"))
    assert f"{kept / wanted:.1%}" in row
    assert "nf4, groups of 64" in told and layout.linears.format == "nf4"


def test_zero_points_stay(dense, tmp_path):
    """int4 with zero points, as a model of AWQ's saves it, is packed with zero points again."""
    base, out = tmp_path / "base", tmp_path / "out"
    pack = ["--format", "int4", "--group-size", "32"]
    assert main(["quantize", str(dense("qwen3_moe")), str(base), *pack]) == 0
    path, plain = next(base.glob("*.safetensors")), AutoModelForCausalLM.from_pretrained(dense("qwen3_moe"))
    there = load_file(path)
    names = [name for name, _ in plain.named_parameters() if "experts" in name]
    for name in names:
        skewed = plain.get_parameter(name).detach().float() + 0.05
        there |= packed_layout.tensors(name, formats.quantize(skewed, "int4", 32, zeros=True))
    save_file(there, path, {"format": "pt"})
    adapter = adapt(dense("qwen3_moe"), tmp_path / "adapter", target_parameters=EXPERTS[1:])
    assert main(["merge", str(base), str(adapter), str(out)]) == 0
    choice, now = packed_layout.Choice.of("int4", 32), tensors(out)
    changed = merged(dense("qwen3_moe"), adapter, torch.float32)
    for name in names:
        packed = weight(base, name, choice)
        if "gate_up" in name:
            assert now[f"{name}.zero"].equal(there[f"{name}.zero"])
            continue
        wanted = packed + changed.get_parameter(name).detach() - plain.get_parameter(name).detach().float()
        expected = formats.quantize(wanted, "int4", 32, zeros=True).dequantize(torch.float32)
        found = weight(out, name, choice)
        assert (found - expected).norm() / expected.norm() < 1e-3
        symmetric = formats.quantize(wanted, "int4", 32).dequantize(torch.float32)
        assert (found - wanted).norm() < 0.8 * (symmetric - wanted).norm()
    tokens = torch.arange(16)[None]
    assert moelora.from_pretrained(out)(tokens).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_what_was_tuned_packed_is_what_is_merged(dense, tmp_path, kind):
    """quantise → adapter on the packed base → merge → plain transformers: the same logits."""
    base, out = tmp_path / "base", tmp_path / "out"
    source = dense(kind, torch.float32)
    assert main(["quantize", str(source), str(base), "--format", "nf4", "--nested"]) == 0
    options = {"target_parameters": EXPERTS, "target_modules": ["q_proj", "v_proj"]}
    adapter = adapt(source, tmp_path / "adapter", **options)
    assert main(["merge", str(base), str(adapter), str(out), "--format", "float32"]) == 0
    tuned = PeftModel.from_pretrained(moelora.from_pretrained(base), adapter)
    moelora.enable(tuned)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        expected = tuned(input_ids=tokens).logits
        before = moelora.from_pretrained(base)(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(out)(tokens).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (found - before).norm() > 1e-2 * expected.norm()


def test_little_is_left_of_a_small_change_in_four_bits(dense, tmp_path, capsys):
    base, out, wide = tmp_path / "base", tmp_path / "out", tmp_path / "wide"
    assert main(["quantize", str(dense("qwen3_moe")), str(base), "--format", "nf4"]) == 0
    adapter = adapt(dense("qwen3_moe"), tmp_path / "adapter", size=0.001, target_parameters=EXPERTS)
    capsys.readouterr()
    assert main(["merge", str(base), str(adapter), str(out)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(last.split("%")[0]) < 40
    assert "--format bfloat16 keeps it" in last
    assert main(["merge", str(base), str(adapter), str(wide), "--format", "bfloat16"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(last.split("%")[0]) > 90 and "keeps it" not in last
    there = tensors(wide)
    assert there.keys() == tensors(dense("qwen3_moe")).keys()
    assert "quantization_config" not in json.loads((wide / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(wide)
    name = "model.layers.0.mlp.experts.down_proj"
    packed = weight(base, name, packed_layout.Choice.of("nf4"))
    assert (loaded.get_parameter(name).float() - packed).norm() / packed.norm() < 0.02


def test_dense_to_packed(dense, tmp_path):
    adapter = adapt(dense("mixtral"), tmp_path / "adapter", target_parameters=EXPERTS)
    out = tmp_path / "out"
    command = ["merge", str(dense("mixtral")), str(adapter), str(out), "--format", "nf4", "--nested"]
    assert main(command) == 0
    expected = merged(dense("mixtral"), adapter, torch.float32)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    found = weight(out, name, packed_layout.Choice.of("nf4", None, True))
    packed = formats.quantize(expected.get_parameter(name).detach(), "nf4", nested=True)
    whole = packed.dequantize(torch.float32)
    assert (found - whole).norm() / whole.norm() < 2e-3


def test_an_adapter_for_each_expert(dense, tmp_path):
    """As those of models whose experts were modules; PEFT stacks it."""
    base, adapter = dense("qwen3_moe"), tmp_path / "adapter"
    generator = torch.Generator().manual_seed(0)
    made = {}
    for layer in range(2):
        for expert in range(6):
            for module, n, k in (("gate_proj", 64, 128), ("up_proj", 64, 128), ("down_proj", 128, 64)):
                name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{module}"
                made[f"{name}.lora_A.weight"] = torch.randn(2, k, generator=generator) / k**0.5
                made[f"{name}.lora_B.weight"] = torch.randn(n, 2, generator=generator) * 0.02
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["gate_proj", "up_proj", "down_proj"])
    config.save_pretrained(adapter)
    save_file(made, adapter / "adapter_model.safetensors")
    out = tmp_path / "out"
    assert main(["merge", str(base), str(adapter), str(out), "--format", "float32"]) == 0
    name = "model.layers.1.mlp.experts.3.up_proj"
    a, b = (made[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    found, before = tensors(out)[f"{name}.weight"], tensors(base)[f"{name}.weight"].float()
    assert torch.allclose(found - before, 2 * b @ a, atol=1e-6)


@pytest.mark.parametrize("signum", signals.ENDING, ids=signals.name)
def test_interrupted_goes_on(dense, tmp_path, monkeypatch, capsys, signum):
    monkeypatch.setattr(checkpoint_writer, "LARGEST", 100_000)
    adapter = adapt(dense("qwen3_moe"), tmp_path / "adapter", target_parameters=EXPERTS)
    command = ["merge", str(dense("qwen3_moe")), str(adapter)]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*command, str(whole)]) == 0
    expected = capsys.readouterr().out.splitlines()
    with monkeypatch.context() as patch:
        interrupt_in_file(patch, 4, signum)
        assert main([*command, str(out)]) == 128 + signum
    assert "the same command goes on" in capsys.readouterr().err and not out.exists()
    assert main([*command, str(out)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "from before" in told[-2]
    assert told[-1] == expected[-1] and told[:-2] == expected[:-2]
    assert digests(out) == digests(whole)


def _with(adapter, to, **changes):
    """The adapter with another configuration."""
    shutil.copytree(adapter, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return to


def test_a_tied_head_beside_the_adapter(tmp_path):
    """PEFT writes embeddings and head, which the base has once."""
    config = CONFIGS["qwen3_moe"]()
    config.tie_word_embeddings = True
    base = save(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), tmp_path / "base")
    assert "lm_head.weight" not in tensors(base)
    adapter = adapt(base, tmp_path / "adapter", target_parameters=EXPERTS)
    path = adapter / "adapter_model.safetensors"
    embeddings = tensors(base)["model.embed_tokens.weight"].float()
    copies = {f"base_model.model.{n}.weight": embeddings.clone() for n in ("model.embed_tokens", "lm_head")}
    save_file(load_file(path) | copies, path)
    assert main(["merge", str(base), str(adapter), str(tmp_path / "out")]) == 0
    assert tensors(tmp_path / "out").keys() == tensors(base).keys()


@pytest.mark.parametrize("command", ["merge", "quantize"])
def test_files_beside_are_looked_at_first(dense, tmp_path, capsys, command):
    base = tmp_path / "base"
    shutil.copytree(dense("qwen3_moe"), base)
    adapter = adapt(base, tmp_path / "adapter", target_parameters=EXPERTS)
    (base / "vocab.json").symlink_to("/no/such")
    given = [str(base), str(adapter)] if command == "merge" else [str(base)]
    more = [] if command == "merge" else ["--format", "nf4"]
    told = fails([command, *given, str(tmp_path / "out"), *more], capsys)
    assert f"cannot read {base / 'vocab.json'}: it is a link to nothing" in told
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()


def test_a_mount_point_is_refused(dense, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "out")
    told = fails(["quantize", str(dense("qwen3_moe")), str(tmp_path / "out"), "--format", "nf4"], capsys)
    assert "is a mount point" in told


def test_refusals(dense, tmp_path, capsys):
    base, out = dense("qwen3_moe"), tmp_path / "out"
    adapter = adapt(base, tmp_path / "adapter", target_parameters=EXPERTS, target_modules=["q_proj"])
    for number, (changes, expected) in enumerate(
        (
            ({"use_dora": True}, "has DoRA, whose magnitudes are no sum (use_dora)"),
            ({"bias": "all"}, "has trained biases (bias='all')"),
            ({"modules_to_save": ["lm_head"]}, "has modules that are trained as a whole (modules_to_save)"),
            ({"init_lora_weights": "pissa"}, "started from another base (pissa)"),
            ({"peft_type": "IA3"}, "is IA3, and only LoRA can be merged"),
            ({"r": 4}, "for model.layers.0"),
            ({"target_modules": ["q_proj", "k_proj"]}, "LoRA parameters of the model have no tensor in it"),
            ({"target_modules": ["v_proj"]}, "does not fit"),
            ({"target_modules": ["embed_tokens"], "target_parameters": []}, "does not fit"),
        )
    ):
        other = _with(adapter, tmp_path / f"adapter-{number}", **changes)
        assert expected in fails(["merge", str(base), str(other), str(out)], capsys), changes
    head = _with(adapter, tmp_path / "head")
    own = {"base_model.model.lm_head.weight": torch.zeros(264, 128)}
    save_file(load_file(head / "adapter_model.safetensors") | own, head / "adapter_model.safetensors")
    empty = _with(adapter, tmp_path / "empty")
    (empty / "adapter_model.safetensors").unlink()
    for given, expected in (
        ((base, "nosuch"), "nosuch is not an adapter of PEFT"),
        ((base, head), "has a lm_head.weight of its own, other than that of"),
        ((base, empty), "has no adapter_model.safetensors"),
        ((base, adapter, "--nested"), "--nested needs a --format, got same"),
        ((base, adapter, "--format", "int4"), "down_proj cannot be packed: K is 64"),
        (
            (dense("gpt_oss"), adapter),
            "[18, 64] and [128, 18] for model.layers.0.mlp.experts.down_proj, expected",
        ),
    ):
        assert expected in fails(["merge", str(given[0]), str(given[1]), str(out), *given[2:]], capsys)
    assert not out.exists() and not (tmp_path / "out.unfinished").exists()
