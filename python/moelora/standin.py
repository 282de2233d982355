"""A packed weight inside a transformers module: its tensors, and a parameter that stands for it.

`install` puts both there. The parameter has the weight's name, shape and dtype and holds one zero: PEFT,
counts of parameters and device maps read what they need from it, and whatever would compute with it is told
why that cannot be. The tensors are the buffers of a module beside it, which changes of dtype leave alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moelora.errors import MoeloraError
from moelora.packed_layout import PARTS
from torch_moelora.formats import PackedWeight

BESIDE = "_packed"  # behind the weight's name: the module that has its tensors
SPREAD = "spread"  # what is told of a weight that ranks share
# What only moves, casts or copies a tensor: done to the one element.
_LIKE = {
    "to", "float", "half", "bfloat16", "double", "cpu", "cuda", "type", "clone", "contiguous", "empty_like",
    "zeros_like", "pin_memory",
}  # fmt: skip
_SAME = {"detach", "detach_", "requires_grad_", "share_memory_"}
# What asks for no numbers.
_ABOUT = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_floating_point",
    "is_complex", "is_contiguous", "get_device", "storage_offset", "data_ptr", "untyped_storage", "storage",
    "_typed_storage", "__len__", "__hash__", "is_pinned", "is_shared", "is_inference", "is_signed", "is_conj",
    "is_neg", "_is_view", "is_tensor", "is_same_size", "__dir__", "_has_compatible_shallow_copy_type",
}  # fmt: skip


class StandIn(nn.Parameter):
    """Stands for a packed weight: one zero, expanded to the weight's shape.

    It never requires grad, and every operation that would read its numbers raises a MoeloraError.
    """

    told: str

    def __new__(cls, data: Tensor, told: str) -> StandIn:
        """`data`: of the shape, dtype and device to be had; its first element is all that stays."""
        with torch._C.DisableTorchFunctionSubclass():
            one = data.detach().as_strided((1,) * data.ndim, (0,) * data.ndim).clone()
            stand_in = torch.Tensor._make_subclass(cls, one.expand(data.shape), False)
        stand_in.told = told
        return stand_in

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, told: str) -> StandIn:
        return cls(torch.zeros((1,) * len(shape), dtype=dtype, device=device).expand(shape), told)

    def __deepcopy__(self, memo: dict) -> StandIn:
        return memo.setdefault(id(self), type(self)(self, self.told))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return StandIn.of, (tuple(self.shape), self.dtype, torch.device(self.device), self.told)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"StandIn({list(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name in ("__get__", "__set__", "__delete__"):
            return _attribute(name, getattr(func.__self__, "__name__", ""), func, args)
        with torch._C.DisableTorchFunctionSubclass():
            if isinstance(args[0] if args else None, cls):
                if name == "requires_grad_" and (args[1:] or tuple(kwargs.values()) or (True,))[0]:
                    raise _refusal(args[0], "a packed weight cannot be trained")
                if name in _ABOUT or (name == "type" and len(args) == 1 and not kwargs):
                    return func(*args, **kwargs)
                if name == "copy_" and isinstance(args[1], cls):  # of a state dict
                    return args[0]
                if name in _SAME:
                    return args[0] if name.endswith("_") else cls(args[0], args[0].told)
                if name in _LIKE:
                    kwargs.pop("memory_format", None)
                    one = args[0].as_strided((1,), (0,))
                    return cls(func(one, *args[1:], **kwargs).expand(args[0].shape), args[0].told)
        raise _refusal(next(_stand_ins((args, kwargs))), f"{name.strip('_')} would need its numbers")


def _attribute(access: str, attribute: str, func: Callable, args: tuple) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        stand_in = args[0]
        if access == "__get__":
            if attribute == "data":
                return StandIn(stand_in, stand_in.told)
            found = func(*args)
            if isinstance(found, Tensor) and attribute not in ("grad", "_grad", "_base"):
                raise _refusal(stand_in, f".{attribute} would need its numbers")
            return found
        value = args[1] if len(args) > 1 else None
        if attribute == "data" and isinstance(value, StandIn):
            return func(stand_in, value.as_subclass(Tensor))
        if attribute == "requires_grad" and value:
            raise _refusal(stand_in, "a packed weight cannot be trained")
        if isinstance(value, Tensor):
            raise _refusal(stand_in, f"its .{attribute} cannot be replaced")
        return func(*args)


def _stand_ins(values: Any) -> Iterator[StandIn]:
    if isinstance(values, StandIn):
        yield values
    elif isinstance(values, list | tuple | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _stand_ins(value)


def _refusal(stand_in: StandIn, why: str) -> MoeloraError:
    dense = "" if SPREAD in stand_in.told else "; model.dequantize() makes it dense"
    return MoeloraError(
        f"{stand_in.told}, and {why}: only moelora's experts implementation reads it (moelora.enable(model), "
        f"after every change of adapters){dense}"
    )


class Packed(nn.Module):
    """The tensors of a packed weight, as buffers. A change of dtype leaves them as they are.

    whole: False for those of some experts only, which no state dict has.
    """

    def __init__(self, weight: PackedWeight, whole: bool = True) -> None:
        super().__init__()
        for part, tensor in zip(PARTS, weight[:4], strict=True):
            self.register_buffer(part, tensor, persistent=whole)
        self.whole = whole
        self.format, self.transposed = weight.format, weight.transposed

    @property
    def weight(self) -> PackedWeight:
        return PackedWeight(self.codes, self.scale, self.scale2, self.zero, self.format, self.transposed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """As bytes: `fn` casts floating-point tensors, and codes of fp8 and scales are no numbers to cast."""
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            moved = fn(buffer.view(torch.uint8))
            if moved.dtype != torch.uint8:
                raise MoeloraError(
                    f"the weight is packed ({self.format}): its {name} cannot become {moved.dtype}"
                )
            self._buffers[name] = moved.view(buffer.dtype)
        return self

    def extra_repr(self) -> str:
        return f"{self.format}, {list(self.weight.shape)}"


class Part(nn.Module):
    """The dense weight of some experts, as a buffer that no state dict has."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)


