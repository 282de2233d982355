"""The layer shapes the benchmark knows, and reading one from a Hugging Face config."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """One expert layer. E experts of H → 2I → I → H, top_k of them for each token."""

    name: str
    experts: int
    hidden: int
    inner: int
    top_k: int
    bias: bool = False
    transposed: bool = False  # weights are stored [E, in, out]
    glu: dict = field(default_factory=dict, hash=False)  # keywords of torch_moelora.functional.glu

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Name → (out_features, in_features)."""
        return {"gate_up": (2 * self.inner, self.hidden), "down": (self.hidden, self.inner)}

    @property
    def weights_per_expert(self) -> int:
        return 3 * self.hidden * self.inner

    def base_flops(self, tokens: int) -> int:
        """Forward and dX of both projections, without LoRA."""
        return 2 * 2 * tokens * self.top_k * self.weights_per_expert


GPT_OSS_GLU = {"act": "silu", "alpha": 1.702, "limit": 7.0, "up_shift": 1.0, "interleaved": True}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", 128, 2048, 768, 8),
        Shape("qwen3.5-35b-a3b", 256, 2048, 512, 8),
        Shape("olmoe-1b-7b", 64, 2048, 1024, 8),
        Shape("mixtral-8x7b", 8, 4096, 14336, 2),
        Shape("gpt-oss-20b", 32, 2880, 2880, 4, bias=True, transposed=True, glu=GPT_OSS_GLU),
        Shape("deepseek-v2-lite", 64, 2048, 1408, 6),
    )
}

# What model families call the same numbers in config.json.
CONFIG_KEYS = {
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "hidden": ("hidden_size",),
    "inner": ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk"),
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def _first(config: dict, keys: tuple[str, ...], where: Path) -> int:
    for key in keys:
        if isinstance(config.get(key), int):
            return config[key]
    raise ValueError(f"{where} has none of {', '.join(keys)}: not a mixture-of-experts model?")


def shape_from_config(directory: str | Path) -> Shape:
    """The expert layer of the model in a local Hugging Face directory (only its config.json is read)."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    config = config.get("text_config", config)
    sizes = {name: _first(config, keys, path) for name, keys in CONFIG_KEYS.items()}
    name = Path(directory).resolve().name
    if config.get("model_type") == "gpt_oss":
        return Shape(name, **sizes, bias=True, transposed=True, glu=GPT_OSS_GLU)
    act = config.get("hidden_act", "silu")
    if act not in ACTIVATIONS:
        raise ValueError(f"{path}: hidden_act is {act!r}; known: {', '.join(ACTIVATIONS)}")
    return Shape(name, **sizes, glu={"act": ACTIVATIONS[act]})


def find_shape(name: str) -> Shape:
    """A registered name, or a local Hugging Face config directory."""
    if name in SHAPES:
        return SHAPES[name]
    if Path(name).is_dir():
        return shape_from_config(name)
    known = ", ".join(SHAPES)
    raise ValueError(f"unknown shape {name!r}: one of {known}, all, or a directory with a config.json")
