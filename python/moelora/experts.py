"""transformers' experts interface on the operators.

A model class that follows the interface stores its experts as 3-D parameters and calls the function
registered under `config._experts_implementation`. `experts_forward` is that function: it reads the layout
from the module (weights, biases, orientation), the gate from a numerical probe that `moelora.enable` left in
a `Binding` on the module, and the LoRA factors from its caller, PEFT's wrapper.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from moelora import weights
from moelora.errors import MoeloraError, warn_once
from moelora.hot_factors import HotFactors, joined
from moelora.watch import Watch, has_values
from torch_moelora.formats import PackedWeight
from torch_moelora.functional import glu, moe_mlp

IMPLEMENTATION = "moelora"
LORA = "lora"  # the argument by which wrappers hand their factors to `experts_forward`
POST_NORM = "post_expert_norm"  # the module's own, between an expert's output and its routing weight
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda", "meta")

LATE = "its adapter came after moelora.enable, call moelora.enable(model) again"
# Experts classes of transformers that do not follow its interface → what stands in the way.
OUTSIDE = {
    "DbrxExperts": "all experts in one 2-D parameter",
    "JetMoeParallelExperts": "a single projection, of rows that are grouped already",
    "Llama4TextExperts": "runs every expert on every token; the routing is in its input",
    "LongcatFlashExperts": "some of its experts pass their input through",
    "Mxfp4GptOssExperts": "4-bit weights in transformers' own form; moelora.from_pretrained keeps the file's",
    "NllbMoeExperts": "each expert is a module of its own",
    "Step3p7Experts": "its forward does not dispatch to a registered function",
    "SwitchTransformersExperts": "each expert is a module of its own",
}


class Factors(NamedTuple):
    """One adapter's LoRA factors for one projection, as views of PEFT's parameters."""

    a: Tensor  # [E, R, K]
    b: Tensor  # [E, N, R]
    scaling: float
    hot: HotFactors | None = None  # of some experts, elsewhere; theirs in a and b are then not in use

    def joined(self) -> Factors:
        """All of them in a and b."""
        if self.hot is None:
            return self
        ids, a, b = self.hot
        return Factors(joined(self.a, ids, a), joined(self.b, ids, b), self.scaling)


Compute = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


class Placement(Protocol):
    """Experts in several places: a layer's sum, made of what each place computes on the rows it is given."""

    def sum(
        self, x: Tensor, ids: Tensor, gates: Tensor, parameters: dict[str, Any], compute: Compute
    ) -> Tensor:
        """[T, H] in x's dtype, or in float32 for a half x if `parameters` say `sum_fp32`.

        x [T, H], ids and gates [T, top_k], parameters: `moe_mlp`'s other arguments, and as `hot` by the
        projection's name the factors of hot experts, where a placement has them. With the same four but for
        those, `compute` is the next placement's `sum`, or `moe_mlp` itself.
        """


@dataclass
class Binding:
    """What `enable` knows of an experts module: lives on it as `_moelora`, outside its state dict."""

    previous: str | None  # the experts implementation to go back to
    reason: str | None  # why the operators cannot serve this module; None if they can
    experts: int  # how many it has
    interface: ExpertsInterface  # where its class looks functions up
    activation: dict[str, Any]  # `moe_mlp`'s arguments for what happens between the projections
    settled: bool = True  # False: the gate holds tensors without values so far, and is to be tried again
    by_peft: set[str] = field(default_factory=set)  # parameters whose wrapper leaves its LoRA to PEFT
    watches: dict[tuple[str, str], Watch] = field(default_factory=dict)  # by (parameter, adapter)
    placements: tuple[Placement, ...] = ()  # where its experts are, ranks before devices; ids become local
    where: str = ""  # the module's name in the model, if it is known


