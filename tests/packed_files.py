"""Tiny checkpoints of every packed layout, written byte for byte as their projects write them, and the dense
checkpoint of the same numbers.

A `Layout` packs one matrix at a time: from a seeded generator it draws codes and scales, and it gives the
tensors that a file has for them and the numbers that they stand for, by the project's own library where that
runs here, else by the arithmetic of its documentation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from torch_moelora import formats

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
HIDDEN, INNER, EXPERTS = 256, 192, 4
_SIZES = {
    "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_experts_per_tok": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "dtype": "bfloat16",
}  # fmt: skip
CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(moe_intermediate_size=INNER, num_experts=EXPERTS, **_SIZES),
    "mixtral": lambda: MixtralConfig(intermediate_size=INNER, num_local_experts=EXPERTS, **_SIZES),
    "gpt_oss": lambda: GptOssConfig(intermediate_size=INNER, num_local_experts=EXPERTS, **_SIZES),
    "deepseek_v3": lambda: DeepseekV3Config(
        moe_intermediate_size=INNER, n_routed_experts=EXPERTS, intermediate_size=HIDDEN,
        first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=64, qk_rope_head_dim=32, qk_nope_head_dim=32,
        v_head_dim=32, n_group=1, topk_group=1, n_shared_experts=1,
        **_SIZES | {"num_key_value_heads": 2, "head_dim": 32},
    ),
}  # fmt: skip
# Of an expert: gate, up, down.
_NAMES = {"mixtral": ("w1", "w3", "w2")}
_PLACES = {"mixtral": "block_sparse_moe"}

Drawn = tuple[dict[str, Tensor], Tensor]  # what the file has, by what follows the name; the numbers, bfloat16


@dataclass(frozen=True)
class Layout:
    """One row of the table.

    matrix: (rows, columns, generator) → what is stored for a matrix. format: what the operators call it.
    linears: attention is packed, too. stacked: all experts of a layer in one.
    """

    name: str
    family: str
    format: str
    section: dict
    matrix: Callable[[int, int, torch.Generator], Drawn]
    linears: bool = True
    stacked: bool = False

    def __str__(self) -> str:
        return self.name


def _codes(rows: int, columns: int, gen: torch.Generator, high: int = 16) -> Tensor:
    return torch.randint(0, high, (rows, columns), generator=gen, dtype=torch.uint8)


def _scales(rows: int, columns: int, gen: torch.Generator, size: float) -> Tensor:
    return (torch.rand(rows, columns, generator=gen) + 0.5) * size


def _words(nibbles: Tensor) -> Tensor:
    """[N, K] → int32 [N, K/8], low nibble first."""
    pairs = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return pairs.contiguous().view(torch.int32)


def _rounded(values: Tensor, scale: Tensor) -> Tensor:
    """values·scale in float32, to bfloat16; a scale covers as many numbers as its shape says."""
    for dim in (0, 1):
        times = -(-values.shape[dim] // scale.shape[dim])
        scale = scale.repeat_interleave(times, dim).narrow(dim, 0, values.shape[dim])
    return (values.float() * scale.float()).to(BF16)


def fp8_blocks(rows: int, columns: int, gen: torch.Generator) -> Drawn:
    codes = torch.randn(rows, columns, generator=gen).mul(100).clamp(-448, 448).to(E4M3)
    scale = _scales(-(-rows // 128), -(-columns // 128), gen, 3e-4)
    spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return {"weight": codes, "weight_scale_inv": scale}, (codes.float() * spread).to(BF16)


def fp8_rows(rows: int, columns: int, gen: torch.Generator) -> Drawn:
    codes = torch.randn(rows, columns, generator=gen).mul(100).clamp(-448, 448).to(E4M3)
    scale = _scales(rows, 1, gen, 3e-4).to(BF16)
    return {"weight": codes, "weight_scale": scale}, _rounded(codes, scale)


def int4(rows: int, columns: int, gen: torch.Generator, symmetric: bool = True, group: int = 32) -> Drawn:
    """compressed-tensors' pack-quantized."""
    nibbles, scale = _codes(rows, columns, gen), _scales(rows, columns // group, gen, 5e-3).to(BF16)
    stored = {
        "weight_packed": _words(nibbles), "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }  # fmt: skip
    zero = torch.full((rows, columns // group), 8, dtype=torch.uint8)
    if not symmetric:
        zero = _codes(rows, columns // group, gen)
        stored["weight_zero_point"] = _words(zero.t().contiguous()).t().contiguous()  # packed along N
    return stored, _rounded(nibbles.int() - zero.int().repeat_interleave(group, 1), scale)


def _nvfp4(rows: int, columns: int, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    nibbles = _codes(rows, columns, gen)
    scale = _scales(rows, columns // 16, gen, 30.0).to(E4M3)
    values = torch.tensor(formats.FORMATS["nvfp4"].codes)[nibbles.int()]
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4), scale, values


def nvfp4_modelopt(rows: int, columns: int, gen: torch.Generator) -> Drawn:
    codes, scale, values = _nvfp4(rows, columns, gen)
    scale2 = _scales(1, 1, gen, 3e-4).squeeze()
    stored = {
        "weight": codes,
        "weight_scale": scale,
        "weight_scale_2": scale2,
        "input_scale": torch.tensor(1.0),
    }
    return stored, _rounded(values, scale.float() * scale2)


def nvfp4_compressed(rows: int, columns: int, gen: torch.Generator) -> Drawn:
    codes, scale, values = _nvfp4(rows, columns, gen)
    scale2 = 1 / _scales(1, 1, gen, 3e-4).view(1)
    stored = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": scale2}
    return stored, _rounded(values, scale.float() * (1 / scale2))


def bnb(rows: int, columns: int, gen: torch.Generator, kind: str = "nf4", nested: bool = False) -> Drawn:
    functional = pytest.importorskip("bitsandbytes.functional")
    dense = (torch.randn(rows, columns, generator=gen) * 0.03).to(BF16)
    codes, state = functional.quantize_4bit(dense, blocksize=64, quant_type=kind, compress_statistics=nested)
    stored = {"weight": codes} | {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    return stored, functional.dequantize_4bit(codes, state).to(BF16)


def gptq(rows: int, columns: int, gen: torch.Generator) -> Drawn:
    """Groups of 64: qweight [K/8, N], of k; qzeros [K/g, N/8], of n, less one."""
    nibbles, zero = _codes(rows, columns, gen), _codes(rows, columns // 64, gen)
    scale = _scales(rows, columns // 64, gen, 5e-3).half()
    stored = {
        "qweight": _words(nibbles).t().contiguous(),
        "qzeros": _words(zero.t().contiguous()),
        "scales": scale.t().contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // 64,
    }
    return stored, _rounded(nibbles.int() - (zero.int() + 1).repeat_interleave(64, 1), scale)


AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of column 8j + o, the nibble


def _awq_words(nibbles: Tensor) -> Tensor:
    """[rows, N] → int32 [rows, N/8]."""
    eight = nibbles.unflatten(1, (-1, 8)).long()
    words = sum(eight[..., o] << 4 * AWQ_ORDER[o] for o in range(8))
    return words.where(words < 2**31, words - 2**32).int()


def awq(rows: int, columns: int, gen: torch.Generator) -> Drawn:
    nibbles, zero = _codes(rows, columns, gen), _codes(rows, columns // 64, gen)
    scale = _scales(rows, columns // 64, gen, 5e-3).half()
    stored = {
        "qweight": _awq_words(nibbles.t()), "qzeros": _awq_words(zero.t()), "scales": scale.t().contiguous(),
    }  # fmt: skip
    return stored, _rounded(nibbles.int() - zero.int().repeat_interleave(64, 1), scale)


def mxfp4_blocks(rows: int, columns: int, gen: torch.Generator) -> Drawn:
    """gpt-oss': [rows, K/32, 16]; all experts are stacked by the writer."""
    nibbles = _codes(rows, columns, gen)
    scale = torch.randint(118, 122, (rows, columns // 32), generator=gen, dtype=torch.uint8)
    codes = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).unflatten(1, (-1, 16))
    values = torch.tensor(formats.FORMATS["mxfp4"].codes)[nibbles.int()]
    return {"_blocks": codes, "_scales": scale}, _rounded(values, torch.exp2(scale.float() - 127))


def ours(name: str, group: int | None = None, nested: bool = False) -> Callable[..., Drawn]:
    """Our own layout: as `quantize` packs."""

    def matrix(rows: int, columns: int, gen: torch.Generator, experts: int = 1) -> Drawn:
        dense = torch.randn(experts, rows, columns, generator=gen) * 0.03
        packed = formats.quantize(dense, name, group, nested)
        parts = zip((".codes", ".scale", ".scale2", ".zero"), packed[:4], strict=True)
        return {part: t for part, t in parts if t is not None}, packed.dequantize(BF16)

    return matrix


def _own(name: str, group: int | None = None, nested: bool = False, linears: bool = False) -> dict:
    size = formats.FORMATS[name].groups.default if group is None else group
    choice = {"format": name, "group_size": size, "nested": nested}
    return {
        "quant_method": "moelora",
        "version": 1,
        "experts": choice,
        "linears": choice if linears else None,
    }


_COMPRESSED = {
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
}


def _compressed(kind: str, **weights: object) -> dict:
    args = {"strategy": "group", "symmetric": True, "type": "int", "num_bits": 4, "dynamic": False} | weights
    group = {"targets": ["Linear"], "weights": args, "format": kind}
    return {**_COMPRESSED, "format": kind, "config_groups": {"group_0": group}}


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
TABLE = [
    Layout("ours nf4 nested", "qwen3_moe", "nf4", _own("nf4", nested=True), ours("nf4", nested=True), False,
           stacked=True),
    Layout("ours int8 with linears", "qwen3_moe", "int8", _own("int8", linears=True), ours("int8"),
           stacked=True),
    Layout("ours fp8 interleaved", "gpt_oss", "fp8", _own("fp8"), ours("fp8"), False, stacked=True),
    Layout("gpt-oss mxfp4", "gpt_oss", "mxfp4", {"quant_method": "mxfp4"}, mxfp4_blocks, False, stacked=True),
    Layout("fp8 blocks", "deepseek_v3", "fp8", _FP8 | {"weight_block_size": [128, 128]}, fp8_blocks),
    Layout("fp8 rows", "qwen3_moe", "fp8",
           _compressed("float-quantized", type="float", num_bits=8, strategy="channel"), fp8_rows),
    Layout("compressed int4", "deepseek_v3", "int4", _compressed("pack-quantized", group_size=32), int4),
    Layout("compressed int4 asymmetric", "qwen3_moe", "int4",
           _compressed("pack-quantized", group_size=32, symmetric=False),
           lambda n, k, g: int4(n, k, g, False)),
    Layout("modelopt nvfp4", "qwen3_moe", "nvfp4",
           {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, nvfp4_modelopt),
    Layout("compressed nvfp4", "qwen3_moe", "nvfp4",
           _compressed("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16),
           nvfp4_compressed),
    Layout("bitsandbytes nf4 nested", "qwen3_moe", "nf4", _BNB | {"bnb_4bit_quant_type": "nf4"},
           lambda n, k, g: bnb(n, k, g, "nf4", True)),
    Layout("bitsandbytes fp4", "mixtral", "fp4", _BNB | {"bnb_4bit_quant_type": "fp4"},
           lambda n, k, g: bnb(n, k, g, "fp4")),
    Layout("gptq", "qwen3_moe", "int4",
           {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}, gptq),
    Layout("awq", "mixtral", "int4",
           {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}, awq),
]  # fmt: skip
LAYOUTS = {layout.name: layout for layout in TABLE}


def write(layout: Layout, packed: Path, dense: Path | None = None, **sizes: int) -> None:
    """Both checkpoints. `dense` has what `packed` stands for, in bfloat16. sizes: of the configuration."""
    gen = torch.Generator().manual_seed(0)
    config = CONFIGS[layout.family]()
    config.update(sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    stored: dict[str, Tensor] = {}
    numbers: dict[str, Tensor] = {}
    for name, empty in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            _experts(layout, name, tuple(empty.shape), gen, stored, numbers)
        elif layout.linears and name.endswith("_proj.weight"):
            drawn, values = layout.matrix(*empty.shape, gen)
            stem = name.removesuffix("weight") if not layout.stacked else name
            stored |= {stem + part: t for part, t in drawn.items()}
            numbers[name] = values.reshape(empty.shape)
        else:
            values = (
                torch.ones(empty.shape) if "norm" in name else torch.randn(empty.shape, generator=gen) * 0.1
            )
            stored[name] = numbers[name] = values.to(BF16)
    for directory, tensors, section in ((packed, stored, layout.section), (dense, numbers, None)):
        if directory is None:
            continue
        directory.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(directory)
        written = json.loads((directory / "config.json").read_text())
        if section is not None:
            written["quantization_config"] = section
        (directory / "config.json").write_text(json.dumps(written))
        save(directory, tensors)


def save(directory: Path, tensors: dict[str, Tensor], shards: int = 2) -> None:
    """In shards with an index, every other tensor in the next one."""
    names = sorted(tensors)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        part = {name: tensors[name].contiguous().clone() for name in names[i::shards]}
        save_file(part, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: files[i % shards] for i, name in enumerate(names)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _experts(
    layout: Layout, name: str, shape: tuple, gen: torch.Generator, stored: dict, numbers: dict
) -> None:
    module, _, weight = name.rpartition(".")
    turned = layout.family == "gpt_oss"
    experts, rows, columns = (shape[0], shape[2], shape[1]) if turned else shape
    if layout.stacked and "moelora" in layout.section.values():
        drawn, dense = layout.matrix(rows, columns, gen, experts)
        stored |= {name + part: t for part, t in drawn.items()}
    elif layout.stacked:
        each = [layout.matrix(rows, columns, gen) for _ in range(experts)]
        stored |= {name + part: torch.stack([d[part] for d, _ in each]) for part in each[0][0]}
        dense = torch.stack([values for _, values in each])
    else:
        dense = _apart(layout, module, weight, (experts, rows, columns), gen, stored, numbers)
        if dense is None:
            return
    numbers[name] = dense.transpose(1, 2) if turned else dense


def _apart(
    layout: Layout, module: str, weight: str, size: tuple, gen: torch.Generator, stored: dict, numbers: dict
) -> None:
    """A matrix for each expert, in dense files as in packed ones."""
    gate, up, down = _NAMES.get(layout.family, ("gate_proj", "up_proj", "down_proj"))
    place = module.replace(".mlp.", f".{_PLACES.get(layout.family, 'mlp')}.")
    experts, rows, columns = size
    parts = (gate, up) if weight == "gate_up_proj" else (down,)
    for e in range(experts):
        for part in parts:
            drawn, values = layout.matrix(rows // len(parts), columns, gen)
            stored |= {f"{place}.{e}.{part}.{end}": t for end, t in drawn.items()}
            numbers[f"{place}.{e}.{part}.weight"] = values
