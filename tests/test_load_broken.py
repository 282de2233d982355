"""Files that are not what they should be: one line that names the tensor, what was expected and what came."""

import json
import shutil
from dataclasses import replace

import moelora
import pytest
import torch
from model_tiny import one_thread  # noqa: F401  (autouse)
from moelora.__main__ import main
from moelora.commands import default_model
from moelora.errors import MoeloraError
from packed_files import LAYOUTS, save, write
from packed_models import checkpoints  # noqa: F401  (a fixture)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

FIRST = "model.layers.0.mlp.experts"
DEEP = "model.layers.1.mlp.experts"  # deepseek's first layer is dense
MIX = "model.layers.0.block_sparse_moe.experts"
Q = "model.layers.0.self_attn.q_proj"


def changed(checkpoint, to, **tensors):
    """A copy with some tensors replaced by what a function makes of them, or left out."""
    shutil.copytree(checkpoint.packed, to)
    every = {}
    for file in to.glob("*.safetensors"):
        every |= load_file(file)
        file.unlink()
    for name, change in tensors.items():
        assert name in every, name
        every[name] = change(every[name]) if change else None
    save(to, {name: t for name, t in every.items() if t is not None})
    return to


def test_the_way_out_of_fp8_in_other_blocks(tmp_path):
    """transformers itself makes it dense, to the numbers that the codes stand for."""

    def drawn(rows, columns, gen):
        codes = torch.randn(rows, columns, generator=gen).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
        scale = (torch.rand(rows // 64, columns // 64, generator=gen) + 0.5) * 3e-4
        each = scale.repeat_interleave(64, 0).repeat_interleave(64, 1)
        return {"weight": codes, "weight_scale_inv": scale}, (codes.float() * each).bfloat16()

    layout = LAYOUTS["fp8 blocks"]
    section = layout.section | {"weight_block_size": [64, 64]}
    packed, dense, out = tmp_path / "packed", tmp_path / "dense", tmp_path / "out"
    write(replace(layout, section=section, matrix=drawn), packed, dense)
    with pytest.raises(MoeloraError, match=r"blocks of \[64, 64\], expected .*: take the dense") as raised:
        moelora.from_pretrained(packed, cache_dir=tmp_path / "cache")
    way = (
        "AutoModelForCausalLM.from_pretrained(DIR, quantization_config=FineGrainedFP8Config(dequantize=True))"
    )
    assert f"which {way}.save_pretrained(OUT) writes" in str(raised.value)
    plain = FineGrainedFP8Config(dequantize=True)
    AutoModelForCausalLM.from_pretrained(packed, quantization_config=plain).save_pretrained(out)
    default_model.byte_tokenizer().save_pretrained(out)
    found, wanted = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (out, dense))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], t) for name, t in wanted.items())
    assert main(["quantize", str(out), str(tmp_path / "int8"), "--format", "int8"]) == 0


