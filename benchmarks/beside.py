"""`python -m benchmarks.beside`: a layer whose experts are in host memory beside an accelerator.

Forward + backward with LoRA: everything on the accelerator, everything on the CPU, both at work (a part of
the experts hot), weights brought over. With the two halves alone, the share of the accelerator's time in
which the CPU was at work too, and peak memory. Any accelerator of torch's will do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from moelora.hot_factors import HotFactors
from moelora.placement.beside import Beside
from moelora.placement.beside.hot import Hot
from moelora.placement.beside.layer import Neighbours
from torch import Tensor, nn

from torch_moelora.formats import FORMATS, quantize
from torch_moelora.functional import moe_mlp

from .registry import SHAPES

LAYERS = 3  # of the same shape, one after the other: as many as show a layer on its way while one computes


@dataclass
class Layer:
    """One layer's arguments in host memory."""

    parameters: dict[str, Any]
    experts: int
    hidden: int
    dtype: torch.dtype  # of its inputs

    @property
    def leaves(self) -> list[Tensor]:
        return [t for n, t in self.parameters.items() if "_lora_" in n]


class Module(nn.Module):
    """The weights, where a placement looks for them."""

    is_transposed, has_gate = False, True

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        for name in ("gate_up", "down"):
            weight = layer.parameters[f"{name}_weight"]
            frozen = nn.Parameter(weight, requires_grad=False) if isinstance(weight, Tensor) else weight
            setattr(self, f"{name}_proj", frozen)


@dataclass
class Result:
    """Milliseconds are medians of a layer's forward + backward."""

    name: str
    milliseconds: float
    peak_bytes: int | None = None  # on the accelerator, everything counted; None: it does not tell
    overlap: float | None = (
        None  # of the accelerator's time, what is also the CPU's; None: nothing was traced
    )


def build(
    experts: int, hidden: int, inner: int, rank: int, kind: str, dtype: torch.dtype, seed: int
) -> Layer:
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int, as_: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=gen) / shape[-1] ** 0.5).to(as_)

    weights = {
        "gate_up_weight": normal(experts, 2 * inner, hidden),
        "down_weight": normal(experts, hidden, inner),
    }
    if kind != "dense":
        weights = {name: quantize(w, kind) for name, w in weights.items()}
    factors = {
        "gate_up_lora_a": (experts, rank, hidden), "gate_up_lora_b": (experts, 2 * inner, rank),
        "down_lora_a": (experts, rank, inner), "down_lora_b": (experts, hidden, rank),
    }  # fmt: skip
    lora = {name: normal(*shape, as_=torch.float32).requires_grad_() for name, shape in factors.items()}
    return Layer(weights | lora, experts, hidden, dtype)


def _compute(x: Tensor, ids: Tensor, gates: Tensor, parameters: dict[str, Any]) -> Tensor:
    return moe_mlp(x, ids, gates, **parameters)


def _moved(layer: Layer, device: torch.device) -> dict[str, Any]:
    return {
        n: t.detach().to(device).requires_grad_() if "_lora_" in n else t.to(device)
        for n, t in layer.parameters.items()
    }


