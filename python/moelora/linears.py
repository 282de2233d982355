"""Frozen linear layers on the operators, as one expert, with PEFT's LoRA on them.

torch's own 16-bit `mm` is slow on a CPU without AVX-512: hundreds of times slower than float32 in a backward,
so that a 16-bit base cannot be tuned there whatever its experts do. Where it is fast, layers with LoRA gain:
PEFT keeps a float32 copy of the input for each adapter and adds two results in float32. Layers keep their
parameters, names and isinstance relations: an instance gets a subclass of its own class.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from moelora.standin import packed
from moelora.subclasses import Before, put, remove
from torch_moelora.formats import PackedWeight
from torch_moelora.functional import linear_lora

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)


def slow_in_torch(weight: Tensor) -> bool:
    """Whether torch multiplies by a weight of this dtype and device without its fast library."""
    if weight.device.type != "cpu" or weight.dtype not in HALF:
        return False
    mkldnn = torch.ops.mkldnn
    fast = (
        mkldnn._is_mkldnn_bf16_supported
        if weight.dtype is torch.bfloat16
        else mkldnn._is_mkldnn_fp16_supported
    )
    return not fast()


def _runs(x: Tensor, weight: Tensor | PackedWeight) -> bool:
    """Whether the operators can do a call. Under autocast torch chooses the dtype."""
    if torch.is_autocast_enabled(x.device.type):
        return isinstance(weight, PackedWeight)
    if isinstance(weight, PackedWeight):
        return x.dtype in DTYPES
    return not weight.requires_grad and x.dtype == weight.dtype and x.dtype in DTYPES


class FrozenLinear(nn.Linear):
    """`nn.Linear` with a frozen weight on the operators."""

    @property
    def stored(self) -> Tensor | PackedWeight:
        """The weight as it is multiplied by: [N, K], or packed (1, N, K)."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        weight = self.stored
        if not _runs(input, weight):
            return super().forward(input)
        return linear_lora(input, weight, bias=self.bias)


class PackedLinear(FrozenLinear):
    """`nn.Linear` whose weight `standin.install` put there, packed only; always on the operators."""

    @property
    def stored(self) -> PackedWeight:
        return packed(self, "weight").weight


class LoraLinear(PeftLinear):
    """PEFT's LoRA on a frozen linear layer: one call of the operators, where it is one plain adapter."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._adapter(x, kwargs)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        return linear_lora(
            x,
            self._stored(),
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
            self.base_layer.bias,
        )

    def _stored(self) -> Tensor | PackedWeight:
        base = self.base_layer
        return base.stored if isinstance(base, FrozenLinear) else base.weight

    def _adapter(self, x: Tensor, options: dict[str, Any]) -> str | None:
        """The adapter, if the operators compute with it what PEFT does."""
        present = [name for name in self.active_adapters if name in self.lora_A]
        if (
            len(present) != 1
            or self.disable_adapters
            or self.merged
            or any(v is not None for v in options.values())
        ):
            return None
        (name,) = present
        a, b = self.lora_A[name], self.lora_B[name]
        plain = name not in self.lora_variant and type(a) is type(b) is nn.Linear and b.bias is None
        drops = self.training and getattr(self.lora_dropout[name], "p", 0.0) > 0
        fits = a.weight.dtype == b.weight.dtype and a.weight.dtype in (torch.float32, x.dtype)
        return name if plain and not drops and fits and _runs(x, self._stored()) else None


# Products of activations, in attention.
_ATTENTION = (
    functional.scaled_dot_product_attention,
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__),
    *(torch.bmm, Tensor.bmm),
)


class _Products(TorchFunctionMode):
    """`functional.linear` by a frozen 16-bit weight, on the operators: what modules of other classes call.
    Products of 16-bit activations in float32.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.linear and not kwargs and len(args) in (2, 3):
            x, weight = args[:2]
            if weight.ndim == 2 and slow_in_torch(weight) and _runs(x, weight):
                return linear_lora(x, weight, bias=args[2] if len(args) == 3 else None)
        if function in _ATTENTION and args and _slow_products(args[0]):
            named = {name: _widened(value) for name, value in (kwargs or {}).items()}
            return function(*map(_widened, args), **named).to(args[0].dtype)
        return function(*args, **(kwargs or {}))


