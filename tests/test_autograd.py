"""Gradients through autograd: exact, economical, once only, and under autocast."""

import itertools

import problems
import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_moelora import functional
from torch_moelora.switches import SWITCHES

SMALL = Case(tokens=4, top_k=2, experts=3, k=4, n=5, rank=2, dtype=FP64, bias="same", gates="same")
# In Triton's interpreter along a random direction instead of along each coordinate: seconds, not minutes.
FAST = SWITCHES.backend == "triton"
NAMES = ("x", "weight", "lora_a", "lora_b", "bias", "gates")


def call(p: problems.Problem, tensors: dict[str, Tensor | None] | None = None) -> Tensor:
    """scatter_lora on a problem, with some of its tensors replaced."""
    t = {name: getattr(p, name) for name in NAMES} | (tensors or {})
    return functional.scatter_lora(
        t["x"], t["weight"], *p.routing, lora_a=t["lora_a"], lora_b=t["lora_b"], scaling=p.case.scaling,
        bias=t["bias"], gates=t["gates"], x_grouped=p.case.x_grouped, y_grouped=p.case.y_grouped,
    )  # fmt: skip


def leaves(p: problems.Problem, names=NAMES) -> dict[str, Tensor]:
    return {n: getattr(p, n).detach().clone().requires_grad_() for n in names if getattr(p, n) is not None}


