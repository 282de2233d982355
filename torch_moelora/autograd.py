"""Gradients of the operators.

Saved for the backward are arguments themselves (x, weight, LoRA, gates, indices), never the output. What no
argument asks for (`ctx.needs_input_grad`) is neither saved nor computed, with two exceptions that come out of
one pass: dA and dB, of which either brings the other, and dX, which comes with the gates' gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .batch_invariance import as_in_forward, flag_for_backward
from .calls import (
    CALLS,
    Call,
    Glu,
    GluBackward,
    ScatterLora,
    ScatterLoraBackward,
    ScatterLoraDab,
    ScatterLoraDbias,
    ScatterLoraDw,
    ScatterLoraDx,
    derive,
)


class Needs(NamedTuple):
    """Which arguments of `scatter_lora` need a gradient."""

    x: bool
    weight: bool
    lora_a: bool
    lora_b: bool
    bias: bool
    gates: bool

    @property
    def lora(self) -> bool:
        return self.lora_a or self.lora_b

    @property
    def dx(self) -> bool:
        """Gates' gradients come out of the same accumulators as x's."""
        return self.x or self.gates

    @property
    def rows(self) -> bool:
        """Whether x itself takes part in some gradient."""
        return self.weight or self.lora or self.gates


def needs_of(needs_input_grad: tuple[bool, ...]) -> Needs:
    """From one flag an argument of `scatter_lora`; the dispatcher leaves out trailing arguments that equal
    their defaults, and none of those needs a gradient.
    """
    asked = dict(zip(ScatterLora._fields, needs_input_grad, strict=False))
    return Needs(*(asked.get(name, False) for name in Needs._fields))


def read_by_gradients(call: ScatterLora, needs: Needs) -> ScatterLora:
    """`call` with None for the tensors that none of the gradients reads."""
    read = {
        "x": needs.rows,
        **dict.fromkeys(("weight", "weight_scale", "weight_scale2", "weight_zero"), needs.dx),
        "lora_a": needs.dx or needs.lora,
        "lora_b": needs.dx or needs.lora,
        "bias": needs.gates,
    }
    return call._replace(**{name: None for name, is_read in read.items() if not is_read})


class Dtypes(NamedTuple):
    """Those of x and of the bias, which need not be there themselves."""

    x: torch.dtype
    bias: torch.dtype | None


def dtypes_of(call: ScatterLora) -> Dtypes:
    return Dtypes(call.x.dtype, None if call.bias is None else call.bias.dtype)


def scatter_lora_gradients(dy: Tensor, call: ScatterLora, needs: Needs, dtypes: Dtypes) -> dict[str, Tensor]:
    """Argument → gradient, of the arguments that `needs` names. What `read_by_gradients` leaves of `call` is
    enough. Where sums over top_k were asked for in float32, dy is rounded to x's dtype, and dx is in float32:
    autograd rounds it, unless x takes a gradient in that (`grad_dtype`).
    """
    ops = torch.ops.moelora
    dy = dy.to(dtypes.x)
    grads = {}
    if needs.dx and needs.lora:
        joint = derive(ScatterLoraBackward, call, dy=dy, with_dgates=needs.gates)
        grads["x"], grads["gates"], grads["lora_a"], grads["lora_b"] = ops.scatter_lora_backward(*joint)
    elif needs.dx:
        dx = derive(ScatterLoraDx, call, dy=dy, x=call.x if needs.gates else None)
        grads["x"], grads["gates"] = ops.scatter_lora_dx(*dx)
    elif needs.lora:
        grads["lora_a"], grads["lora_b"] = ops.scatter_lora_dab(*derive(ScatterLoraDab, call, dy=dy))
    if needs.weight:
        grads["weight"] = ops.scatter_lora_dw(*derive(ScatterLoraDw, call, dy=dy))
    if needs.bias:
        grads["bias"] = _bias_gradient(dy, call, dtypes.bias)
    if needs.gates:
        grads["gates"] = grads["gates"].to(call.gates.dtype)
    return {name: grad for name, grad in grads.items() if getattr(needs, name)}


def _bias_gradient(dy: Tensor, call: ScatterLora, dtype: torch.dtype) -> Tensor:
    """In the bias's `dtype`. The operator's result has dy's, and the sum of a half's may be none."""
    if dtype != dy.dtype:
        gates = None if call.gates is None else call.gates.to(dtype)
        dy, call = dy.to(dtype), call._replace(gates=gates)
    return torch.ops.moelora.scatter_lora_dbias(*derive(ScatterLoraDbias, call, dy=dy))


def save(ctx, call: NamedTuple) -> None:
    """Keeps `call` for the backward: its tensors where autograd watches them, the rest beside."""
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in call))
    ctx.rest = type(call)(*(None if isinstance(value, Tensor) else value for value in call))


def saved(ctx) -> Call:
    """The call that `save` kept."""
    pairs = zip(ctx.saved_tensors, ctx.rest, strict=True)
    return type(ctx.rest)(*(value if tensor is None else tensor for tensor, value in pairs))


def in_order(kind: type[NamedTuple], grads: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """One gradient an argument of `kind`, None for those that have none."""
    return tuple(grads.get(name) for name in kind._fields)


def _scatter_lora_setup(ctx, call: ScatterLora, needs_input_grad: tuple[bool, ...]) -> None:
    ctx.needs = needs_of(needs_input_grad)
    ctx.dtypes = dtypes_of(call)
    save(ctx, read_by_gradients(call, ctx.needs))


def _scatter_lora_backward(ctx, dy):
    return in_order(ScatterLora, scatter_lora_gradients(dy, saved(ctx), ctx.needs, ctx.dtypes))


def _glu_setup(ctx, call: Glu, needs_input_grad: tuple[bool, ...]) -> None:
    save(ctx, call)


def _glu_backward(ctx, dy):
    dh = torch.ops.moelora.glu_backward(*derive(GluBackward, saved(ctx), dy=dy))
    return in_order(Glu, {"h": dh})


def _first_order_only(name: str) -> tuple[Callable, Callable]:
    def setup(ctx, call, needs_input_grad) -> None:
        pass

    def backward(ctx, *grads):
        raise RuntimeError(
            f"{name}: moelora operators can be differentiated once only, and this is a second time "
            "(a gradient taken with create_graph=True was differentiated)"
        )

    return setup, backward


FORMULAS: dict[str, tuple[Callable, Callable]] = {
    "scatter_lora": (_scatter_lora_setup, _scatter_lora_backward),
    "glu": (_glu_setup, _glu_backward),
    **{
        name: _first_order_only(name)
        for name in (
            "scatter_lora_dx",
            "scatter_lora_dab",
            "scatter_lora_backward",
            "scatter_lora_dw",
            "scatter_lora_dbias",
            "glu_backward",
        )
    },
}


def _has_tangent(call: NamedTuple) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in call)


def refuse_packed_gradients(name: str, call: NamedTuple) -> None:
    """A packed weight cannot be trained: codes have no derivative, and scales get none."""
    if getattr(call, "weight_format", "dense") == "dense":
        return
    for argument in ("weight", "weight_scale", "weight_scale2", "weight_zero"):
        t = getattr(call, argument)
        if t is not None and t.requires_grad:
            raise RuntimeError(
                f"{name}: {argument} must not require a gradient when weight_format is {call.weight_format}, "
                "got requires_grad=True"
            )


def _kernel(name: str) -> Callable:
    """The operator for tensors that autograd watches, as `torch.library.register_autograd` makes it, but for
    torch.func's transforms, too: they do not take the `torch.autograd.Function` that torch makes there. Each
    transform is one level of autograd, and the call below it goes on to the next one.
    """
    op, kind = getattr(torch.ops.moelora, name).default, CALLS[name]
    setup, gradients = FORMULAS[name]

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *args):
            # Autograd turns recording off in here; the next transform's own is below and must stay on, and
            # forward mode with it, which would find no tangent there.
            with contextlib.ExitStack() as stack:
                if torch._C._are_functorch_transforms_active():
                    stack.enter_context(torch.enable_grad())
                    stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
                out = below(keyset, *args)
            ctx.batch_invariant = flag_for_backward()
            setup(ctx, kind(*args), ctx.needs_input_grad[1:])
            return out

        @staticmethod
        def backward(ctx, *grads):
            with as_in_forward(ctx.batch_invariant):
                return None, *gradients(ctx, *grads)

    def below(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def kernel(keyset, *args):
        call = kind(*args)
        if _has_tangent(call):
            raise RuntimeError(
                f"{name}: moelora operators have no forward-mode derivative, got a tensor with a tangent"
            )
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*call)):
            return below(keyset, *call)
        refuse_packed_gradients(name, call)
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, Formula).apply(keyset, *call)

    return kernel


def register(lib: torch.library.Library) -> None:
    """Registers the backward formulas, and the error of the backward operators' own backward, with `lib`."""
    for name in FORMULAS:
        lib.impl(name, _kernel(name), "Autograd", with_keyset=True)