def _slow_products(value: Any) -> bool:
    """Whether torch would multiply this in 16 bits, slowly."""
    slow = isinstance(value, Tensor) and slow_in_torch(value)
    return slow and not torch.is_autocast_enabled(value.device.type)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


class OwnProducts(Before):
    """Comes before the class of a module with products of its own: of activations, as attention has, or by a
    frozen matrix, as a router.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # torch 2.13 cannot trace autograd functions under a mode
            return super().forward(*args, **kwargs)
        with _Products():
            return super().forward(*args, **kwargs)


def hook(model: nn.Module, every: bool | None) -> int:
    """Put frozen linear layers on the operators; returns how many are there now.

    `every`: all of them; None: those that are slow in torch, and in bf16 on a CPU PEFT's LoRA on the others;
    False: none. Packed ones are there anyway.
    """
    unhook(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            if type(module) is nn.Linear and _wanted(module, every):
                module.__class__ = FrozenLinear
        elif every is not False and (_slow_matrix(module) or _slow_attention(module)):
            put(OwnProducts, module)
    for module in model.modules():  # its base layer may come after it
        if type(module) is PeftLinear and _in_one_call(module.base_layer, every):
            module.__class__ = LoraLinear
    return count(model)


def count(model: nn.Module) -> int:
    """How many frozen linear layers run on the operators, alone or with their LoRA."""
    found = {id(module) for module in model.modules() if isinstance(module, FrozenLinear)}
    return len(found | {id(module.base_layer) for module in model.modules() if type(module) is LoraLinear})


def _wanted(linear: nn.Linear, every: bool | None) -> bool:
    weight = linear.weight
    if (
        not _is_frozen(linear)
        or weight.dtype not in DTYPES
        or weight.device.type not in ("cpu", "cuda", "meta")
    ):
        return False
    return slow_in_torch(weight) if every is None else every


def _is_frozen(linear: nn.Linear) -> bool:
    return not linear.weight.requires_grad and not (linear.bias is not None and linear.bias.requires_grad)


def _in_one_call(base: nn.Module, every: bool | None) -> bool:
    """Whether LoRA on a layer is computed with it; by itself the layer may be torch's."""
    if isinstance(base, FrozenLinear):
        return True
    if every is not None or type(base) is not nn.Linear or not _is_frozen(base):
        return False
    # accelerate's hook may bring a weight that lies here, or nowhere, to another device for each call.
    stays = base.weight.device.type in ("cpu", "meta") and not hasattr(base, "_hf_hook")
    return stays and base.weight.dtype is torch.bfloat16


def _may_be_slow(weight: Tensor) -> bool:
    """As `slow_in_torch`; without storage, as on the CPU. OwnProducts asks again in each call."""
    return slow_in_torch(torch.empty(0, dtype=weight.dtype) if weight.is_meta else weight)


def _slow_matrix(module: nn.Module) -> bool:
    own = None if isinstance(module, nn.Embedding) else module._parameters.get("weight")
    return own is not None and own.ndim == 2 and not own.requires_grad and _may_be_slow(own)


def _slow_attention(module: nn.Module) -> bool:
    """Whether it is transformers' attention, of a model in a dtype that is slow in torch."""
    if getattr(module, "is_causal", None) is None or not hasattr(module, "scaling"):
        return False
    return any(_may_be_slow(p) for p in module.parameters())


def unhook(model: nn.Module) -> None:
    """Give every linear layer its own class back."""
    for module in model.modules():
        if type(module) is FrozenLinear:
            module.__class__ = nn.Linear
        elif type(module) is LoraLinear:
            module.__class__ = PeftLinear
        elif isinstance(module, OwnProducts):
            remove(module)