def register(interface: ExpertsInterface = ALL_EXPERTS_FUNCTIONS) -> None:
    """Make `experts_implementation="moelora"` known to transformers; calling it again changes nothing."""
    interface.register(IMPLEMENTATION, experts_forward)


def choose(module: nn.Module) -> None:
    """Let an experts module run on the operators, as `experts_implementation="moelora"` does for a model."""
    register(_interface(module))
    module.config._experts_implementation_internal = IMPLEMENTATION


def _interface(module: nn.Module) -> ExpertsInterface:
    """Where the module's class looks its function up: quantised experts have an interface of their own."""
    found = inspect.getclosurevars(type(module).forward).nonlocals
    return found.get("experts_interface", ALL_EXPERTS_FUNCTIONS)


def is_experts(module: nn.Module) -> bool:
    """Whether `module`'s class follows transformers' experts interface."""
    return hasattr(type(module).forward, "__wrapped__") and all(
        hasattr(module, flag)
        for flag in ("is_concatenated", "is_transposed", "has_bias", "has_gate", "config")
    )


def outside(model: nn.Module) -> str:
    """The model's experts that do not follow the interface, each with its reason; the end of a sentence."""
    kinds = {type(module).__name__ for module in model.modules()} & OUTSIDE.keys()
    return "".join(f"; {kind}: {OUTSIDE[kind]}" for kind in sorted(kinds))


def projections(module: nn.Module) -> tuple[str, str]:
    """The names of the module's two weights, in the order in which they are applied."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def unsupported(module: nn.Module, where: str | None = None) -> str | None:
    """Why the operators cannot run this experts module, or None if they can.

    Raises: MoeloraError where nobody can: of a weight, called `where`, only codes without a meaning are left.
    """
    for name in projections(module):
        try:
            weight = weights.weight_of(module, name, where)
        except AttributeError:
            return f"has no parameter {name}"
        except ValueError as error:
            return f"{name} {error}"
        reason = _unsupported(weight) or weights.check_tables(module, name)
        if reason is not None:
            return f"{name} {reason}"
    return None


def _unsupported(weight: Any) -> str | None:
    """The rest of a sentence on a weight."""
    if isinstance(weight, PackedWeight):
        try:
            weight.checked("enable")
        except RuntimeError as error:
            return f"is packed, and {str(error).removeprefix('enable: ')}"
    elif not isinstance(weight, Tensor):
        return "is no parameter"
    elif weight.ndim != 3:
        return f"has {weight.ndim} dimensions, expected [experts, out, in]"
    elif weight.dtype not in DTYPES:
        found = str(weight.dtype).removeprefix("torch.")
        return f"is {found}, expected a 16-, 32- or 64-bit float: load the model dequantised"
    if weight.device.type not in DEVICES:
        return f"is on {weight.device}, expected cpu or cuda"
    return None


def _count(module: nn.Module) -> int:
    """How many experts it has, 0 where that cannot be seen."""
    name = projections(module)[1]
    if weights.is_spread(module, name):
        return module._parameters[name].shape[0]
    try:
        shape = weights.weight_of(module, name).shape
    except (ValueError, AttributeError):
        shape = getattr(module._parameters.get(name), "shape", ())
    return shape[0] if shape else 0


def bind(module: nn.Module, where: str = "") -> Binding:
    """A new binding for an experts module, which is `where` in its model, without touching the module."""
    reason = unsupported(module, where)
    activation = {} if reason else recognise_activation(module)
    experts = _count(module)
    settled = all(map(has_values, module.buffers()))
    previous, interface = module.config._experts_implementation, _interface(module)
    return Binding(previous, reason, experts, interface, activation, settled, where=where)


def recognise_activation(module: nn.Module) -> dict[str, Any]:
    """`moe_mlp`'s arguments for the module's activation: a fused gate that agrees, else the module's own.

    The gate and its gradient are compared with the operator's on probe values that reach beyond every clamp:
    a model class is recognised by what it computes and never by its name or its configuration.
    """
    if not module.has_gate:
        return {"gated": False, "activation": module.act_fn}
    own: Callable[[Tensor], Tensor] = module._apply_gate
    known = {part for name in projections(module) for part in (*weights.parts(name), f"{name}_bias")}
    others = (name for name, _ in module.named_parameters() if name not in known)
    if any(name.partition(".")[0] != POST_NORM for name in others):
        return {"activation": own}  # a learned gate can look like a fused one until it is trained
    width = weights.weight_of(module, "gate_up_proj").shape[2 if module.is_transposed else 1]
    with unset_fake_temporarily(), torch.device("cpu"):  # whatever the default is now
        probe = torch.randn(16, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        probe *= torch.logspace(-1, 4, 16).unsqueeze(1)
        try:
            expected = _with_gradient(own, probe)
        except (AssertionError, RuntimeError, ValueError, TypeError):  # runs on its own device or dtype only
            return {"activation": own}
        if not all(map(has_values, expected)):
            return {"activation": own}
        for candidate in _fused_candidates(module):
            found = _with_gradient(partial(glu, **candidate), probe)
            if all(
                f.shape == e.shape and torch.allclose(f, e, 1e-5, 1e-5)
                for f, e in zip(found, expected, strict=True)
            ):
                return candidate
    return {"activation": own}


def _with_gradient(gate: Callable[[Tensor], Tensor], probe: Tensor) -> tuple[Tensor, Tensor]:
    """The gate's output, and the gradient of a sum in which every output has a weight of its own."""
    with torch.inference_mode(False), torch.enable_grad():
        h = probe.clone().requires_grad_()
        y = gate(h)
        (gradient,) = torch.autograd.grad(y, h, torch.linspace(1, 2, y.numel()).view(y.shape))
    return y.detach(), gradient


