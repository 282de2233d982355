"""What a LoRA adapter adds to each weight of a model, read from its file as it is needed.

PEFT itself says which weights the adapter is for and with which rank and scaling, on a model without storage.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import NamedTuple

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from moelora import shards
from moelora.advice import unconverted
from moelora.errors import MoeloraError, one_line
from moelora.shards import Stored

FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Options of a LoRA configuration with which it is not W + scaling·B·A, and what it has then.
_OTHERWISE = {
    "use_dora": "DoRA, whose magnitudes are no sum",
    "lora_bias": "biases of B",
    "modules_to_save": "modules that are trained as a whole",
    "trainable_token_indices": "trained rows of embeddings",
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "an activated LoRA, which is off for some tokens",
    "arrow_config": "Arrow",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
    "megatron_config": "Megatron's layers",
}
_OTHER_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


class Delta(NamedTuple):
    """scaling·B[e]·A[e] for every expert e of a weight, or for the one matrix of a linear layer."""

    name: str
    experts: int
    a: Tensor | Stored  # [E·R, K]
    b: Tensor | Stored  # [N, R·E], the expert fastest
    scaling: float

    def read(self) -> tuple[Tensor, Tensor]:
        """float32 A [E, R, K] and B [E, N, R] with the scaling in it."""
        a, b = (t.read() if isinstance(t, Stored) else t for t in (self.a, self.b))
        b = b.float().unflatten(1, (-1, self.experts)).permute(2, 0, 1)
        return a.float().unflatten(0, (self.experts, -1)), b * self.scaling


def check(directory: Path) -> PeftConfig:
    """The configuration of an adapter that can be merged.

    Raises: MoeloraError if there is none, or it is of a kind that is no sum with the base's weights.
    """
    if not directory.is_dir():  # PEFT would look for it on the network
        raise MoeloraError(f"{directory} is not an adapter of PEFT: no such directory")
    try:
        config = PeftConfig.from_pretrained(directory)
    except Exception as error:  # whatever is in the file
        raise MoeloraError(f"{directory} is not an adapter of PEFT: {one_line(error)}") from None
    if config.peft_type != "LORA":
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise MoeloraError(f"the adapter in {directory} is {kind}, and only LoRA can be merged")
    for option, what in _OTHERWISE.items():
        if getattr(config, option, None):
            raise MoeloraError(f"the adapter in {directory} has {what} ({option}), which cannot be merged")
    if config.bias != "none":
        raise MoeloraError(f"the adapter in {directory} has trained biases (bias={config.bias!r})")
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(_OTHER_BASE):
        raise MoeloraError(
            f"the adapter in {directory} started from another base ({start}): save it converted to plain "
            "LoRA (path_initial_model_for_weight_conversion)"
        )
    if not (directory / FILE).is_file():
        raise MoeloraError(f"{directory} has no {FILE}, expected the adapter's weights in it")
    return config


def copies(directory: Path) -> dict[str, Stored]:
    """The base's own weights that PEFT writes beside the adapter where embeddings or the head are
    adapted, by their names in the model.

    Raises: MoeloraError for tensors that are neither these nor LoRA's.
    """
    found = {}
    for key, tensor in shards.stored(directory / FILE).items():
        if ".lora_" in key:
            continue
        if not key.startswith(_PREFIX) or not key.endswith(".weight"):
            raise MoeloraError(f"the adapter in {directory} has {key}, which is no LoRA and cannot be merged")
        found[key.removeprefix(_PREFIX).replace(".base_layer.", ".")] = tensor
    return found


def deltas(directory: Path, outline: PreTrainedModel) -> dict[str, Delta]:
    """What the adapter adds, by the names of the model's weights.

    outline: the model without storage; PEFT wraps its modules.
    Raises: MoeloraError as `check`, or if the adapter and the model do not fit.
    """
    config = check(directory)
    config.inference_mode = True
    config.base_model_name_or_path = outline.name_or_path  # else PEFT warns that it is another
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
            model = get_peft_model(outline, config, low_cpu_mem_usage=True)
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        kind = type(outline).__name__
        raise MoeloraError(f"the adapter in {directory} does not fit {kind}: {one_line(error)}") from None
    tensors = tensors_of(directory, model)
    found: dict[str, Delta] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            delta = _delta(directory, name, layer, tensors)
            if delta.name in found:
                raise MoeloraError(f"the adapter in {directory} adapts {delta.name} twice")
            found[delta.name] = delta
    return found


def tensors_of(directory: Path, model: PeftModel) -> dict[str, Tensor | Stored]:
    """LoRA's tensors of the adapter's file, by the names that PEFT's model has for them.

    Raises: MoeloraError if one is missing, has no place in the model, or is not finite.
    """
    found = _named_as_in(model, directory)
    for name, tensor in found.items():
        if not bool((tensor.read() if isinstance(tensor, Stored) else tensor).isfinite().all()):
            raise MoeloraError(f"the adapter in {directory} has NaN or Inf in {name}")
    return found


def _named_as_in(model: PeftModel, directory: Path) -> dict[str, Tensor | Stored]:
    stored = {key: t for key, t in shards.stored(directory / FILE).items() if ".lora_" in key}
    own = {key for key in get_peft_model_state_dict(model, save_embedding_layers=False) if ".lora_" in key}
    if set(stored) == own:
        return stored
    # A matrix for each expert, as models have had them before: PEFT stacks them, in memory.
    try:
        whole = {key: t for key, t in load_file(directory / FILE).items() if ".lora_" in key}
        whole = convert_peft_adapter_state_dict_for_transformers(model, model.peft_config["default"], whole)
    except (ValueError, KeyError, RuntimeError) as error:
        raise MoeloraError(f"cannot read the adapter in {directory}: {one_line(error)}") from None
    if missing := sorted(own - set(whole)):
        raise MoeloraError(
            f"the adapter in {directory} does not fit: {len(missing)} LoRA parameters of the model have no "
            f"tensor in it, as {missing[0]}{_advice(model)}"
        )
    if strange := sorted(set(whole) - own):
        raise MoeloraError(
            f"the adapter in {directory} does not fit: {len(strange)} of its tensors have no place in the "
            f"model, as {strange[0]}{_advice(model)}"
        )
    return whole


def _advice(model: PeftModel) -> str:
    told = unconverted(model.get_base_model())
    return f". {told}" if told else ""


def _delta(directory: Path, name: str, layer: LoraLayer, tensors: dict[str, Tensor | Stored]) -> Delta:
    module = re.sub(r"(\.base_layer)+$", "", name.removeprefix(_PREFIX))
    if isinstance(layer, ParamWrapper):
        weight, experts = f"{module}.{layer.parameter_name}", layer.num_experts
    elif type(layer) is PeftLinear and not layer.lora_variant:
        weight, experts = f"{module}.weight", 1
    else:
        kind = ", ".join(type(v).__name__ for v in layer.lora_variant.values()) or type(layer).__name__
        raise MoeloraError(f"the adapter in {directory} has {kind} on {module}, which cannot be merged here")
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    shapes = [tuple(t.spec.shape if isinstance(t, Stored) else t.shape) for t in (a, b)]
    expected = [tuple(layer.lora_A["default"].weight.shape), tuple(layer.lora_B["default"].weight.shape)]
    if shapes != expected:
        told = " and ".join(str(list(shape)) for shape in shapes)
        wanted = " and ".join(str(list(shape)) for shape in expected)
        raise MoeloraError(f"the adapter in {directory} has {told} for {weight}, expected {wanted}")
    return Delta(weight, experts, a, b, float(layer.scaling["default"]))