def install(
    module: nn.Module, name: str, weight: PackedWeight, dtype: torch.dtype, where: str, matrix: bool = False
) -> None:
    """Make `weight` the module's weight `name`, which is `where` in the model.

    dtype: that of the model. matrix: of E = 1, which stands as [N, K].
    """
    told = f"{where} is packed ({weight.format})"
    shape = weight.shape[1:] if matrix else weight.shape
    module.register_parameter(name, StandIn.of(shape, dtype, weight.device, told))
    module.add_module(name + BESIDE, Packed(weight))


def spread(
    module: nn.Module,
    name: str,
    weight: Tensor | PackedWeight,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    told: str,
) -> None:
    """Make `weight`, of some experts, what is here of the module's weight `name`, which is of `shape`."""
    if hasattr(module, name + BESIDE):
        delattr(module, name + BESIDE)
    module.register_parameter(name, StandIn.of(shape, dtype, weight.device, told))
    part = Packed(weight, whole=False) if isinstance(weight, PackedWeight) else Part(weight)
    module.add_module(name + BESIDE, part)


def beside(module: nn.Module, name: str) -> Packed | Part | None:
    """What has the numbers of the module's weight `name`, if its parameter is a stand-in."""
    found = getattr(module, name + BESIDE, None)
    return found if isinstance(found, Packed | Part) else None


def packed(module: nn.Module, name: str) -> Packed | None:
    """The tensors of the module's weight `name`, if `install` put them there."""
    found = getattr(module, name + BESIDE, None)
    return found if isinstance(found, Packed) else None


def installed(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Packed]]:
    """(name of the module, module, name of the weight, its tensors) of all that `install` did in a model."""
    for where, module in list(model.named_modules()):
        for child, beside in list(module.named_children()):
            if isinstance(beside, Packed) and child.endswith(BESIDE):
                yield where, module, child.removesuffix(BESIDE), beside


def uninstall(module: nn.Module, name: str, weight: Tensor) -> None:
    """Give the module a dense weight in the place of the packed one."""
    delattr(module, name + BESIDE)
    module.register_parameter(name, None)
    setattr(module, name, nn.Parameter(weight, requires_grad=False))
