"""Layers whose experts are in host memory, on a device that is late on purpose, and on the CPU alone."""

from dataclasses import dataclass

import late_device
import torch
from moelora.hot_factors import HotFactors
from moelora.placement import beside
from moelora.placement.beside import layer, rates
from moelora.placement.beside.hot import Hot
from torch import Tensor

from torch_moelora.formats import quantize
from torch_moelora.functional import moe_mlp

LATE = late_device.start()
RATES = rates.Rates(1e9, 1e9, 1e9, 1e12)
BF16 = torch.bfloat16
STREAMS = {"all late": 0, "copies ahead": 1, "all ahead": 2}


class Here:
    """A placement like the one beside an accelerator, with every place on the CPU. x is a leaf, whose
    gradient of several places is rounded once.
    """

    def __init__(self, ids: list[int], count: int) -> None:
        self.ids, self.count = ids, count

    def sum(self, x, ids, gates, parameters, compute):
        if not self.ids:
            return compute(x, ids, gates, parameters)
        hot = Hot(self.ids, self.count, parameters, torch.device("cpu"))
        factors = {n: t[hot.ids] for n, t in parameters.items() if "_lora_" in n}
        own = parameters | hot.weights | factors | {"sum_fp32": True}
        x.grad_dtype = torch.promote_types(x.dtype, torch.float32)
        first = compute(x, hot.here(ids), gates, own)
        return (first + compute(x, hot.elsewhere(ids), gates, parameters | {"sum_fp32": True})).to(x.dtype)


@dataclass
class Problem:
    """One layer's arguments, for `moe_mlp`."""

    x: Tensor
    ids: Tensor
    gates: Tensor
    parameters: dict

    def leaves(self) -> dict[str, Tensor]:
        return {"x": self.x, "gates": self.gates} | {
            n: t for n, t in self.parameters.items() if isinstance(t, Tensor) and t.requires_grad
        }


E, H, WIDE, K = 6, 64, 64, 2


def problem(dtype: torch.dtype, kind: str, tokens: int = 33, seed: int = 0) -> Problem:
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int, as_: torch.dtype = dtype, scale: float = 0.3) -> Tensor:
        return (torch.randn(*shape, generator=gen) * scale).to(as_)

    up, down = normal(E, 2 * WIDE, H), normal(E, H, WIDE)
    if kind == "transposed":
        up, down = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (up, down))
    if kind not in ("dense", "transposed"):
        up, down = (quantize(w.float(), kind) for w in (up, down))
    factors = {
        "gate_up_lora_a": normal(E * 3, H, as_=torch.float32).view(E, 3, H),
        "gate_up_lora_b": normal(2 * WIDE, 3 * E, as_=torch.float32).view(2 * WIDE, 3, E).permute(2, 0, 1),
        "down_lora_a": normal(E * 3, WIDE, as_=torch.float32).view(E, 3, WIDE),
        "down_lora_b": normal(H, 3 * E, as_=torch.float32).view(H, 3, E).permute(2, 0, 1),
    }
    gates, ids = torch.rand(tokens, E, generator=gen).topk(K)
    ids[::7, 0] = E  # somebody else's
    x = normal(tokens, H, scale=1.0)
    for t in (x, gates, *factors.values()):
        t.requires_grad_()
    biases = {"gate_up_bias": normal(E, 2 * WIDE), "down_bias": normal(E, H)} if kind == "transposed" else {}
    rest = {"gate_up_weight": up, "down_weight": down, "gate_up_scaling": 0.5, "down_scaling": 2.0}
    return Problem(x, ids, gates, factors | biases | rest)


def compute(x, ids, gates, parameters):
    return moe_mlp(x, ids, gates, **parameters)


class Module(torch.nn.Module):
    """An experts module, as far as a placement looks at one."""

    is_transposed, has_gate = False, True

    def __init__(self, p: Problem) -> None:
        super().__init__()
        for name in ("gate_up", "down"):
            weight = p.parameters[f"{name}_weight"]
            if isinstance(weight, Tensor):
                self.register_parameter(f"{name}_proj", torch.nn.Parameter(weight, requires_grad=False))
            else:
                setattr(self, f"{name}_proj", weight)


def placed(problems: list[Problem], way: str, hot: list[int]) -> list[beside.Beside]:
    together = layer.Neighbours()
    together.way, together.rates = way, RATES
    found = [beside.Beside(Module(p), E, together) for p in problems]
    for one in found:
        one.keep(hot, LATE)
    return found


def lent(p: Problem, ids: list[int]) -> tuple[dict, dict[str, Tensor]]:
    """The arguments, with the LoRA of hot experts on the device, and all leaves of it. Nobody may read what
    the host has of theirs.
    """
    if not ids:
        return p.parameters, {n: t for n, t in p.leaves().items() if "_lora_" in n}
    hot, leaves = {}, {}
    for projection in ("gate_up", "down"):
        several = {side: p.parameters[f"{projection}_lora_{side}"].detach() for side in "ab"}
        there = {side: t[ids].to(LATE).requires_grad_() for side, t in several.items()}
        rows = torch.tensor(ids)
        here = {side: t.index_fill(0, rows, torch.nan).requires_grad_() for side, t in several.items()}
        leaves |= {f"{projection}_lora_{side}": t for side, t in here.items()}
        leaves |= {f"hot {projection}_lora_{side}": t for side, t in there.items()}
        hot[projection] = HotFactors(tuple(ids), there["a"], there["b"])
    return p.parameters | {n: t for n, t in leaves.items() if n in p.parameters} | {"hot": hot}, leaves


def run(problems: list[Problem], placements: list, device) -> list[list[Tensor]]:
    """Outputs and gradients of layers, each on its own input: forwards, then backwards."""
    outs = []
    for p, placement in zip(problems, placements, strict=True):
        x, gates = (t.detach().to(device).requires_grad_() for t in (p.x, p.gates))
        ids = placement.ids if isinstance(placement, beside.Beside) else []
        parameters, factors = lent(p, ids)
        out = placement.sum(x, p.ids.to(device), gates, parameters, compute)
        outs.append((out, {"x": x, "gates": gates} | factors, ids))
    results = []
    for out, leaves, ids in reversed(outs):
        weight = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape).to(out.dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), weight)
        found = {n: t.detach().to("cpu", leaves[n].dtype) for n, t in zip(leaves, gradients, strict=True)}
        for name in [name for name in found if name.startswith("hot ")]:
            whole = found[name.removeprefix("hot ")]
            assert not whole[ids].any()
            whole[ids] = found.pop(name)
        results.append([out.detach().cpu(), *found.values()])
    return results


def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(
        torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)
    )