def half(t):
    return t[: t.shape[0] // 2].clone()


def wide(t):
    return torch.cat([t, t], -1)


CASES = [
    ("ours nf4 nested", {f"{FIRST}.down_proj.scale": None}, f"{FIRST}.down_proj: .*scale is missing"),
    ("ours nf4 nested", {f"{FIRST}.down_proj.codes": None}, f"{FIRST}.down_proj: .*codes is missing"),
    ("ours nf4 nested", {f"{FIRST}.down_proj.scale2": None}, f"{FIRST}.down_proj: .*scale2"),
    ("ours nf4 nested", {f"{FIRST}.down_proj.scale2": half}, f"{FIRST}.down_proj: .*scale2"),
    (
        "ours nf4 nested",
        {f"{FIRST}.down_proj.{part}": None for part in ("codes", "scale", "scale2")},
        f"{FIRST}.down_proj is not in the files",
    ),
    (
        "ours nf4 nested",
        {f"{FIRST}.gate_up_proj.codes": lambda t: t.float()},
        f"{FIRST}.gate_up_proj: .*float32",
    ),
    (
        "ours nf4 nested",
        {f"{DEEP}.down_proj.codes": lambda t: t.view(torch.float8_e4m3fn)},
        f"{DEEP}.down_proj: .*float8_e4m3fn",
    ),
    ("ours fp8 interleaved", {f"{FIRST}.gate_up_proj.scale": wide}, f"{FIRST}.gate_up_proj: .*scale"),
    (
        "ours fp8 interleaved",
        {f"{FIRST}.down_proj.codes": half, f"{FIRST}.down_proj.scale": half},
        f"{FIRST}.down_proj is packed 2×256×192 in the file, expected 4×256×192",
    ),
    ("gpt-oss mxfp4", {f"{FIRST}.down_proj_scales": None}, f"{FIRST}.down_proj: .*_scales is missing"),
    (
        "gpt-oss mxfp4",
        {f"{FIRST}.down_proj_blocks": lambda t: t.flatten(2)},
        r"_blocks is \[4, 256, 96\], expected 4",
    ),
    (
        "fp8 blocks",
        {f"{DEEP}.2.up_proj.weight_scale_inv": None},
        f"{DEEP}.2.up_proj.weight: .*weight_scale_inv is m",
    ),
    (
        "fp8 blocks",
        {f"{DEEP}.2.up_proj.weight_scale_inv": lambda t: t.repeat(3, 1)},
        f"{DEEP}.2.up_proj.weight: ",
    ),
    (
        "fp8 blocks",
        {f"{DEEP}.3.down_proj.{part}": None for part in ("weight", "weight_scale_inv")},
        f"{DEEP}.down_proj lacks block 0 of expert 3",
    ),
    (
        "fp8 blocks",
        {f"{DEEP}.2.up_proj.weight": lambda t: t.view(torch.uint8)},
        "weight is uint8, expected float8_e4m3fn",
    ),
    ("fp8 blocks", {f"{Q}.weight_scale_inv": None}, f"{Q}.weight: .*weight_scale_inv is missing"),
    (
        "compressed int4",
        {f"{DEEP}.1.gate_proj.weight_shape": lambda t: t * 2},
        rf"{DEEP}.1.gate_proj.weight: weight_packed is \[192, 32\] for a weight_shape of \[384, 512\]",
    ),
    ("compressed int4", {f"{DEEP}.1.gate_proj.weight_scale": half}, f"{DEEP}.1.gate_proj.weight: "),
    (
        "compressed int4 asymmetric",
        {f"{FIRST}.1.gate_proj.weight_zero_point": lambda t: t.float()},
        f"{FIRST}.1.gate_proj.weight: weight_zero_point is float32, expected int32",
    ),
    (
        "modelopt nvfp4",
        {f"{FIRST}.0.up_proj.weight_scale_2": None},
        f"{FIRST}.0.up_proj.weight: .*weight_scale_2 is m",
    ),
    (
        "modelopt nvfp4",
        {f"{FIRST}.0.up_proj.weight_scale": lambda t: t.float()},
        "weight_scale is float32, expected",
    ),
    ("compressed nvfp4", {f"{FIRST}.0.up_proj.weight_global_scale": None}, "weight_global_scale is missing"),
    (
        "bitsandbytes fp4",
        {f"{MIX}.0.w3.weight.absmax": half},
        f"{MIX}.0.w3.weight: .*and 384 of absmax for 192×256",
    ),
    (
        "bitsandbytes fp4",
        {f"{MIX}.0.w3.weight.quant_map": lambda t: t + 1},
        "quant_map is another map of codes",
    ),
    (
        "bitsandbytes fp4",
        {f"{MIX}.0.w3.weight.quant_state.bitsandbytes__fp4": lambda t: t[1:].clone()},
        f"{MIX}.0.w3.weight: .* is no JSON",
    ),
    ("gptq", {f"{FIRST}.3.up_proj.g_idx": lambda t: t.flip(0)}, f"{FIRST}.3.up_proj.weight: g_idx permutes"),
    (
        "gptq",
        {f"{FIRST}.3.up_proj.scales": half},
        f"{FIRST}.3.up_proj.weight: qweight of 256×192 with scales",
    ),
    ("awq", {f"{MIX}.0.w1.qzeros": None}, f"{MIX}.0.w1.weight: .*qzeros is missing"),
]


@pytest.mark.parametrize("layout, tensors, told", CASES, ids=range(len(CASES)))
def test_a_tensor_that_is_not_what_it_should_be(layout, tensors, told, checkpoints, tmp_path):  # noqa: F811
    directory = changed(checkpoints(layout), tmp_path / "copy", **tensors)
    with pytest.raises(MoeloraError, match=told) as caught:
        moelora.from_pretrained(directory, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_swapped_scales(checkpoints, tmp_path):  # noqa: F811
    """Of matrices with other sizes; of equal ones nobody can tell."""
    names = [f"{DEEP}.0.{part}_proj.weight_scale_inv" for part in ("up", "down")]
    shapes = {}
    directory = changed(checkpoints("fp8 blocks"), tmp_path / "first", **{n: lambda t: t for n in names})
    for file in directory.glob("*.safetensors"):
        shapes |= load_file(file)
    swapped = {names[0]: lambda t: shapes[names[1]].repeat(2, 1), names[1]: lambda t: shapes[names[0]]}
    directory = changed(checkpoints("fp8 blocks"), tmp_path / "second", **swapped)
    with pytest.raises(MoeloraError, match=rf"{DEEP}\.0\.up_proj\.weight: .*scale"):
        moelora.from_pretrained(directory, cache_dir=tmp_path / "cache")


def test_an_expert_too_many(checkpoints, tmp_path):  # noqa: F811
    directory = shutil.copytree(checkpoints("fp8 rows").packed, tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    name = "num_experts" if "num_experts" in config else "num_local_experts"
    (directory / "config.json").write_text(json.dumps(config | {name: 3}))
    with pytest.raises(MoeloraError, match=rf"{FIRST}\.3\..* is of expert 3, expected 0 to 2"):
        moelora.from_pretrained(directory, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ("awq", "72 tensors of single experts, F16, I32: the first load stacks them in a cache"),
        ("gpt-oss mxfp4", "12 tensors of all experts, BF16, U8: loading them in their dtype maps the files"),
    ],
)
def test_inspect_says_how_packed_experts_lie(layout, told, checkpoints, capsys):  # noqa: F811
    assert main(["inspect", str(checkpoints(layout).packed), "--no-measure"]) == 0
    assert told in capsys.readouterr().out


def test_other_sizes_than_the_configuration_says(checkpoints, tmp_path):  # noqa: F811
    directory = shutil.copytree(checkpoints("fp8 rows").packed, tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 128}))
    with pytest.raises(MoeloraError, match="packed 192×256 and 192×256, expected together 256×256"):
        moelora.from_pretrained(directory, cache_dir=tmp_path / "cache")