def _fused_candidates(module: nn.Module) -> list[dict[str, Any]]:
    """Every fused gate worth trying, with the constants that the module itself holds as clamp and slope."""
    constants = {
        float(v) for v in vars(module).values() if isinstance(v, float | int) and not isinstance(v, bool)
    }
    slopes = [("silu", alpha) for alpha in sorted({1.0, 1.702} | {c for c in constants if 0 < c < 10})]
    return [
        {"act": act, "alpha": alpha, "limit": limit, "up_shift": shift, "interleaved": interleaved}
        for interleaved in (False, True)
        for act, alpha in [*slopes, ("gelu", 1.0), ("gelu_tanh", 1.0)]
        for shift in (0.0, 1.0)
        for limit in [None, *sorted(c for c in constants if 0 < c < 1000)]
    ]


def experts_forward(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    lora: dict[str, Factors] | None = None,
) -> Tensor:
    """transformers' experts function on the operators.

    Args:
        self: the experts module.
        hidden_states: [..., H], floating point.
        top_k_index: [..., top_k] int; an id outside the experts is skipped (expert parallelism).
        top_k_weights: [..., top_k] routing weights.
        lora: the factors of the adapted parameters, by the parameters' names.
    Returns: [..., H] in the dtype of `hidden_states`.
    """
    binding = getattr(self, "_moelora", None)
    if binding is None:  # chosen by name, without `enable`: no adapters to hook, so nothing to undo either
        if torch.compiler.is_compiling():
            raise MoeloraError("call moelora.enable(model) before the first call of a compiled model")
        binding = self._moelora = bind(self)
    if not torch.compiler.is_compiling():
        _warn_of_late_adapters(self, binding)
        if not binding.settled and has_values(hidden_states):
            binding.activation, binding.settled = recognise_activation(self), True
    if binding.reason is not None:
        return fallback(self, binding)(self, hidden_states, top_k_index, top_k_weights)
    weight = weights.weight_of(self, projections(self)[0])
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    # As transformers' own functions do: norms may hand over fp32 where the experts are 16-bit.
    # Packed weights take any.
    fits = isinstance(weight, PackedWeight) or x.dtype == weight.dtype
    x = x if fits or torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
    ids = top_k_index.reshape(-1, top_k_index.shape[-1])
    gates = top_k_weights.reshape(ids.shape)
    gates = gates if gates.dtype in (x.dtype, torch.float32) else gates.to(x.dtype)
    parameters = _parameters(self, binding, lora or {})
    out = _placed(self, binding.placements, x, ids, gates, parameters)
    return out.to(hidden_states.dtype).reshape(hidden_states.shape)


