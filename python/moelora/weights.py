"""How an experts module stores its weights: as parameters, or packed by us, transformers or bitsandbytes.

What is packed is read in place. The attribute of the weight's name is not always it: bitsandbytes hangs a
parametrization on it, which unpacks all experts at each access.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from moelora import standin
from moelora.errors import MoeloraError
from torch_moelora.formats import NESTED_RUN, PackedWeight, nested_values

BLOCK = 128  # of fp8 scales: so many rows and columns
SCALE = "_scale_inv"  # behind the weight's name in transformers' FP8Experts
E4M3 = torch.float8_e4m3fn
# What codes are stored in; a parameter of another of these dtypes is no dense weight.
PACKED_DTYPES = (torch.uint8, torch.int8, E4M3, torch.float8_e5m2)


def weight_of(module: nn.Module, name: str, where: str | None = None) -> Tensor | PackedWeight:
    """The module's weight `name`, in the orientation in which it is stored.

    where: the module's name in the model; None: as `moelora.enable` knows it, else its class.

    Raises: ValueError that ends a sentence on the weight, where it is packed in a way that no format has;
    AttributeError where there is none; MoeloraError where nobody can tell its numbers, and where it could be
    read when the module was enabled and now cannot.
    """
    binding = vars(module).get("_moelora")
    where = where or (binding.where if binding is not None else "") or type(module).__name__
    try:
        return _weight_of(module, name, where)
    except ValueError as error:
        if binding is None or binding.reason is not None:
            raise
        raise MoeloraError(f"{where}.{name} {error}; it was changed after moelora.enable") from None


def _weight_of(module: nn.Module, name: str, where: str) -> Tensor | PackedWeight:
    beside = standin.beside(module, name)
    if beside is not None:
        return beside.weight
    if is_parametrized(module, name):
        state = getattr(module.parametrizations[name][0], "quant_state", None)
        if state is not None:
            return _of_bitsandbytes(module.parametrizations[name].original, state)
    weight = getattr(module, name)
    if not isinstance(weight, Tensor):
        return weight
    scale = getattr(module, name + SCALE, None)
    if weight.dtype in PACKED_DTYPES:
        return _of_transformers(weight, scale)
    if scale is not None:
        raise MoeloraError(
            f"{where}.{name} is {_named(weight.dtype)} beside its scales {name}{SCALE}: its fp8 codes became "
            "numbers without them, as .to(dtype), .float() and .half() do; load it anew and leave its dtype, "
            "or with moelora.from_pretrained, whose packed weights no cast changes"
        )
    return weight


def is_spread(module: nn.Module, name: str) -> bool:
    """Whether only some experts of the module's weight `name` are here."""
    beside = standin.beside(module, name)
    return isinstance(beside, standin.Part) or (beside is not None and not beside.whole)


def with_peft(module: nn.Module) -> set[str]:
    """The parameters to which PEFT's own code adds LoRA in this call."""
    return {
        name
        for name, several in getattr(module, "parametrizations", {}).items()
        if any(type(one).__module__.startswith("peft.") for one in several)
    }


def _of_bitsandbytes(codes: Tensor, state) -> PackedWeight:
    """Blocks are runs of the flat weight, so rows must be whole numbers of them."""
    experts, rows, columns = state.shape
    block = state.blocksize
    if columns % block:
        raise ValueError(f"has blocks of {block} across rows of {columns}")
    scale, scale2 = state.absmax, None
    if state.nested:
        scale2 = _nested(state, scale)
    return PackedWeight(
        codes.view(experts, rows, columns // 2),
        scale.view(experts, rows, columns // block),
        scale2,
        None,
        state.quant_type,
    )


def _nested(state, scale: Tensor) -> Tensor:
    """(absmax2, offset) of each run. The operators have bitsandbytes' own map of 8-bit codes."""
    second = state.state2
    if second.blocksize != NESTED_RUN:
        raise ValueError(f"has nested blocks of {second.blocksize}, expected {NESTED_RUN}")
    return torch.stack((second.absmax, state.offset.expand_as(second.absmax)), 1)


def _of_transformers(weight: Tensor, scale: Tensor | None) -> PackedWeight:
    """FP8Experts': scales of blocks of 128 × 128, of rows, or one each for gate, up and down."""
    if scale is None:
        raise ValueError(f"is {_named(weight.dtype)} without scales in {SCALE}")
    if weight.dtype == torch.int8:  # two E2M1 a byte, DeepSeek V4's
        return PackedWeight(weight.view(torch.uint8), _exponents(scale), None, None, "mxfp4")
    if weight.dtype != E4M3:
        raise ValueError(f"is {_named(weight.dtype)}, expected a 16-, 32- or 64-bit float, or float8_e4m3fn")
    experts, rows, columns = weight.shape
    down, across = (-(-size // BLOCK) for size in (rows, columns))
    given = scale if scale.dtype in (torch.float32, torch.bfloat16) else scale.float()  # powers of two: exact
    given = given.view(experts, 1, 1) if scale.ndim == 1 else given  # one for an expert
    if given.shape[1] not in (rows, down, 1) and rows % given.shape[1] == 0:  # gate and up have their own
        given = given.repeat_interleave(rows // given.shape[1], 1)
    if given.shape[1] not in (rows, down, 1) or given.shape[2] not in (across, 1):
        shapes = f"{list(scale.shape)} for {list(weight.shape)}"
        raise ValueError(f"has scales {shapes}, expected blocks of {BLOCK}")
    return PackedWeight(weight, given, None, None, "fp8")


def _exponents(scale: Tensor) -> Tensor:
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return scale.view(torch.uint8)
    raise ValueError(f"has scales of {_named(scale.dtype)}, expected powers of two (float8_e8m0fnu)")


def check_tables(module: nn.Module, name: str) -> str | None:
    """Why the constants of a weight that bitsandbytes packed are not the operators', or None."""
    if not is_parametrized(module, name):
        return None
    state = getattr(module.parametrizations[name][0], "quant_state", None)
    if state is None or not state.nested:
        return None
    own = nested_values(state.state2.code.device)
    return None if torch.equal(state.state2.code.float(), own) else f"{name} has another map of nested scales"


def oriented(module: nn.Module, weight: Tensor | PackedWeight) -> Tensor | PackedWeight:
    """The weight as [E, out, in], on the same memory."""
    if not module.is_transposed:
        return weight
    return weight.turned() if isinstance(weight, PackedWeight) else weight.transpose(1, 2)


def parts(name: str) -> tuple[str, ...]:
    """What the parameters may be called that the weight `name` consists of."""
    return name, name + SCALE, f"parametrizations.{name}.original"


def is_packed(module: nn.Module, name: str) -> bool:
    """Whether the module's weight `name` exists packed only."""
    try:
        return isinstance(weight_of(module, name), PackedWeight)
    except (ValueError, AttributeError):
        return False


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