def test_an_index_that_lies(checkpoints, tmp_path):  # noqa: F811
    directory = shutil.copytree(checkpoints("ours nf4 nested").packed, tmp_path / "copy")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, files = f"{FIRST}.down_proj.codes", sorted(set(index["weight_map"].values()))
    index["weight_map"][name] = next(file for file in files if file != index["weight_map"][name])
    path.write_text(json.dumps(index))
    with pytest.raises(MoeloraError, match=f"says that {name} is in model-.*which does not have it"):
        moelora.from_pretrained(directory)


def test_a_truncated_file(checkpoints, tmp_path):  # noqa: F811
    directory = shutil.copytree(checkpoints("ours nf4 nested").packed, tmp_path / "copy")
    file = sorted(directory.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MoeloraError, match=f"cannot read the header of {file}"):
        moelora.from_pretrained(directory)


@pytest.mark.parametrize(
    "section, told",
    [
        (
            {"quant_method": "hqq"},
            "quantised by hqq, expected one of moelora, mxfp4.*python -m moelora quantize",
        ),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ with 3 bits, expected 4"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ in the version gemv, expected gemm"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes' with 8 bits, expected 4"),
        ({"quant_method": "moelora", "version": 7}, '"version" of quantization_config is 7, expected 1'),
        (
            {"quant_method": "moelora", "version": 1, "experts": {"format": "q4", "group_size": 32}},
            "has the format 'q4', expected one of nf4",
        ),
    ],
)
def test_sections_that_nothing_reads(section, told, checkpoints, tmp_path):  # noqa: F811
    directory = shutil.copytree(checkpoints("ours nf4 nested").packed, tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    with pytest.raises(MoeloraError, match=told):
        moelora.from_pretrained(directory)


def test_dense_checkpoints_load_as_ever(checkpoints):  # noqa: F811
    model = moelora.from_pretrained(checkpoints("ours nf4 nested").dense, dtype=torch.float32)
    assert model.dtype == torch.float32 and getattr(model, "hf_quantizer", None) is None
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.float32


def test_arguments_reach_transformers(checkpoints):  # noqa: F811
    model = checkpoints("gptq").model(dtype=torch.float32, attn_implementation="eager")
    assert model.dtype == torch.float32 and model.config._attn_implementation == "eager"
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    model, info = checkpoints("ours nf4 nested").model(output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert checkpoints("gptq").model(device_map="cpu").device.type == "cpu"
    with pytest.raises(MoeloraError, match="device_map must be a device, or a device for each module"):
        checkpoints("gptq").model(device_map="auto")


def test_modelopt_that_says_it_in_a_file_of_its_own(checkpoints, tmp_path):  # noqa: F811
    """hf_quant_config.json, as older exports have it."""
    directory = shutil.copytree(checkpoints("modelopt nvfp4").packed, tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    section = config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    own = {"quant_algo": section["quant_algo"], "group_size": 16}
    (directory / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": own}))
    model = moelora.from_pretrained(directory, cache_dir=tmp_path / "cache")
    assert model.model.layers[0].mlp.experts.gate_up_proj_packed.format == "nvfp4"
    (directory / "hf_quant_config.json").write_text("{}")
    with pytest.raises(MoeloraError, match=r"cannot read .*hf_quant_config\.json: KeyError"):
        moelora.from_pretrained(directory)