def _placed(
    module: nn.Module,
    placements: tuple[Placement, ...],
    x: Tensor,
    ids: Tensor,
    gates: Tensor,
    parameters: dict,
) -> Tensor:
    """The layer's sum [T, H]: by the first of the placements, which calls this for what is inside of it."""
    if placements:
        return placements[0].sum(x, ids, gates, parameters, partial(_placed, module, placements[1:]))
    if getattr(module, "has_post_expert_norm", False):
        return _normalised(module, x, ids, gates, parameters)
    return moe_mlp(x, ids, gates, **parameters)


def _warn_of_late_adapters(module: nn.Module, binding: Binding) -> None:
    """PEFT parametrizes a weight for a wrapper that `enable` has not seen; for the others it was asked to."""
    for name in weights.with_peft(module) - binding.by_peft:
        if weights.is_packed(module, name):
            raise MoeloraError(f"{name} is packed, and PEFT cannot add LoRA to packed weights: {LATE}")
        warn_once(f"PEFT adds the LoRA of {name} to a copy of the weights: {LATE}")


def _parameters(module: nn.Module, binding: Binding, lora: dict[str, Factors]) -> dict[str, Any]:
    """`moe_mlp`'s arguments other than its inputs and the routing."""
    first, second = projections(module)
    several = {"gate_up": lora.get(first), "down": lora.get(second)}
    hot = {name: factors.hot for name, factors in several.items() if factors and factors.hot}
    return {
        "gate_up_weight": weights.oriented(module, weights.weight_of(module, first)),
        "down_weight": weights.oriented(module, weights.weight_of(module, second)),
        "gate_up_bias": getattr(module, f"{first}_bias") if module.has_bias else None,
        "down_bias": getattr(module, f"{second}_bias") if module.has_bias else None,
        **_lora("gate_up", several["gate_up"]),
        **_lora("down", several["down"]),
        **({"hot": hot} if hot else {}),
        **binding.activation,
    }


def _normalised(module: nn.Module, x: Tensor, ids: Tensor, gates: Tensor, parameters: dict) -> Tensor:
    """The experts' outputs, normalised one by one and then weighted: [T, H]."""
    sum_fp32 = parameters.pop("sum_fp32", False)
    rows = getattr(module, POST_NORM)(moe_mlp(x, ids, None, **parameters))
    rows = rows.float() if sum_fp32 and rows.dtype.itemsize == 2 else rows
    local = (ids >= 0) & (ids < parameters["gate_up_weight"].shape[0])
    gates = gates.where(local, 0)  # a norm may make something of the zeros of other ranks' experts
    return (rows.view(*ids.shape, -1) * gates.unsqueeze(-1)).sum(1)


def fallback(module: nn.Module, binding: Binding) -> Callable[..., Tensor]:
    """The function that ran the module before: a registered one, or the class's own forward."""
    name = binding.previous
    functions = binding.interface
    if name is None or name == IMPLEMENTATION or name not in functions:
        return type(module).forward.__wrapped__
    return functions[name]


def _lora(projection: str, factors: Factors | None) -> dict[str, Any]:
    """`moe_mlp`'s LoRA arguments for one projection."""
    if factors is None:
        return {}
    values = zip(("lora_a", "lora_b", "scaling"), factors[:3], strict=True)
    return {f"{projection}_{name}": value for name, value in values}
