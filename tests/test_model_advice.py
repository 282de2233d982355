"""What PEFT leaves undone on experts, and what the report, `inspect` and `check_adapter` say of it."""

from pathlib import Path

import moelora
import pytest
import torch
from model_tiny import (
    CONFIGS,
    adapt,
    build,
    difference,
    logits,
    one_thread,  # noqa: F401  (autouse)
    wrappers,
)
from moelora import advice
from moelora.__main__ import main
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, NemotronHConfig, Qwen2MoeConfig
from transformers.models.qwen3_5_moe import Qwen3_5MoeConfig

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "moe_intermediate_size": 20,
    "num_experts_per_tok": 2,
}


def _qwen2_moe() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **_SIZES,
        intermediate_size=40,
        shared_expert_intermediate_size=20,
        num_experts=5,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


def _nemotron_h() -> nn.Module:
    config = NemotronHConfig(
        **_SIZES, layers_block_type=["moe", "moe"], n_routed_experts=5, n_shared_experts=1,
        moe_shared_expert_intermediate_size=20, head_dim=12, n_group=1, topk_group=1,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _adapted(model: nn.Module) -> list[str]:
    names = (name for name, module in model.named_modules() if module in wrappers(model))
    return [name.replace(".base_layer", "").removeprefix("base_model.model.") for name in names]


# ---- a part of the layers


@pytest.mark.parametrize(
    "limit",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"exclude_modules": ["model.layers.0.mlp.experts"]},
        {"exclude_modules": r".*layers\.0\..*"},
    ],
    ids=str,
)
def test_limits_that_peft_ignores_are_told_with_what_would_do_it(limit):
    text = str(moelora.enable(adapt(build("qwen3_moe"), **limit)))
    assert f"PEFT ignores {next(iter(limit))}=" in text
    assert "its LoRA is on 4 parameters of experts, not on 2." in text
    expression = text.split("target_parameters=")[1].split(" would do it")[0]
    config = LoraConfig(target_modules=[], target_parameters=eval(expression))
    model = get_peft_model(build("qwen3_moe"), config)
    assert set(_adapted(model)) == {"model.layers.1.mlp.experts"} and len(wrappers(model)) == 2
    assert not moelora.enable(model).notes


def test_limits_that_change_nothing_are_not_told():
    limit = {"exclude_modules": ["q_proj"], "layers_to_transform": [0, 1]}
    assert not moelora.enable(adapt(build("qwen3_moe"), **limit)).notes
    nothing = moelora.enable(adapt(build("qwen3_moe"), exclude_modules=["experts"])).notes
    assert "not on 0. Leave the experts out of target_parameters" in nothing[0]


def test_many_layers_are_a_range():
    names = [f"model.layers.{i}.mlp.experts.down_proj" for i in range(3, 40)] + ["experts.up_proj"]
    text = advice._instead(names)
    expression = text.removeprefix("target_parameters=").removesuffix(" would do it")
    assert len(text) < 140 and eval(expression) == names


# ---- adapters of single experts


def _per_expert_files(directory: Path) -> dict[str, torch.Tensor]:
    """As PEFT wrote them when each expert was three linear layers."""
    parts = {"gate_proj": (24, 20), "up_proj": (24, 20), "down_proj": (20, 24)}
    config = LoraConfig(r=2, lora_alpha=3, target_modules=list(parts))
    config.base_model_name_or_path, config.inference_mode = "", True
    config.save_pretrained(directory)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(2):
        for expert in ("shared_expert", *(f"experts.{i}" for i in range(5))):
            for name, (k, n) in parts.items():
                stem = f"base_model.model.model.layers.{layer}.mlp.{expert}.{name}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(2, k, generator=generator) * 0.3
                tensors[f"{stem}.lora_B.weight"] = torch.randn(n, 2, generator=generator) * 0.3
    save_file(tensors, directory / "adapter_model.safetensors")
    return tensors


