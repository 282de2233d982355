"""Kimi-K2's checkpoints, which name code of their own: transformers' DeepSeek-V3 without that code."""

import json
import shutil
from pathlib import Path

import moelora
import pytest
import torch
from finetune_tiny import TEXT
from model_tiny import one_thread, tokens  # noqa: F401  (one_thread: autouse)
from moelora import checkpoints
from moelora.__main__ import main
from moelora.commands import default_model
from moelora.errors import MoeloraError
from packed_files import LAYOUTS, save, write
from packed_models import adapted, experts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

CODE = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
# Of the published config.json, beside sizes.
PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"], "auto_map": CODE, "model_type": "kimi_k2",
    "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "moe_layer_freq": 1, "pretraining_tp": 1,
    "num_nextn_predict_layers": 0, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "norm_topk_prob": True, "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "rope_scaling": {
        "beta_fast": 1.0, "beta_slow": 1.0, "factor": 64.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip
SIZES = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
    "first_k_dense_replace", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim", "n_group", "topk_group", "vocab_size", "max_position_embeddings",
)  # fmt: skip
TRAP = 'raise AssertionError("code of the checkpoint has run")\n'


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def published(packed: Path) -> dict:
    """What Kimi-K2's config.json says, with the sizes of the tiny model that `packed` is."""
    own = config_of(packed)
    same = {name: own[name] for name in SIZES} | {"quantization_config": own["quantization_config"]}
    return PUBLISHED | same | {"tie_word_embeddings": False, "hidden_act": "silu"}


def trapped(directory: Path, config: dict) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    for name in (
        "configuration_deepseek.py",
        "modeling_deepseek.py",
        "configuration_kimi_k25.py",
        "modeling_kimi_k25.py",
    ):
        (directory / name).write_text(TRAP)
    default_model.byte_tokenizer().save_pretrained(directory)
    return directory


def inside(packed: Path, weights: Path, directory: Path) -> Path:
    """Kimi-K2.5: the same as a part of a model that sees."""
    directory.mkdir()
    tensors = {}
    for path in weights.glob("*.safetensors"):
        tensors |= {f"language_model.{name}": tensor for name, tensor in load_file(path).items()}
    tensors["vision_tower.encoder.blocks.0.wo.weight"] = torch.zeros(8, 8)
    tensors["mm_projector.proj.0.weight"] = torch.zeros(8, 8)
    save(directory, tensors)
    code = {
        "AutoConfig": "configuration_kimi_k25.KimiK25Config",
        "AutoModel": "modeling_kimi_k25.KimiK25Model",
    }
    text = published(packed)
    whole = {
        "architectures": ["KimiK25ForConditionalGeneration"], "auto_map": code, "model_type": "kimi_k25",
        "text_config": text, "vision_config": {"patch_size": 14}, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "media_placeholder_token_id": 63,
    }  # fmt: skip
    return trapped(directory, whole)


@pytest.fixture(scope="module")
def kimi(tmp_path_factory):
    """(K2, K2.5, a dense DeepSeek-V3 of the same numbers)."""
    home = tmp_path_factory.mktemp("kimi")
    write(LAYOUTS["compressed int4"], home / "k2", home / "dense", vocab_size=257)
    dense = config_of(home / "k2") | {
        name: value for name, value in published(home / "k2").items()
        if name not in ("auto_map", "model_type", "quantization_config")
    }  # fmt: skip
    del dense["quantization_config"], dense["rope_parameters"]
    (home / "dense" / "config.json").write_text(json.dumps(dense))
    k25 = inside(home / "k2", home / "k2", home / "k25")
    return trapped(home / "k2", published(home / "k2")), k25, home / "dense"


