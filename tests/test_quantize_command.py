"""`python -m moelora quantize`: what it writes is what `formats.quantize` makes, of every kind of source."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

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
from filelock import FileLock
from finetune_tiny import fails
from model_tiny import one_thread  # noqa: F401  (autouse)
from moelora import checkpoint_writer, model_names, packed_layout, packing
from moelora.__main__ import main
from moelora.commands import signals
from moelora.packed_layout import Choice, Layout
from moelora.shards import Spec
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from torch_moelora import formats

PACKED = [*packed_layout.formats(), "nf4-nested", "fp4-nested"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """kind → a dense checkpoint in two or more files."""
    made = {}

    def make(kind: str):
        if kind not in made:
            directory = tmp_path_factory.mktemp("dense") / kind
            made[kind] = save(model(kind), directory, max_shard_size="200KB")
        return made[kind]

    return make


def arguments(form: str) -> list[str]:
    name = form.removesuffix("-nested")
    group = ["--group-size", "32"] if name in ("nf4", "fp4", "int4", "int8") else []
    return ["--format", name, *group, *(["--nested"] if form.endswith("-nested") else [])]


def layout(out) -> Layout:
    return packed_layout.read(json.loads((out / "config.json").read_text())["quantization_config"])


def expected(kind: str, choice: Choice) -> dict[str, torch.Tensor]:
    """The tensors of the experts, quantised as a whole."""
    made = model(kind)
    found = {}
    for name, module in model_names.Names(made).experts().items():
        whole = model_names.oriented(module, made.get_parameter(name)).detach()
        found |= packed_layout.tensors(
            name, formats.quantize(whole, choice.format, choice.group_size or None, choice.nested)
        )
    return found


# A format does not see where the weight came from.
PAIRS = [("qwen3_moe", form) for form in PACKED]
PAIRS += [(kind, form) for kind in list(CONFIGS)[1:] for form in ("nf4-nested", "nvfp4")]


@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_experts_are_quantised_to_the_bit(dense, tmp_path, monkeypatch, kind, form):
    """However they lie in the source, in blocks of a few experts or of some rows of one."""
    monkeypatch.setattr(packing, "NUMBERS", 40_000)
    out = tmp_path / "out"
    assert main(["quantize", str(dense(kind)), str(out), *arguments(form), "--threads", "3"]) == 0
    there, wanted = tensors(out), expected(kind, layout(out).experts)
    assert {name for name in there if "experts.gate_up" in name or "experts.down" in name} >= set(wanted)
    for name, tensor in wanted.items():
        assert there[name].dtype == tensor.dtype
        assert there[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name
    source = tensors(dense(kind))
    for name in there.keys() - wanted.keys():
        assert there[name].equal(source[name]), name  # router, norms, embeddings, biases
    assert not [name for name in there if "experts.0." in name]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == there.keys()


@pytest.mark.parametrize("form", PACKED)
def test_rows_of_large_experts(tmp_path, monkeypatch, form):
    """An expert that is more than is packed at once: the same, but nvfp4 has a multiplier for each part."""
    monkeypatch.setattr(packing, "NUMBERS", 1 << 14)
    monkeypatch.setattr(packing, "WHOLE", 1 << 15)
    made = CONFIGS["qwen3_moe"]()
    made.moe_intermediate_size, made.hidden_size, made.num_experts = 320, 128, 2
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(made).bfloat16()
    out = tmp_path / "out"
    assert main(["quantize", str(save(base, tmp_path / "in")), str(out), *arguments(form)]) == 0
    choice, there = layout(out).experts, tensors(out)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole = base.get_parameter(name).detach()
    if choice.format == "nvfp4":
        assert there[f"{name}.scale2"].shape == (2, 4)
        parts = [formats.quantize(part, "nvfp4") for part in whole.split(160, 1)]
        assert weight(out, name, choice).equal(
            torch.cat([part.dequantize(torch.float32) for part in parts], 1)
        )
        return
    packed = formats.quantize(whole, choice.format, choice.group_size or None, choice.nested)
    for part, tensor in packed_layout.tensors(name, packed).items():
        assert there[part].view(torch.uint8).equal(tensor.view(torch.uint8)), part


def test_gpt_oss_as_it_is_published(dense, tmp_path, capsys):
    """Its own MXFP4: into our layout to the bit, and from what transformers unpacks into another format."""
    source, same, other = tmp_path / "in", tmp_path / "same", tmp_path / "other"
    shutil.copytree(dense("gpt_oss"), source)
    written, blocks = tensors(source), {}
    for path in source.glob("*.safetensors*"):
        path.unlink()
    for name in [name for name in written if name.endswith("_proj") and "experts" in name]:
        packed = formats.quantize(written.pop(name).transpose(1, 2).contiguous(), "mxfp4")
        blocks[f"{name}_blocks"] = packed.codes.unflatten(2, (-1, 16))
        blocks[f"{name}_scales"] = packed.scale
    save_file(written | blocks, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (source / "config.json").write_text(json.dumps(config))
    assert main(["quantize", str(source), str(same), "--format", "mxfp4"]) == 0
    assert main(["quantize", str(source), str(other), *arguments("int8")]) == 0
    assert "is packed already (mxfp4, groups of 32)" in capsys.readouterr().err
    assert layout(same) == Layout(Choice.of("mxfp4"))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    unpacked = convert_moe_packed_tensors(blocks[f"{name}_blocks"], blocks[f"{name}_scales"])
    unpacked = unpacked.transpose(1, 2).float()
    assert weight(same, name, layout(same).experts).equal(unpacked)
    wanted = formats.quantize(unpacked, "int8", 32).dequantize(torch.float32)
    assert weight(other, name, layout(other).experts).equal(wanted)
    assert moelora.from_pretrained(same)(torch.arange(8)[None]).logits.isfinite().all()


DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("form", "part", "change", "told"),
    [
        ("nf4-nested", "scale2", lambda t: t.flatten(), "scale2 must have shape [6, 2]"),
        ("nf4-nested", "scale2", None, "scale2 must be given"),
        ("nf4-nested", "scale", None, "scale is missing (found codes, scale2)"),
        ("nf4-nested", "codes", lambda t: t.to(torch.int32), "codes must have dtype torch.uint8"),
        ("int4", "scale", lambda t: t.double(), "scale must have dtype torch.float32, torch.bfloat16 or"),
        ("int4", "scale", lambda t: t[:, :, :1].clone(), "expected [6, 128, 2], got [6, 128, 1]"),
        ("int4", "zero", lambda t: t[:, :, :1].clone(), "zero must have shape [6, 128, 2]"),
        ("nvfp4", "scale2", lambda t: t.repeat(1, 3), "scale2 must have shape [6, P] with P that divides"),
        ("nvfp4", "zero", lambda t: t, "zero must be None"),
        ("nf4", "scale", lambda t: t.byte(), "scale2 must be given"),
    ],
    ids=range(10),
)
def test_a_packed_source_that_is_not_what_it_should_be(dense, tmp_path, capsys, form, part, change, told):
    source = tmp_path / "in"
    assert main(["quantize", str(dense("qwen3_moe")), str(source), *arguments(form)]) == 0
    every = tensors(source)
    for path in source.glob("*.safetensors*"):
        path.unlink()
    zero = torch.zeros(every[f"{DOWN}.scale"].shape, dtype=torch.uint8)
    found = every.pop(f"{DOWN}.{part}", zero)
    if change is not None:
        every[f"{DOWN}.{part}"] = change(found)
    save_file(every, source / "model.safetensors", metadata={"format": "pt"})
    line = fails(["quantize", str(source), str(tmp_path / "out"), "--format", "int8"], capsys)
    assert DOWN in line and told in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_nested_source_that_is_said_not_to_be(dense, tmp_path, capsys):
    source = tmp_path / "in"
    assert main(["quantize", str(dense("qwen3_moe")), str(source), *arguments("nf4-nested")]) == 0
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["experts"]["nested"] = False
    (source / "config.json").write_text(json.dumps(config))
    line = fails(["quantize", str(source), str(tmp_path / "out"), "--format", "int8"], capsys)
    assert "experts.down_proj.scale2 in" in line and "expected nothing, got [6, 2]" in line


def test_a_source_that_changed(dense, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint_writer, "LARGEST", 60_000)
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(dense("qwen3_moe"), source)
    command = ["quantize", str(source), str(out), *arguments("nf4")]
    with monkeypatch.context() as patch:
        interrupt_in_file(patch, 2)
        assert main(command) == 143
    (source / "config.json").touch()
    told = fails(command, capsys)
    assert "is an unfinished run with another source: remove it to start anew" in told


def test_it_shows_how_far_it_is(dense, tmp_path, capsys):
    """On the standard error: what is printed may go to a file."""
    assert main(["quantize", str(dense("qwen3_moe")), str(tmp_path / "out"), *arguments("int8")]) == 0
    printed = capsys.readouterr()
    assert "quantize: 100%" in printed.err and "100%" not in printed.out


def test_no_space(dense, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    command = ["quantize", str(dense("qwen3_moe")), str(tmp_path / "out"), *arguments("nf4")]
    assert "has 0.0 GB free, expected the 0.0 GB that are to be written" in fails(command, capsys)
    assert not list(tmp_path.iterdir())


def test_errors_are_told(dense, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", str(dense("gpt_oss")), str(out), "--format", "int8", "--linears", "nf4"]) == 0
    told = capsys.readouterr().out
    errors = json.loads((out / "quantization_errors.json").read_text())
    made, choices = model("gpt_oss"), layout(out)
    for name in ("model.layers.0.mlp.experts.down_proj", "model.layers.1.self_attn.k_proj.weight"):
        original = made.get_parameter(name).detach().float()
        original = original.transpose(1, 2) if "experts" in name else original[None]
        found = weight(out, name, choices.experts if "experts" in name else choices.linears)
        assert found.shape == original.shape
        error = ((found - original).norm() / original.norm()).item()
        assert errors[name] == pytest.approx(error, rel=1e-5)
    assert 0.003 < errors["model.layers.0.mlp.experts.down_proj"] < 0.02
    assert 0.05 < errors["model.layers.1.self_attn.k_proj.weight"] < 0.15
    row = next(
        line for line in told.splitlines() if line.startswith("model.layers.*.self_attn.k_proj.weight")
    )
    assert "nf4, groups of 64" in row and "4.50" in row and row.count("%") == 2
    assert len(errors) == 12 and "lm_head.weight" not in errors


def test_packed_again_says_that_errors_add(dense, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert (
        main(["quantize", str(dense("qwen3_moe")), str(first), *arguments("nf4-nested"), "--linears", "int8"])
        == 0
    )
    capsys.readouterr()
    assert main(["quantize", str(first), str(second), *arguments("int8")]) == 0
    assert "is packed already (nf4, groups of 32, nested): the errors below are" in capsys.readouterr().err
    name = "model.layers.1.mlp.experts.down_proj"
    before, now = layout(first), layout(second)
    wanted = formats.quantize(weight(first, name, before.experts), "int8", 32)
    assert weight(second, name, now.experts).equal(wanted.dequantize(torch.float32))
    assert now.linears == before.linears
    linear = "model.layers.1.self_attn.q_proj.weight.codes"
    assert tensors(second)[linear].equal(tensors(first)[linear])
    assert not [key for key in tensors(second) if key.endswith("experts.down_proj.scale2")]


@pytest.mark.parametrize("kind", CONFIGS)
def test_loaded_it_computes_what_its_weights_say(tmp_path, kind):
    """Packed experts and linear layers, beside transformers' own experts on what they unpack to."""
    source = save(model(kind, torch.float32), tmp_path / "in")
    out = tmp_path / "out"
    assert main(["quantize", str(source), str(out), "--format", "nf4", "--nested", "--linears", "int8"]) == 0
    plain, choices = AutoModelForCausalLM.from_pretrained(source), layout(out)
    names = model_names.Names(plain)
    with torch.no_grad():
        for name, module in names.experts().items():
            unpacked = weight(out, name, choices.experts)
            plain.get_parameter(name).copy_(model_names.oriented(module, unpacked))
        for name in names.linears():
            plain.get_parameter(name).copy_(weight(out, name, choices.linears)[0])
        tokens = torch.arange(24)[None]
        expected, found = plain(tokens).logits, moelora.from_pretrained(out)(tokens).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_second_process_is_told(dense, tmp_path, capsys):
    out = tmp_path / "out"
    partial = tmp_path / "out.unfinished"
    partial.mkdir()
    with FileLock(partial / ".lock"):
        told = fails(["quantize", str(dense("qwen3_moe")), str(out), *arguments("nf4")], capsys)
    assert "another process is writing" in told
    (partial / "mine.txt").write_text("mine")
    told = fails(["quantize", str(dense("qwen3_moe")), str(out), *arguments("nf4")], capsys)
    assert "has mine.txt in it, which no run wrote: move it away" in told
    assert (partial / "mine.txt").read_text() == "mine"


