"""Checkpoints that `finetune` must not take as they are: one line with the cause, before the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from finetune_tiny import (
    WEIGHTS,
    arguments,  # noqa: F401  (a fixture)
    changed,
    copy,
    fails,
    model_dir,  # noqa: F401  (a fixture)
)
from model_tiny import one_thread  # noqa: F401  (autouse)
from moelora import MoeloraError, checkpoints, stored
from moelora.__main__ import main
from moelora.commands import data
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


def _refused(directory: Path, **keywords) -> str:
    with pytest.raises(MoeloraError) as caught:
        checkpoints.load(directory, "auto", **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _rewrite(directory: Path, change) -> None:
    """The weights through `change`, a function from (name, tensor) to pairs."""
    weights = load_file(directory / WEIGHTS)
    out = dict(pair for item in weights.items() for pair in change(*item))
    save_file(out, directory / WEIGHTS, {"format": "pt"})


def _configure(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (
            ".mlp.experts.",
            "missing: model.layers.*.mlp.experts.down_proj (2), model.layers.*.mlp.experts.gate_up",
        ),
        (".mlp.gate.", "missing: model.layers.*.mlp.gate.weight (2)"),
        ("lm_head", "missing: lm_head.weight"),
        ("layers.1.self_attn.q_proj", "missing: model.layers.1.self_attn.q_proj.weight"),
        ("model.norm", "missing: model.norm.weight"),
        ("embed_tokens", "missing: model.embed_tokens.weight"),
    ],
)
def test_missing_weights(model_dir, tmp_path, part, told):  # noqa: F811
    directory = copy(model_dir, tmp_path / "m")
    _rewrite(directory, lambda name, tensor: [] if part in name else [(name, tensor)])
    assert told in _refused(directory)


def test_one_expert_is_missing(model_dir, tmp_path):  # noqa: F811
    directory = copy(model_dir, tmp_path / "m")
    gone = "model.layers.0.mlp.experts.3.up_proj.weight"
    assert gone in load_file(directory / WEIGHTS)
    _rewrite(directory, lambda name, tensor: [] if name == gone else [(name, tensor)])
    told = _refused(directory)
    assert "layers.0.mlp.experts" in told and "above" not in told


@pytest.mark.parametrize("prefix", ["foo.", "base_model.model."])
def test_renamed_weights(model_dir, tmp_path, prefix):  # noqa: F811
    directory = copy(model_dir, tmp_path / "m")
    _rewrite(directory, lambda name, tensor: [(prefix + name, tensor)])
    told = _refused(directory)
    assert "missing: " in told and f"unexpected: {prefix}" in told


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_hidden_layers": 1}, "unexpected: model.layers.1."),
        ({"num_hidden_layers": 3}, "missing: model.layers.2."),
        ({"num_local_experts": 4}, "mlp.gate.weight is 5×24, expected 4×24"),
        ({"num_local_experts": 6}, "mlp.gate.weight is 5×24, expected 6×24"),
        ({"moe_intermediate_size": 10}, "experts.down_proj is 5×24×20, expected 5×24×10"),
        ({"vocab_size": 300}, "lm_head.weight is 257×24, expected 300×24"),
    ],
)
def test_weights_of_another_configuration(model_dir, tmp_path, fields, told):  # noqa: F811
    directory = copy(model_dir, tmp_path / "m")
    _configure(directory, **fields)
    assert told in _refused(directory).replace("model.layers.*.", "").replace("model.layers.0.", "")


def test_fresh_names_what_may_be_drawn(model_dir, tmp_path):  # noqa: F811
    directory = copy(model_dir, tmp_path / "m", **{"lm_head.weight": None, "extra.weight": torch.ones(2)})
    assert "missing: lm_head.weight; unexpected: extra.weight" in _refused(directory)
    assert "unexpected: extra.weight" in _refused(directory, fresh=["lm_head.*"])
    models = [checkpoints.load(directory, "auto", ["lm_head.*", "extra.*"], seed) for seed in (1, 1, 2)]
    assert [fresh for _, fresh in models] == [["lm_head.weight"]] * 3
    heads = [model.lm_head.weight for model, _ in models]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert checkpoints.load(model_dir, "auto")[1] == []


def test_command_trains_fresh_weights_only_when_told(arguments, model_dir, tmp_path, capsys):  # noqa: F811
    directory = copy(model_dir, tmp_path / "m", **{"lm_head.weight": None})
    told = fails(changed(arguments, model=directory), capsys)
    assert "missing: lm_head.weight" in told and not (tmp_path / "out").exists()
    assert main(changed(arguments, model=directory, fresh="lm_head.*", steps=1)) == 0
    assert "fresh    lm_head.weight: drawn with --seed 0" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["fresh"] == ["lm_head.weight"]


# ---- files


def _shard(directory: Path) -> dict[str, str]:
    """Two files and their index instead of one."""
    weights = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(weights)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, directory / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def test_shards_and_their_index(model_dir, tmp_path, capsys):  # noqa: F811
    directory = copy(model_dir, tmp_path / "m")
    where = _shard(directory)
    assert len(stored.files(directory)) == 2
    assert main(["inspect", str(directory), "--no-measure"]) == 0
    assert checkpoints.load(directory, "auto")[1] == []
    index, first = directory / INDEX, directory / "model-00001-of-00002.safetensors"
    whole = index.read_text()
    for damage, told in (
        (lambda: index.write_text("{}"), 'has no "weight_map"'),
        (lambda: index.write_text('{"weight_map": [1]}'), 'has no "weight_map"'),
        (lambda: index.write_text('{"weight_map": {}}'), "names no file"),
        (lambda: index.write_text("{"), f"cannot read {index}"),
        (
            lambda: index.write_text(json.dumps({"weight_map": where | {"x": first.name}})),
            "x is in model-00001",
        ),
        (index.unlink, "and no model.safetensors.index.json"),
        (first.unlink, f"names {first.name}, which is not in"),
    ):
        index.write_text(whole)
        damage()
        assert told in _refused(directory)
        capsys.readouterr()
        assert main(["inspect", str(directory), "--no-measure"]) == 2
        assert told in capsys.readouterr().err


def test_pickles_never_stand_in_for_safetensors(model_dir, tmp_path):  # noqa: F811
    directory = copy(model_dir, tmp_path / "m")
    torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
    (directory / WEIGHTS).rename(directory / "other.safetensors")
    told = _refused(directory)
    assert "expected weights (model.safetensors" in told and "other.safetensors, pytorch_model.bin" in told


def test_no_tokenizer_is_refused(arguments, model_dir, tmp_path, capsys):  # noqa: F811
    directory = copy(model_dir, tmp_path / "m")
    for path in directory.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer" in fails(changed(arguments, model=directory), capsys)
    shutil.copy(model_dir / "tokenizer_config.json", directory)
    assert "tokenizer" in fails(changed(arguments, model=directory), capsys)


def test_empty_vocabulary_is_refused(model_dir, tmp_path):  # noqa: F811
    directory = copy(model_dir, tmp_path / "m")
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {}
    path.write_text(json.dumps(content))
    with pytest.raises(MoeloraError, match="has no tokens but the special ones"):
        checkpoints.inspect(directory)


def test_tokenizers_that_do_not_fit(model_dir):  # noqa: F811
    _, tokenizer = checkpoints.inspect(model_dir)
    rows = Dataset.from_dict({"input_ids": [[0, 256], [3]]})
    data.check_ids(rows, tokenizer, 257, model_dir)
    with pytest.raises(MoeloraError, match=r"the tokenizer in .* gives the id 256, .* for 256 tokens"):
        data.check_ids(rows, tokenizer, 256, model_dir)
    tokenizer.unk_token = tokenizer.eos_token
    data.check_ids(rows, tokenizer, 257, model_dir)
    with pytest.raises(MoeloraError, match="does not know 2 of 3 tokens of the data"):
        data.check_ids(Dataset.from_dict({"input_ids": [[256, 256], [3]]}), tokenizer, 257, model_dir)
    deaf = lambda text, **keywords: {"input_ids": []}  # noqa: E731
    deaf.eos_token_id = 256
    with pytest.raises(MoeloraError, match="the tokenizer makes 1 tokens of the text's 5,000 characters"):
        data.blocks(deaf, ["x" * 5000], 16, "text")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_local_experts": "many"},
        {"hidden_size": 0},
        {"hidden_size": None},
        {"num_experts_per_tok": 99},
        {"num_experts_per_tok": -1},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 5},
        {"hidden_act": "nonsense"},
        {"vocab_size": -1},
        {"rms_norm_eps": "small"},
        {"dtype": "int3"},
        {"model_type": "nonsense"},
        {"model_type": 3},
        {"rope_parameters": {"rope_type": "nonsense"}},
    ],
    ids=str,
)
def test_broken_configurations(model_dir, tmp_path, fields):  # noqa: F811
    directory = copy(model_dir, tmp_path / "m")
    _configure(directory, **fields)
    with pytest.raises(MoeloraError, match=r"cannot load|do not fit|not a transformers") as caught:
        checkpoints.inspect(directory)
        model, _ = checkpoints.load(directory, "auto")
        checkpoints.check_runs(model, directory)
    told = str(caught.value)
    assert "\n" not in told and "above" not in told and not told.endswith(":")


def test_configuration_that_is_no_object(model_dir, tmp_path):  # noqa: F811
    directory = copy(model_dir, tmp_path / "m")
    for text in ("[]", "", "nonsense", "null"):
        (directory / "config.json").write_text(text)
        with pytest.raises(MoeloraError, match="cannot load the configuration from"):
            checkpoints.inspect(directory)