class Bench:
    """Layers, their inputs, and what is measured of them."""

    def __init__(
        self, device: torch.device, layers: list[Layer], tokens: int, top_k: int, hot: list[int]
    ) -> None:
        self.device, self.layers, self.hot = device, layers, hot
        gen = torch.Generator().manual_seed(1)
        first = layers[0]
        self.x = torch.randn(tokens, first.hidden, generator=gen).to(first.dtype)
        self.gates, self.ids = torch.rand(tokens, first.experts, generator=gen).topk(top_k)

    def step(self, computes: list[Callable[..., Tensor]], device: torch.device | str) -> Callable[[], None]:
        """All layers forward, one on the other's output, and backward."""
        x, ids, gates = (t.to(device) for t in (self.x, self.ids, self.gates))

        def run() -> None:
            out = first = x.detach().requires_grad_()
            for compute in computes:
                out = compute(out, ids, gates)
            out.backward(torch.ones_like(out))
            if first.grad is None:
                raise RuntimeError("the backward reached no input")

        return run

    def placed(self, way: str, hot: list[int]) -> list[Callable[..., Tensor]]:
        together = Neighbours()
        together.way = way
        placements = [Beside(Module(layer), layer.experts, together) for layer in self.layers]
        for one in placements:
            one.keep(hot, self.device)
        given = [layer.parameters | ({"hot": self._lent(layer, hot)} if hot else {}) for layer in self.layers]
        return [
            lambda x, ids, gates, p=p, g=g: p.sum(x, ids, gates, g, _compute)
            for p, g in zip(placements, given, strict=True)
        ]

    def _lent(self, layer: Layer, hot: list[int]) -> dict[str, HotFactors]:
        """The hot experts' LoRA, on the accelerator."""

        def there(name: str) -> Tensor:
            return layer.parameters[name].detach()[hot].to(self.device).requires_grad_()

        return {
            name: HotFactors(tuple(hot), there(f"{name}_lora_a"), there(f"{name}_lora_b"))
            for name in ("gate_up", "down")
        }

    def there(self) -> list[Callable[..., Tensor]]:
        moved = [_moved(layer, self.device) for layer in self.layers]
        return [lambda x, ids, gates, m=m: _compute(x, ids, gates, m) for m in moved]

    def here(self) -> list[Callable[..., Tensor]]:
        return [lambda x, i, g, p=layer.parameters: _compute(x, i, g, p) for layer in self.layers]

    def halves(self) -> tuple[list[Callable[..., Tensor]], list[Callable[..., Tensor]]]:
        """The hot experts alone on the accelerator, the others alone on the CPU."""
        there, here = [], []
        for layer in self.layers:
            hot = Hot(self.hot, layer.experts, layer.parameters, self.device)
            own = _moved(layer, self.device) if self.hot else {}
            own = {n: t.detach()[self.hot].requires_grad_() for n, t in own.items() if "_lora_" in n}
            own |= hot.weights
            there.append(lambda x, i, g, hot=hot, own=own: _compute(x, hot.here(i), g, own))
            here.append(lambda x, i, g, h=hot, p=layer.parameters: _compute(x, h.elsewhere(i), g, p))
        return there, here

    def measure(self, name: str, computes: list[Callable[..., Tensor]], device: Any, repeats: int) -> Result:
        run = self.step(computes, device)
        run()  # compiles, allocates, measures rates
        torch.accelerator.synchronize(self.device)
        peak = _reset_peak(self.device)
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            torch.accelerator.synchronize(self.device)
            found.append((time.perf_counter() - start) * 1e3 / len(self.layers))
        peak = torch.accelerator.max_memory_allocated(self.device) if peak else None
        return Result(name, statistics.median(found), peak)

    def events(self, computes: list[Callable[..., Tensor]], trace: Path | None) -> list[Any]:
        """What torch's profiler sees of a step, in all threads: the host's share has one of its own."""
        run = self.step(computes, self.device)
        everybody = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        with torch.profiler.profile(experimental_config=everybody) as profiler:
            run()
            torch.accelerator.synchronize(self.device)
        if trace is not None:
            profiler.export_chrome_trace(str(trace))
        return profiler.events()

    def overlap(self, computes: list[Callable[..., Tensor]], trace: Path | None) -> float | None:
        """Of the time in which the accelerator computes, the part in which the CPU computes its share too."""
        events = self.events(computes, trace)
        host = [e.time_range for e in events if e.name.startswith("moelora share on cpu")]
        kernels = [
            e.time_range
            for e in events
            if e.device_type != torch.autograd.DeviceType.CPU and not e.name.startswith(("moelora", "Mem"))
        ]
        total = sum(k.elapsed_us() for k in kernels)
        both = sum(max(0, min(k.end, h.end) - max(k.start, h.start)) for k in kernels for h in host)
        return both / total if total else None


def _reset_peak(device: torch.device) -> bool:
    try:
        torch.accelerator.reset_peak_memory_stats(device)
    except (RuntimeError, NotImplementedError):  # its allocator keeps no such statistics
        return False
    return True


def run(bench: Bench, repeats: int, trace: Path | None) -> dict[str, Any]:
    """All of it, as plain data."""
    first, second = bench.halves()
    results = [
        bench.measure("the hot experts alone", first, bench.device, repeats),
        bench.measure("the other experts alone", second, "cpu", repeats),
    ]
    del first, second
    results.append(bench.measure("everything there", bench.there(), bench.device, repeats))
    results.append(bench.measure("everything on the CPU", bench.here(), "cpu", repeats))
    both = bench.placed("compute", bench.hot)
    results.append(bench.measure("both at work", both, bench.device, repeats))
    results[-1].overlap = bench.overlap(both, trace)
    results.append(bench.measure("brought over", bench.placed("bring", []), bench.device, repeats))
    slower = max(result.milliseconds for result in results[:2])
    return {
        "device": str(bench.device),
        "tokens": bench.x.shape[0],
        "hot": len(bench.hot),
        "against_the_slower_half": results[4].milliseconds / slower,
        "results": [asdict(result) for result in results],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beside", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--hot", type=int, default=32, help="experts of a layer on the accelerator")
    parser.add_argument("--format", choices=FORMATS, default="dense")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a folder for beside.json and the trace")
    options = parser.parse_args(argv)
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        parser.error("torch sees no accelerator here")
    shape = SHAPES[options.shape]
    sizes = shape.experts, shape.hidden, shape.inner, options.rank, options.format, torch.bfloat16
    layers = [build(*sizes, seed) for seed in range(LAYERS)]
    bench = Bench(device, layers, options.tokens, shape.top_k, list(range(options.hot)))
    trace = None
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        trace = options.output / "beside-trace.json"
    found = run(bench, options.repeats, trace) | {"shape": options.shape, "format": options.format}
    text = json.dumps(found, indent=1)
    print(text)
    if options.output is not None:
        (options.output / "beside.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