def test_a_piece_that_fails_while_others_are_written(tmp_path):
    """Its file stays open for them: the number of a closed one may be another file's by then."""
    late = []

    class Item:
        def __init__(self):
            self.specs = {"a": Spec(torch.uint8, (2,))}

        def write(self, file, pool):
            failed = threading.Event()

            def fail():
                failed.set()
                raise ValueError("this piece")

            def wait():
                failed.wait()
                time.sleep(0.1)
                file.write("a", 1, torch.ones(1, dtype=torch.uint8))
                late.append(True)

            waiting, failing = pool.submit(wait), pool.submit(fail)
            return failing.result(), waiting.result()

    with pytest.raises(ValueError, match="this piece"):
        checkpoint_writer.write(tmp_path / "out", [Item()], {}, lambda *_: None, 2, "test")
    assert late == [True] and not list(tmp_path.iterdir())


def test_killed_before_its_first_record(tmp_path):
    """What is there then is the run's own."""
    partial = tmp_path / "out.unfinished"
    partial.mkdir()
    (partial / ".run.json.new").write_text("{")
    written = checkpoint_writer.write(tmp_path / "out", [], {}, lambda *_: None, 1, "test")
    assert written.files == 0 and (tmp_path / "out").is_dir()


@pytest.mark.slow
def test_killed_at_any_time(dense, tmp_path, monkeypatch, capsys):
    """SIGKILL leaves nothing under the name, and what it leaves is gone on from."""
    source, out, whole = dense("qwen3_moe"), tmp_path / "out", tmp_path / "whole"
    assert main(["quantize", str(source), str(whole), *arguments("nf4-nested")]) == 0
    script = (
        "import os, sys, moelora.checkpoint_writer as w; w.LARGEST = 60_000; real = w._finish; made = []\n"
        "def finish(*a):\n"
        "    real(*a); made.append(1)\n"
        "    len(made) == 3 and os.kill(os.getpid(), 9)\n"
        "w._finish = finish\n"
        "from moelora.__main__ import main; main(sys.argv[1:])"
    )
    command = ["quantize", str(source), str(out), *arguments("nf4-nested")]
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, timeout=300)
    assert done.returncode == -9 and not out.exists()
    assert len(json.loads((tmp_path / "out.unfinished" / ".run.json").read_text())["files"]) == 3
    monkeypatch.setattr(checkpoint_writer, "LARGEST", 60_000)
    assert main(command) == 0
    assert "3 of them from before" in capsys.readouterr().out
    assert {k: v.tolist() for k, v in tensors(out).items()} == {
        k: v.tolist() for k, v in tensors(whole).items()
    }