@pytest.mark.parametrize("which", ["k2", "k25"])
@pytest.mark.parametrize("trust", [False, True])
def test_it_trains_as_the_dense_model_of_its_numbers(which, trust, kimi, tmp_path):
    packed = moelora.from_pretrained(kimi[which == "k25"], cache_dir=tmp_path, trust_remote_code=trust)
    models = [adapted(packed), adapted(AutoModelForCausalLM.from_pretrained(kimi[2]))]
    reports = [moelora.enable(model, linears=True) for model in models]
    assert {row.format for row in reports[0].layers} == {"int4"} and len(experts(packed)) == 1
    found = []
    for model in models:
        out = model(input_ids=tokens(), labels=tokens())
        out.loss.backward()
        found.append(
            (out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
    (logits, grads), (expected, wanted) = found
    assert torch.equal(logits, expected) and grads.keys() == wanted.keys() and len(grads) >= 4
    assert all(torch.equal(grads[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("which", ["k2", "k25"])
def test_what_is_saved_is_a_deepseek(which, kimi, tmp_path):
    """transformers alone reads it, and so do the commands that write checkpoints."""
    model = moelora.from_pretrained(kimi[which == "k25"], cache_dir=tmp_path / "cache")
    model.save_pretrained(tmp_path / "saved")
    told = config_of(tmp_path / "saved")
    assert told["model_type"] == "deepseek_v3" and "auto_map" not in told
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    assert main(["quantize", str(tmp_path / "saved"), str(tmp_path / "nf4"), "--format", "nf4"]) == 0


@pytest.mark.parametrize("which", ["k2", "k25"])
def test_the_commands_read_it(which, kimi, tmp_path, capsys, monkeypatch):
    directory = kimi[which == "k25"]
    monkeypatch.setattr("moelora.cache.HF_HOME", str(tmp_path))
    assert main(["inspect", str(directory), "--rank", "2"]) == 0
    assert "DeepseekV3ForCausalLM" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = [
        *("finetune", "--model", str(directory), "--data", str(tmp_path / "text.txt"), "--steps", "2"),
        *("--output", str(tmp_path / "out"), "--rank", "2", "--seq-length", "16", "--batch-size", "2"),
        *("--compare", "0", "--sample", "0", "--threads", "1", "--held-out", "0.1"),
    ]
    assert main(arguments) == 0
    assert "adapter reloaded with PEFT on packed experts: logits agree" in capsys.readouterr().out


def test_a_tokenizer_that_is_code_is_refused_with_the_way_out(kimi, tmp_path, capsys):
    """And nobody is asked whether to run it."""
    shutil.copytree(kimi[0], tmp_path / "k2")
    (tmp_path / "k2" / "tokenization_kimi.py").write_text(TRAP)
    config = tmp_path / "k2" / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}
    named = json.loads(config.read_text()) | {"tokenizer_class": "TikTokenTokenizer"}
    config.write_text(json.dumps(named | own))
    with pytest.raises(MoeloraError, match=r"is code of its own, which is never run.* tokenizer\.json"):
        checkpoints.inspect(tmp_path / "k2")
    assert capsys.readouterr().out == ""
    config.write_text(json.dumps(named))
    assert len(checkpoints.inspect(tmp_path / "k2")[1]) == 257


@pytest.mark.parametrize("which", ["k2", "k25"])
def test_commands_that_write_checkpoints_say_the_way(which, kimi, tmp_path, capsys):
    assert main(["quantize", str(kimi[which == "k25"]), str(tmp_path / "out"), "--format", "nf4"]) == 2
    told = capsys.readouterr().err
    assert "compressed-tensors" in told and "moelora.from_pretrained(DIR).save_pretrained(OUT)" in told


def test_a_dense_one_is_packed(kimi, tmp_path, capsys):
    """Kimi-K2 in bfloat16 keeps its name, and is read again."""
    shutil.copytree(kimi[2], tmp_path / "dense")
    config = {name: value for name, value in published(kimi[0]).items() if name != "quantization_config"}
    trapped(tmp_path / "dense", config)
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "out"), "--format", "int8"]) == 0
    assert config_of(tmp_path / "out")["model_type"] == "kimi_k2"
    assert moelora.enable(moelora.from_pretrained(tmp_path / "out")).layers[0].format == "int8"


def test_a_dense_model_inside_another_is_refused_with_the_way_out(kimi, tmp_path, capsys):
    inside(kimi[0], kimi[2], tmp_path / "k25")
    config = config_of(tmp_path / "k25")
    del config["text_config"]["quantization_config"]
    trapped(tmp_path / "k25", config)
    assert main(["quantize", str(tmp_path / "k25"), str(tmp_path / "out"), "--format", "int8"]) == 2
    assert "has a language model inside another one: moelora.from_pretrained(DIR)" in capsys.readouterr().err
    checkpoints.load(tmp_path / "k25", "auto")  # nothing is unexpected
    moelora.from_pretrained(tmp_path / "k25").save_pretrained(tmp_path / "alone")
    default_model.byte_tokenizer().save_pretrained(tmp_path / "alone")
    assert main(["quantize", str(tmp_path / "alone"), str(tmp_path / "out"), "--format", "int8"]) == 0