def test_adapter_of_single_experts_that_peft_does_not_convert(tmp_path):
    """PEFT puts what it finds on the shared expert, and drops the rest without a warning."""
    files = _per_expert_files(tmp_path)
    model = PeftModel.from_pretrained(_qwen2_moe(), tmp_path)
    (note,) = moelora.enable(model).notes
    assert "target_modules of default (gate_proj, up_proj, down_proj) reaches no experts" in note
    assert "PEFT does not convert adapters of single experts for qwen2_moe" in note
    with pytest.raises(
        moelora.MoeloraError, match=r"8 of its 20 LoRA tensors have no place there.*qwen2_moe: "
    ):
        moelora.check_adapter(model, tmp_path)
    # What the note says:
    config = LoraConfig.from_pretrained(tmp_path)
    config.target_modules = {f"shared_expert.{name}" for name in config.target_modules}
    config.target_parameters = ["experts.gate_up_proj", "experts.down_proj"]
    assert f"target_parameters={config.target_parameters}" in note
    config.rank_pattern, config.alpha_pattern = {r".*\.gate_up_proj": 4}, {r".*\.gate_up_proj": 6}
    assert r"twice its r and its lora_alpha for '.*\.gate_up_proj'" in note
    model = PeftModel.from_pretrained(_qwen2_moe(), tmp_path, config=config)
    moelora.check_adapter(model, tmp_path)
    assert not moelora.enable(model).notes
    stem = "base_model.model.model.layers.1.mlp.experts.2.up_proj"
    delta = 1.5 * files[f"{stem}.lora_B.weight"] @ files[f"{stem}.lora_A.weight"]
    weight = _qwen2_moe().model.layers[1].mlp.experts.gate_up_proj[2, 20:] + delta
    merged = model.merge_and_unload().model.layers[1].mlp.experts.gate_up_proj[2, 20:]
    torch.testing.assert_close(merged, weight, rtol=1e-5, atol=1e-6)


def test_families_whose_single_experts_peft_converts():
    assert advice.unconverted(build("qwen3_moe")) is None
    assert advice.unconverted(build("mixtral_gelu")) is None
    assert advice.unconverted(build("gpt_oss")) is None  # never had any
    assert "for nemotron_h: merge them into the base" in advice.unconverted(_nemotron_h())


@pytest.mark.parametrize(("kind", "told"), [("qwen2_moe", True), ("qwen3_moe", False)])
def test_inspect_tells(kind, told, tmp_path, capsys):
    (_qwen2_moe().config if kind == "qwen2_moe" else CONFIGS[kind]()).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--no-measure"]) == 0
    text = capsys.readouterr().out
    assert ("PEFT does not convert adapters of single experts for qwen2_moe" in text) == told
    assert 'of some layers only: target_parameters=["model.layers.0.mlp.experts.gate_up_proj", ' in text


# ---- an adapter and a model of another class


@pytest.fixture(scope="module")
def whole_and_text():
    """Configuration of a model with images, whose text model has a class of its own."""
    text = _SIZES | {
        "head_dim": 12, "shared_expert_intermediate_size": 20, "num_experts": 5,
        "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
    config = Qwen3_5MoeConfig(text_config=text, vision_config=vision | {"patch_size": 4})
    return (lambda: AutoModelForImageTextToText.from_config(config)), (
        lambda: AutoModelForCausalLM.from_config(config)
    )


def test_adapter_of_the_text_model_on_the_whole_model(whole_and_text, tmp_path):
    whole, text = whole_and_text
    adapt(text()).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = whole()
    expected = logits(model)
    model = PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(model), expected)
    report = moelora.enable(model)
    assert "THE LORA ON THE EXPERTS CHANGES NOTHING: every B is zero" in str(report)
    assert all(adapter.zero for layer in report.layers for adapter in layer.adapters)
    with pytest.raises(moelora.MoeloraError) as caught:
        moelora.check_adapter(model, tmp_path)
    message = str(caught.value)
    assert "does not fit Qwen3_5MoeForConditionalGeneration: 8 of its 8 LoRA tensors have no place" in message
    assert "8 LoRA parameters have no tensor in it" in message
    mapping = eval(message.split("key_mapping=")[1].split(") loads it here")[0])
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(whole(), tmp_path, key_mapping=mapping)
    assert "CHANGES NOTHING" not in str(moelora.enable(model))
    moelora.check_adapter(model, tmp_path, key_mapping=mapping)
    assert difference(logits(model), expected) > 1e-3


def test_an_adapter_that_fits_is_not_told_of(tmp_path):
    model = adapt(build("qwen3_moe"), targets=["o_proj"])
    model.save_pretrained(tmp_path)
    moelora.check_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(build("qwen3_moe"), tmp_path)
    moelora.enable(loaded)
    moelora.check_adapter(loaded, tmp_path)
    assert "CHANGES NOTHING" not in str(moelora.report(loaded))


def test_a_new_adapter_is_told_to_change_nothing_yet():
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    report = moelora.enable(get_peft_model(build("qwen3_moe"), config))
    assert "down_proj r=2 (B is zero: changes nothing yet; no gradient yet)" in str(report)
    assert "CHANGES NOTHING" not in str(report)  # it is to be trained