@pytest.mark.long
def test_memory_stays_bounded(tmp_path):
    """A layer of a real model: 1.2 GB of experts, most of it in one tensor."""
    script = "import resource, sys; from moelora.__main__ import main; assert main(sys.argv[1:]) == 0; "
    script += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"

    def peak(*command: str) -> int:
        done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    dense_dir, out = str(tmp_path / "in"), str(tmp_path / "out")
    shape = ["qwen3-30b-a3b", dense_dir, "--layers", "1", "--format", "bf16"]
    assert peak("synthesize", *shape) < 2000
    assert peak("quantize", dense_dir, out, "--format", "int8", "--linears", "int8") < 2000


def test_other_files_come_along(dense, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(dense("qwen3_moe"), source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("run.json", "lock"):
        (source / name).write_text("{}")
    out = tmp_path / "out"
    assert main(["quantize", str(source), str(out), *arguments("nf4")]) == 0
    names = {path.name for path in out.iterdir() if path.suffix != ".safetensors"}
    assert names == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "model.safetensors.index.json", "quantization_errors.json"),
        *("run.json", "lock"),
    }
    config, before = (json.loads((d / "config.json").read_text()) for d in (out, source))
    assert config.pop("quantization_config")["experts"] == {
        "format": "nf4",
        "group_size": 32,
        "nested": False,
    }
    assert config == before


