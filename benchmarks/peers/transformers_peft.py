"""transformers' experts with `grouped_mm`, and PEFT's `target_parameters` on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layer import LORA_NAMES, SCALING, Case, Layer
from ..registry import GPT_OSS_GLU
from .base import AutogradRunner, Contestant

PARAMETERS = {"gate_up": "gate_up_proj", "down": "down_proj"}
HIDDEN_ACT = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


class _Block(nn.Module):
    """Nothing but the experts: PEFT targets parameters by the path to their module."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args) -> Tensor:
        return self.experts(*args)


def _make_experts(layer: Layer) -> nn.Module:
    """The class of the family, sharing the layer's weights."""
    shape = layer.shape
    sizes = {"hidden_size": shape.hidden, "num_experts_per_tok": shape.top_k}
    if shape.transposed:
        from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig as Config
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Experts

        config = Config(num_local_experts=shape.experts, intermediate_size=shape.inner, **sizes)
    else:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig as Config
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Experts

        act = HIDDEN_ACT[shape.glu.get("act", "silu")]
        config = Config(num_experts=shape.experts, moe_intermediate_size=shape.inner, hidden_act=act, **sizes)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = Experts(config)
    for name, parameter in PARAMETERS.items():
        weight = layer.weights[name]
        stored = weight.transpose(1, 2) if shape.transposed else weight
        setattr(experts, parameter, nn.Parameter(stored, requires_grad=False))
        if shape.bias:
            setattr(experts, f"{parameter}_bias", nn.Parameter(layer.biases[name], requires_grad=False))
    return experts


def _with_adapter(block: _Block, rank: int) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    targets = [f"experts.{parameter}" for parameter in PARAMETERS.values()]
    config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=[], target_parameters=targets)
    return inject_adapter_in_model(config, block)


def _adapters(model: nn.Module, layer: Layer) -> list[nn.Parameter]:
    """A and B as PEFT stores them, set to the layer's, in the order of LORA_NAMES."""
    wrappers = {
        module.parameter_name: module for module in model.modules() if hasattr(module, "parameter_name")
    }
    out = []
    for name in LORA_NAMES:
        projection, suffix = name.split("_lora_")
        wrapper = wrappers[PARAMETERS[projection]]
        linear = (wrapper.lora_A if suffix == "a" else wrapper.lora_B)["default"]
        value = layer.lora[name].detach()
        # A is stored [E·R, K]; B is [N, R·E] with the expert as its fastest dimension.
        stored = value.flatten(0, 1) if suffix == "a" else value.permute(1, 2, 0).flatten(1)
        linear.weight = nn.Parameter(stored.contiguous())
        out.append(linear.weight)
    return out


def _views(layer: Layer):
    experts, rank = layer.shape.experts, layer.case.rank

    def as_ours(grads: list[Tensor]) -> list[Tensor]:
        return [
            grad.view(experts, rank, -1)
            if name.endswith("_a")
            else grad.view(-1, rank, experts).permute(2, 0, 1)
            for name, grad in zip(LORA_NAMES, grads, strict=True)
        ]

    return as_ours


class TransformersPeft(Contestant):
    name = "peft"
    stand_in = "peft-fp32"

    def missing_here(self, case: Case) -> str | None:
        try:
            import peft
            import transformers  # noqa: F401
        except ImportError as error:
            return str(error)
        release = tuple(int(part) for part in peft.__version__.split(".")[:3] if part.isdecimal())
        if release < (0, 19, 1):
            return f"needs peft 0.19.1 or newer, found {peft.__version__}"
        glu = case.shape.glu
        if glu != GPT_OSS_GLU if case.shape.transposed else not set(glu) <= {"act"}:
            return "no model of transformers has this layer"
        return None

    def version(self) -> str:
        import peft
        import transformers

        return f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}"

    def load_here(self, layer: Layer) -> AutogradRunner:
        model = _with_adapter(_Block(_make_experts(layer)), layer.case.rank)
        return AutogradRunner(model, _adapters(model, layer), _views(layer))


CONTESTANTS = {"peft": TransformersPeft()}