class Seen(TorchDispatchMode):
    """Names of the moelora operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moelora":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


GRADCHECK = {
    "gates": SMALL,
    "no gates, slot order": SMALL.with_(gates="none"),
    "grouped result": SMALL.with_(gates="none", y_grouped=True),
    "grouped input with gates": SMALL.with_(x_grouped=True),
    "grouped on both sides": SMALL.with_(gates="none", x_grouped=True, y_grouped=True),
    "no LoRA": SMALL.with_(rank=0),
    "no bias": SMALL.with_(bias="none"),
    "sentinels": SMALL.with_(routing="sentinels"),
    "an expert twice for a token": SMALL.with_(experts=1),
}


@pytest.mark.operators
@pytest.mark.long_interpreted
@pytest.mark.parametrize("case", GRADCHECK.values(), ids=GRADCHECK)
def test_gradcheck(case):
    p = problems.build(case)
    tensors = leaves(p)
    names = list(tensors)
    torch.autograd.gradcheck(
        lambda *args: call(p, dict(zip(names, args, strict=True))), tuple(tensors.values()), fast_mode=FAST
    )


@pytest.mark.operators
@pytest.mark.parametrize("options", [("silu", 1.702, 1.0, 1.0, True), ("gelu",), ("gelu_tanh",), ("silu",)])
def test_gradcheck_glu(options):
    h = torch.randn(5, 8, dtype=FP64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.autograd.gradcheck(lambda h: functional.glu(h, *options), (h,), fast_mode=FAST)


EXPECTED = {
    "x": {"scatter_lora_dx"},
    "gates": {"scatter_lora_dx"},
    "weight": {"scatter_lora_dw"},
    "lora_a": {"scatter_lora_dab"},
    "lora_b": {"scatter_lora_dab"},
    "bias": {"scatter_lora_dbias"},
}


@pytest.mark.parametrize(
    "needed", [c for r in (1, 2) for c in itertools.combinations(NAMES, r)], ids=lambda n: "+".join(n)
)
def test_only_what_is_needed_is_computed(needed):
    p = problems.build(SMALL)
    tensors = leaves(p, needed)
    y = call(p, tensors)
    with Seen() as seen:
        grads = torch.autograd.grad(y.sum(), tuple(tensors.values()))
    expected = set().union(*(EXPECTED[name] for name in needed))
    if {"scatter_lora_dx", "scatter_lora_dab"} <= expected:
        expected = expected - {"scatter_lora_dx", "scatter_lora_dab"} | {"scatter_lora_backward"}
    assert set(seen.names) == expected
    assert len(seen.names) == len(set(seen.names)), "an operator ran twice"
    for tensor, grad in zip(tensors.values(), grads, strict=True):
        assert grad.shape == tensor.shape and grad.dtype == tensor.dtype


SAVED = {
    "x": {"weight", "lora_a", "lora_b", "gates"},
    "weight": {"x", "gates"},
    "lora_a": {"x", "lora_a", "lora_b", "gates"},
    "bias": {"gates"},
    "gates": {"x", "weight", "lora_a", "lora_b", "bias", "gates"},
}


@pytest.mark.parametrize("needed", SAVED)
def test_only_inputs_are_saved(needed):
    """The arguments' own memory, never a copy or the output, and none that its gradient does not read."""
    p = problems.build(SMALL)
    tensors = leaves(p, (needed,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call(p, tensors)
    owners = {name: tensors.get(name, getattr(p, name)).data_ptr() for name in NAMES}
    owners |= {"slots": p.slots.data_ptr(), "offsets": p.offsets.data_ptr()}
    pointers = {pointer: name for name, pointer in owners.items()}
    names = {pointers[t.data_ptr()] for t in saved}
    assert names == SAVED[needed] | {"slots", "offsets"}
    assert y.requires_grad


SAVED_OF_MLP = {
    "x": {"gate_up", "h", "down", "down_a", "down_b", "gates"},
    "down": {"h", "gates"},
    "down_a": {"h", "down_a", "down_b", "gates"},
    "bias": {"gates"},
    "gates": {"h", "down", "down_a", "down_b", "bias", "gates"},
}


@pytest.mark.parametrize("needed", SAVED_OF_MLP)
def test_moe_mlp_saves_by_the_same_rule(needed):
    """With h [S, 2I] for glu(h) [S, I], and nothing that has the size of glu(h)."""
    shapes = {"x": (4, 6), "gate_up": (3, 10, 6), "down": (3, 6, 5), "down_a": (3, 2, 5), "down_b": (3, 6, 2)}
    t = {n: torch.randn(s) for n, s in (shapes | {"bias": (3, 6), "gates": (4, 2)}).items()}
    t[needed].requires_grad_()
    ids = torch.tensor([[0, 1], [2, 0], [1, 1], [0, 2]])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        functional.moe_mlp(
            t["x"], ids, t["gates"], t["gate_up"], t["down"], down_lora_a=t["down_a"],
            down_lora_b=t["down_b"], down_bias=t["bias"],
        )  # fmt: skip
    pointers = {tensor.data_ptr(): name for name, tensor in t.items()}
    names = {
        pointers.get(s.data_ptr(), "h" if s.shape == (8, 10) else f"new {list(s.shape)}")
        for s in saved
        if s.is_floating_point()
    }
    assert names == SAVED_OF_MLP[needed]


def test_no_graph_without_need():
    p = problems.build(SMALL)
    assert not call(p).requires_grad
    with torch.no_grad():
        assert not call(p, leaves(p)).requires_grad


def test_gradients_keep_the_parameters_dtypes():
    """fp32 LoRA, bias and gates over bf16: fp32 gradients; bf16 x: bf16 gradient."""
    p = problems.build(SMALL.with_(dtype=BF16, lora="fp32", bias="fp32", gates="fp32"))
    tensors = leaves(p)
    call(p, tensors).sum().backward()
    dtypes = {name: t.grad.dtype for name, t in tensors.items()}
    assert dtypes == {
        "x": BF16, "weight": BF16, "lora_a": FP32, "lora_b": FP32, "bias": FP32, "gates": FP32
    }  # fmt: skip


def test_gradients_reach_pefts_parameters():
    """Through the views that a model layer makes of PEFT's [E·R, K] and [N, R·E]."""
    case = SMALL.with_(experts=3, rank=2)
    p = problems.build(case)
    a = torch.randn(6, 4, dtype=FP64, requires_grad=True)
    b = torch.randn(5, 6, dtype=FP64, requires_grad=True)
    views = {"lora_a": a.view(3, 2, 4), "lora_b": b.view(5, 2, 3).permute(2, 0, 1)}
    call(p, views).square().sum().backward()
    dense = p.weight + case.scaling * torch.einsum("enr,erk->enk", views["lora_b"], views["lora_a"])
    da, db = a.grad.clone(), b.grad.clone()
    a.grad = b.grad = None
    call(p, {"weight": dense, "lora_a": None, "lora_b": None}).square().sum().backward()
    torch.testing.assert_close(da, a.grad)
    torch.testing.assert_close(db, b.grad)


@pytest.mark.parametrize("gates", ["none", "same", "fp32"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_bias_in_fp32_has_a_gradient_in_fp32(dtype, gates):
    """Sums that a half cannot hold: 257 in bf16, more than 65504 in fp16."""
    case = SMALL.with_(dtype=dtype, lora="fp32", bias="fp32", gates=gates, tokens=257, top_k=1, experts=1)
    p = problems.build(case)
    bias = p.bias.requires_grad_()
    if p.gates is not None:
        p.gates.fill_(1)
    out = call(p, {"bias": bias})
    (found,) = torch.autograd.grad(out, bias, torch.full_like(out, 256))
    assert found.dtype == FP32 and (found == 257 * 256).all()


BACKWARDS = ("x", "weight", "lora_a", "bias")


@pytest.mark.parametrize("needed", BACKWARDS)
def test_double_backward_raises(needed):
    p = problems.build(SMALL)
    tensors = leaves(p, (needed,))
    y = call(p, tensors).square().sum()
    (grad,) = torch.autograd.grad(y, tuple(tensors.values()), create_graph=True)
    (name,) = EXPECTED[needed]
    with pytest.raises(RuntimeError, match=rf"^{name}: moelora operators can be differentiated once only"):
        grad.sum().backward()


def test_double_backward_of_glu_raises():
    h = torch.randn(3, 4, dtype=FP64, requires_grad=True)
    (grad,) = torch.autograd.grad(functional.glu(h).sum(), h, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"^glu_backward: moelora operators can be differentiated once only"
    ):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast(dtype):
    """x, weight and bias follow; fp32 LoRA and gates stay masters, and all gradients come back as they went
    in.
    """
    p = problems.build(SMALL.with_(dtype=FP32, k=32, n=24, tokens=20))
    tensors = leaves(p)
    with torch.autocast("cpu", dtype=dtype):
        y = call(p, tensors)
    assert y.dtype == dtype
    y.float().sum().backward()
    for name, t in tensors.items():
        assert t.grad is not None and t.grad.dtype == FP32, name
    by_hand = {n: t.detach().to(dtype) for n, t in tensors.items() if n in ("x", "weight", "bias")}
    assert torch.equal(y, call(p, {n: t.detach() for n, t in tensors.items()} | by_hand))


def test_autocast_leaves_fp64_and_disabled_regions_alone():
    p = problems.build(SMALL)
    with torch.autocast("cpu", dtype=BF16):
        assert call(p).dtype == FP64
        with torch.autocast("cpu", enabled=False):
            assert call(problems.build(SMALL.with_(dtype=FP32))).dtype == FP32


def test_autocast_brings_another_half_along():
    p = problems.build(SMALL.with_(dtype=FP16))
    with torch.autocast("cpu", dtype=BF16):
        assert call(p).dtype == BF16


def test_backward_inside_autocast():
    p = problems.build(SMALL.with_(dtype=FP32))
    tensors = leaves(p)
    with torch.autocast("cpu", dtype=BF16):
        call(p, tensors).float().sum().backward()
    assert tensors["lora_a"].grad.dtype == FP32


def test_checkpoint_recomputes_the_same():
    p = problems.build(SMALL)
    grads = []
    for wrapped in (False, True):
        tensors = leaves(p)
        names = list(tensors)
        f = lambda *args: call(p, dict(zip(names, args, strict=True)))  # noqa: B023, E731
        args = tuple(tensors.values())
        y = torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False) if wrapped else f(*args)
        y.square().sum().backward()
        grads.append([t.grad for t in args])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def mlp_and_arguments() -> tuple:
    """moe_mlp as a function of x, gates and LoRA, and those."""
    torch.manual_seed(0)
    x, gates, a = torch.randn(3, 4), torch.rand(3, 1), torch.randn(2, 3, 4)
    gate_up, down, b = torch.randn(2, 8, 4), torch.randn(2, 4, 4), torch.randn(2, 4, 3)
    ids = torch.tensor([[0], [1], [0]])

    def mlp(x, gates, a) -> Tensor:
        return functional.moe_mlp(x, ids, gates, gate_up, down, down_lora_a=a, down_lora_b=b)

    return mlp, (x, gates, a)


def scatter_lora_and_arguments() -> tuple:
    p = problems.build(SMALL)
    names = ("x", "weight", "lora_b", "gates")
    return lambda *args: call(p, dict(zip(names, args, strict=True))), tuple(getattr(p, n) for n in names)


def glu_and_arguments() -> tuple:
    return functional.glu, (torch.randn(3, 8, generator=torch.Generator().manual_seed(0)),)


TRANSFORMED = [mlp_and_arguments, scatter_lora_and_arguments, glu_and_arguments]


@pytest.mark.parametrize("make", TRANSFORMED)
def test_torch_func(make):
    """grad, vjp and vmap over grad, to the bit what autograd gives."""
    f, args = make()
    loss = lambda *args: f(*args).square().sum()  # noqa: E731
    every = tuple(range(len(args)))
    tracked = [t.clone().requires_grad_() for t in args]
    expected = torch.autograd.grad(loss(*tracked), tracked)
    y, backward = torch.func.vjp(f, *args)
    batched = [torch.stack((t, t)) for t in args]
    for got in (
        torch.func.grad(loss, argnums=every)(*args),
        backward(2 * y),
        [t[1] for t in torch.vmap(torch.func.grad(loss, argnums=every))(*batched)],
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("make", TRANSFORMED)
def test_torch_func_twice_raises(make):
    f, (x, *rest) = make()
    once = torch.func.grad(lambda x: f(x, *rest).square().sum())
    with pytest.raises(RuntimeError, match="moelora operators can be differentiated once only"):
        torch.func.grad(lambda x: once(x).sum())(x)


@pytest.mark.parametrize("make", TRANSFORMED)
def test_forward_mode_raises(make):
    """And gives no zeros for a tangent."""
    f, (x, *rest) = make()
    message = r"(scatter_lora|glu): moelora operators have no forward-mode derivative, got a tensor with"
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda x: f(x, *rest), (x,), (x,))
    with pytest.raises(RuntimeError, match=message), torch.autograd.forward_ad.dual_level():
        f(torch.autograd.forward_ad.make_dual(x, x), *rest)


@pytest.mark.parametrize("make", TRANSFORMED)
def test_forward_mode_over_a_gradient_raises(make):
    """A Hessian: the operators are in a graph of autograd's when the tangent comes."""
    f, (x, *rest) = make()
    loss = lambda x: f(x, *rest).square().sum()  # noqa: E731
    message = r"moelora operators have no forward-mode derivative, got a tensor with a tangent"
    for differentiated in (
        lambda: torch.func.jvp(torch.func.grad(loss), (x,), (x,)),
        lambda: torch.func.hessian(loss)(x),
        lambda: torch.func.jacfwd(torch.func.jacrev(loss))(x),
    ):
        with pytest.raises(RuntimeError, match=message):
            differentiated()


@pytest.mark.parametrize("make", TRANSFORMED)
def test_jacrev_has_a_row_for_every_output(make):
    f, (x, *rest) = make()
    jacobian = torch.func.jacrev(lambda x: f(x, *rest))(x)
    y = f(x.requires_grad_(), *rest)
    assert jacobian.shape == (*y.shape, *x.shape)
    for i in range(y.shape[1]):
        (row,) = torch.autograd.grad(y[0, i], x, retain_graph=True)
        torch.testing.assert_close(jacobian[0, i], row)