@pytest.mark.parametrize("signum", signals.ENDING, ids=signals.name)
def test_interrupted_goes_on(dense, tmp_path, monkeypatch, capsys, signum):
    monkeypatch.setattr(checkpoint_writer, "LARGEST", 60_000)
    command = ["quantize", str(dense("qwen3_moe"))]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*command, str(whole), *arguments("nf4-nested")]) == 0
    with monkeypatch.context() as patch:
        interrupt_in_file(patch, 3, signum)
        assert main([*command, str(out), *arguments("nf4-nested")]) == 128 + signum
    assert "the same command goes on" in capsys.readouterr().err
    assert not out.exists()
    assert "another layout" in fails([*command, str(out), *arguments("nf4")], capsys)
    assert main([*command, str(out), *arguments("nf4-nested")]) == 0
    told = capsys.readouterr().out
    assert "3 of them from before" in told and "model.layers.*.mlp.experts.gate_up_proj" in told
    assert digests(out) == digests(whole)


def test_refusals(dense, tmp_path, capsys):
    source, out = tmp_path / "in", str(tmp_path / "out")
    shutil.copytree(dense("qwen3_moe"), source)

    def told(*given: str) -> str:
        return fails(["quantize", *given], capsys)

    assert "--format is bf16, expected one of nf4" in told(str(source), out, "--format", "bf16")
    assert "nosuch is not a directory" in told("nosuch", out, "--format", "nf4")
    misfit = told(str(source), out, "--format", "int4")
    assert "down_proj cannot be packed: K is 64, which int4, groups of 128 do not fit (groups of 64" in misfit
    everything = tensors(source)
    for path in source.glob("*.safetensors*"):
        path.unlink()
    up = "model.layers.1.mlp.experts.3.up_proj.weight"
    infinite = everything[up].where(torch.arange(128) != 5, torch.inf)
    for name, value, expected in (
        (up, None, "the tensors of model.layers.1.mlp.experts.gate_up_proj in"),
        ("model.norm.weight", None, "lacks weights of its model: model.norm.weight"),
        (up, infinite, "gate_up_proj cannot be packed: quantize: weight must be finite"),
        (up, everything[up].to(torch.float8_e4m3fn), "expected bfloat16, float16 or float32"),
    ):
        kept = {k: v for k, v in {**everything, name: value}.items() if v is not None}
        save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
        assert expected in told(str(source), out, "--format", "nf4")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    assert "is quantised by gptq, expected a dense checkpoint" in told(str(source), out, "--format", "nf4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
