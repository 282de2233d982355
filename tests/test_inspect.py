"""`python -m moelora inspect`: what it says of a checkpoint, against the model itself."""

import re

import moelora
import pytest
import torch
from model_tiny import (
    CONFIGS,
    adapt,
    build,
    one_thread,  # noqa: F401  (autouse)
)
from moelora import checkpoints
from moelora.__main__ import main
from moelora.commands import inspect, lora
from safetensors.torch import save_file
from transformers import LlamaConfig


def _told(capsys, *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("which", ["both", "gate_up", "down"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_numbers_are_those_of_the_adapted_model(kind, which, tmp_path, capsys):
    CONFIGS[kind]().save_pretrained(tmp_path)  # no weights are needed
    text = _told(capsys, tmp_path, "--rank", 7, "--projections", which, "--no-measure")
    model = build(kind)
    total = checkpoints.count(model)
    adapted = lora.adapt(model, 7, 14.0, which, [])
    trainable = checkpoints.count(adapted, trainable=True)
    assert f"{type(model).__name__}, {total / 1e6:.2f} M parameters, float32" in text
    assert f"rank 7 on {which}: {trainable / 1e6:.2f} M trainable parameters" in text
    groups = list(inspect._groups(*checkpoints.outline(tmp_path)))
    assert sum(group.trainable(7, which) for group in groups) == trainable
    assert sum(group.parameters for group in groups) == sum(
        p.numel() for name, p in build(kind).named_parameters() if "experts" in name
    )
    (row,) = [line for line in text.splitlines() if line.startswith("model.layers.*.mlp.experts  ×2")]
    layer = moelora.enable(adapted).layers[0]
    assert layer.kind in row and "5, 2 a token" in row and "operators" in row
    assert ("interleaved" in row) == (kind == "gpt_oss")
    assert "no expert weights" in text and "\ntime" not in text


def test_kept_memory_is_what_autograd_keeps():
    """Of the sizes that grow with the tokens, by twice as many tokens."""
    (group,) = inspect._groups(build("qwen3_moe"), CONFIGS["qwen3_moe"]())
    model = adapt(build("qwen3_moe"))
    moelora.enable(model)
    layer = model.get_base_model().model.layers[0].mlp.experts

    def kept(tokens: int) -> int:
        storages = {}
        hooks = lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t  # noqa: E731
        x = torch.randn(tokens, 24, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(hooks, lambda t: t):
            y = layer(x, torch.randint(5, (tokens, 2)), torch.rand(tokens, 2, requires_grad=True))
        assert y.shape == x.shape
        return sum(storages.values())

    grown = kept(400) - kept(200)
    assert grown == pytest.approx(group.kept(200) / group.count, rel=0.1)


def test_time_is_measured(tmp_path, capsys):
    CONFIGS["qwen3_moe"]().save_pretrained(tmp_path)
    text = _told(capsys, tmp_path, "--tokens", 32)
    whole, experts, rest = map(float, re.findall(r"([\d.e-]+) s (?:a step|in the)", text))
    assert whole == pytest.approx(experts + rest, rel=0.1) and experts > 0


def test_stored_layouts(tmp_path):
    matrix = torch.zeros(2, 2)
    single = {f"model.layers.0.mlp.experts.{e}.up_proj.weight": matrix.clone() for e in range(3)}
    save_file(single | {"lm_head.weight": matrix}, tmp_path / "model.safetensors")
    assert (
        inspect.stored(tmp_path)
        == "3 matrices of single experts, F32: transformers merges them while loading"
    )
    fused = {"model.layers.0.mlp.experts.gate_up_proj": matrix.bfloat16()}
    save_file(fused, tmp_path / "model.safetensors")
    assert (
        inspect.stored(tmp_path)
        == "1 tensors of all experts, BF16: loading them in their dtype maps the files"
    )
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(moelora.MoeloraError, match="cannot read the header of "):
        inspect.stored(tmp_path)


def test_errors(tmp_path, capsys):
    assert main(["inspect", "/no/such"]) == 2
    assert "/no/such is not a directory, expected a local transformers checkpoint" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "expected a config.json in it" in capsys.readouterr().err
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds a LlamaForCausalLM, which has no expert layers" in capsys.readouterr().err
