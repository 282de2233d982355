"""`python -m moelora inspect`: what it says of a checkpoint, against the model itself."""

import re
from dataclasses import replace

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
from moelora.commands import inspect, lora, memory
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.masking_utils import sdpa_mask


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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(checkpointing):
    """Bytes of every storage that is saved for the backward of a real step."""
    model = adapt(build("qwen3_moe"), rank=4, targets=["q_proj"])
    moelora.enable(model)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    storages, alive = {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    ids = torch.randint(1, 64, (2, 32))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(input_ids=ids, use_cache=False, logits_to_keep=1)
    found = sum(size for pointer, size in storages.items() if pointer not in own)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"]())
    plan = memory.Plan(4, "both", ("q_proj",), 2, 32)
    kept = memory.Estimator(outline, memory.Base(0, 0), plan).kept
    estimate = kept.layer_inputs if checkpointing else kept.activations
    assert found <= estimate <= 1.1 * found
    assert kept.parameters == checkpoints.count(model, trainable=True)


@pytest.mark.parametrize("window", [None, 7, 8, 9])
def test_masks_are_those_of_a_batch_without_padding(window):
    expected = sdpa_mask(1, 8, 8, local_size=window)
    assert (memory._mask_without_values(1, 8, 8, local_size=window) is None) == (expected is None)


@pytest.mark.parametrize("slow", [False, True])
def test_what_multiplies_in_float32_is_planned_so(slow, monkeypatch):
    """A model without storage is taken for what it will be on the CPU: attention keeps float32 there."""
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: not slow)
    found = {}
    for device in ("cpu", "meta"):
        model = build("gpt_oss", torch.bfloat16).to(device)
        plan = memory.Plan(4, "both", ("q_proj",), 2, 32)
        found[device] = memory.Estimator(model, memory.Base(0, 0), plan).kept
    assert found["cpu"] == found["meta"]
    heads, scores = model.config.num_attention_heads, 2 * 32 * 32
    if slow:
        assert found["meta"].activations >= model.config.num_hidden_layers * heads * scores * 4


def test_layers_beyond_the_first_ones_are_like_them():
    config = CONFIGS["qwen3_moe"]()
    found = {}
    for layers in (8, 20):
        config.num_hidden_layers = layers
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(config)
        plan = memory.Plan(4, "both", (), 1, 16)
        found[layers] = memory.Estimator(outline, memory.Base(0, 0), plan).kept
    assert found[20].parameters == found[8].parameters * 20 / 8
    assert found[20].activations == pytest.approx(found[8].activations + 12 * found[8].layer)


def test_less_rank_leaves_the_other_one_alone():
    """--rank is that of the experts where the other layers have a --target-rank."""
    found = []
    for rank in (8, 4):
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"]())
        plan = memory.Plan(rank, "both", ("q_proj",), 1, 16, target_rank=2)
        found.append(memory.Estimator(outline, memory.Base(0, 0), plan))
    more, less = found
    assert more.kept.fixed == less.kept.fixed > 0
    expected, told = less.memory(), more.memory(replace(more.plan, rank=4))
    assert (told.lora, told.gradients, told.moments) == (expected.lora, expected.gradients, expected.moments)


def _estimator(base: memory.Base, plan: memory.Plan) -> memory.Estimator:
    """Without a model: 1 GB of LoRA parameters in float32, 10 GB of activations."""
    estimator = object.__new__(memory.Estimator)
    estimator.base, estimator.plan, estimator.process, estimator.vocabulary = base, plan, 10**9, 1000
    estimator.head = None
    estimator.kept = memory.Kept(2.5e8, 2.5e6, 10e9, 1e8, 1e9)
    return estimator


def test_advice():
    plan = memory.Plan(8, "both", (), 1, 512)
    estimator = _estimator(memory.Base(20 * 10**9, 0, 5 * 10**9), plan)
    whole = estimator.memory()
    assert (whole.lora, whole.gradients, whole.moments) == (10**9, 10**9, 2 * 10**9)
    assert whole.total == 20e9 + 4e9 + (10e9 + 1e9) + whole.logits + 1e9 + memory.DATA
    assert f"{whole.total / 1e9:.2f} GB at the peak: 20.00 GB weights, 1.00 GB LoRA" in whole.told()
    assert estimator.advice(whole.total)[0].startswith("fits into the ")
    one = estimator.advice(whole.total - 10**8)
    assert one[0].startswith("DOES NOT FIT") and "--gradient-checkpointing" in one[1]
    assert "--step-in-backward" in one[1] and "--rank 4" in one[1] and "quantize" in one[1]
    several = estimator.advice(16 * 10**9)[1]
    assert "`quantize --format nf4 --nested` --gradient-checkpointing together" in several
    assert estimator.advice(10**9)[1].startswith("nor with")
    packed = _estimator(memory.Base(2 * 10**9, 18 * 10**9), replace(plan, checkpointing=True))
    assert "if each step reads weights from disk" in packed.advice(21 * 10**9)[0]


def test_time_is_measured(tmp_path, capsys):
    CONFIGS["qwen3_moe"]().save_pretrained(tmp_path)
    text = _told(capsys, tmp_path, "--tokens", 32)
    whole, experts, rest = map(float, re.findall(r"([\d.e-]+) s (?:a step|in the)", text))
    assert whole == pytest.approx(experts + rest, rel=0.1) and experts > 0


@pytest.mark.parametrize("slow", [False, True])
def test_time_is_that_of_what_computes(slow, tmp_path, capsys, monkeypatch):
    """Where torch's products in 16 bits take hours, nothing waits for one."""
    CONFIGS["qwen3_moe"]().save_pretrained(tmp_path)
    called = []
    monkeypatch.setattr(inspect, "slow_in_torch", lambda weight: slow)
    for name in ("linear", "linear_lora"):
        monkeypatch.setattr(inspect, name, lambda x, w, name=name: called.append(name) or x)
    _told(capsys, tmp_path, "--tokens", 32)
    assert set(called) == {"linear_lora" if slow else "linear"}


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
