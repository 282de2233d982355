"""The operators on a GPU: against the reference, bit-identical, in CUDA graphs, compiled, on other streams.
The tests named `test_small…` are what compute-sanitizer runs.
"""

import dataclasses

import problems
import pytest
import torch
from cases import BF16, FP16, FP32, PACKED, ROWS
from cuda_cases import (
    DEVICE,
    EVERYTHING,
    NEEDS_CUDA,
    build,
    calls,
    check,
    equal,
    everything,
    moved,
    packing_of,
)
from torch import Tensor
from torch._dynamo.utils import counters

from torch_moelora import formats, functional, nn, reference

pytestmark = NEEDS_CUDA


@pytest.mark.parametrize("case", (*ROWS, *PACKED), ids=lambda case: case.reason)
def test_rows(case):
    check(case)


SAME_BITS = {
    "bf16": EVERYTHING.with_(tokens=3000, k=512, n=384, rank=16, routing="few_experts"),
    "fp16": EVERYTHING.with_(tokens=700, k=520, n=392, dtype=FP16, gates="none"),
    "fp32": EVERYTHING.with_(tokens=500, dtype=FP32, lora="same", gates="same", routing="sentinels"),
    "nf4": EVERYTHING.with_(tokens=900, k=512, n=384, packing=packing_of("nf4")),
}


@pytest.mark.parametrize("case", SAME_BITS.values(), ids=SAME_BITS)
def test_same_bits_over_20_runs(case):
    p = build(case)
    expected = everything(p)
    for run in range(20):
        assert equal(expected, everything(p)), f"run {run} differs"


def test_small_everything():
    check(EVERYTHING)
    check(EVERYTHING.with_(gates="none", y_grouped=True, weight_layout="transposed", routing="sentinels"))
    check(EVERYTHING.with_(k=70, n=91, x_grouped=True, gates="none"))
    check(EVERYTHING.with_(dtype=FP32, lora="same", gates="same"))


MALFORMED = {
    "offsets beyond S": lambda slots, offsets: (slots, offsets + 10_000),
    "negative offsets": lambda slots, offsets: (slots, offsets - 1000),
    "offsets that fall": lambda slots, offsets: (slots, offsets.flip(0)),
    "slots beyond S": lambda slots, offsets: (slots + 1_000_000_000, offsets),
    "slots beyond 32 bits": lambda slots, offsets: (slots + (1 << 40), offsets),
    "negative slots": lambda slots, offsets: (-slots - (1 << 33), offsets),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_small_malformed_indices(change):
    """Values that mean nothing, but no access that the device refuses."""
    p = build(EVERYTHING)
    p.slots, p.offsets = change(p.slots, p.offsets)
    for name, args in calls(p).items():
        getattr(torch.ops.moelora, name)(*args)
    torch.cuda.synchronize()


def test_small_gradients():
    """Through autograd, beside autograd through the reference."""
    p = build(EVERYTHING.with_(dtype=FP32, lora="same", gates="same"))
    names = ("x", "weight", "lora_a", "lora_b", "bias", "gates")

    def grads(function, dtype):
        t = {n: getattr(p, n).to(dtype).detach().requires_grad_() for n in names}
        y = function(t["x"], t["weight"], *p.routing, t["lora_a"], t["lora_b"], 0.5, t["bias"], t["gates"])
        return torch.autograd.grad(y.square().sum(), tuple(t.values()))

    got = grads(torch.ops.moelora.scatter_lora, FP32)
    want = grads(reference.scatter_lora, torch.float64)
    for name, a, b in zip(names, got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item(), msg=name)


def test_graph_capture():
    """Captured once, replayed with other rows and another routing."""
    case = EVERYTHING.with_(tokens=128, k=128, n=96)
    p, other = build(case), build(case.with_(seed=1, routing="few_experts"))
    ids, new_ids = (moved(problems.expert_ids(q.case, torch.Generator().manual_seed(5))) for q in (p, other))

    def step() -> list[Tensor]:
        p.slots, p.offsets = torch.ops.moelora.flatten_sort_count(ids, case.experts)
        results = (getattr(torch.ops.moelora, name)(*args) for name, args in calls(p).items())
        return [t for out in results for t in (out if isinstance(out, tuple) else (out,))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x, dy, routed in ((p.x.clone(), p.dy.clone(), ids.clone()), (other.x, other.dy, new_ids)):
        p.x.copy_(x)
        p.dy.copy_(dy)
        ids.copy_(routed)
        graph.replay()
        assert equal(captured, step())


@pytest.mark.parametrize("name", ["dense", "nf4"])
def test_graphed_callable(name):
    """Forward and backward of a layer as torch.cuda.make_graphed_callables captures and replays them."""
    gen = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=gen).to(BF16) / 8 for shape in ((6, 128, 64), (6, 64, 64)))
    if name != "dense":
        up, down = (formats.quantize(weight, name) for weight in (up, down))
    weights = {"gate_up_weight": up.to(DEVICE), "down_weight": down.to(DEVICE)}
    experts = nn.LoRAExperts(6, 64, 64, rank=8, dtype=BF16, device=DEVICE, **weights)
    for parameter_name, parameter in experts.named_parameters():
        if parameter_name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    trainable = [parameter for parameter in experts.parameters() if parameter.requires_grad]

    def arguments(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(seed)
        gates, ids = torch.rand(40, 6, device=DEVICE).topk(2)
        return torch.randn(40, 64, dtype=BF16, device=DEVICE, requires_grad=True), ids, gates

    def results(run, seed: int) -> list[Tensor]:
        x, ids, gates = arguments(seed)
        y = run(x, ids, gates)
        return [y.detach().clone(), *torch.autograd.grad(y.float().square().sum(), [x, *trainable])]

    expected = [results(experts, seed) for seed in (1, 2)]
    graphed = torch.cuda.make_graphed_callables(experts, arguments(0))
    for seed, want in zip((1, 2), expected, strict=True):
        assert equal(want, results(graphed, seed))


def test_nothing_synchronises():
    p = build(EVERYTHING)
    ids = moved(problems.expert_ids(p.case, torch.Generator().manual_seed(1)))
    everything(p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.moelora.flatten_sort_count(ids, p.case.experts)
        for name, args in calls(p).items():
            getattr(torch.ops.moelora, name)(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_without_recompilation():
    """fullgraph and dynamic, with Inductor; forward and backward of a whole layer."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    experts = nn.LoRAExperts(6, 64, 48, rank=8, dtype=BF16).to(DEVICE)
    for name, parameter in experts.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    compiled = torch.compile(experts, fullgraph=True, dynamic=True)
    trainable = [parameter for parameter in experts.parameters() if parameter.requires_grad]
    for tokens in (19, 64, 33):
        x = torch.randn(tokens, 64, dtype=BF16, device=DEVICE, requires_grad=True)
        gates, ids = torch.rand(tokens, 6, device=DEVICE).topk(2)
        results = []
        for run in (experts, compiled):
            y = run(x, ids, gates)
            results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *trainable])])
        for a, b in zip(*results, strict=True):
            assert ((a - b).norm() <= 1e-2 * a.norm()).item()
    assert counters["stats"]["unique_graphs"] == 1


def test_on_another_stream():
    p = build(EVERYTHING)
    expected = everything(p)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [t.clone() for t in (p.x, p.dy)]
        p.x, p.dy = late
        got = everything(p)
    stream.synchronize()
    assert equal(expected, got)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_another_device():
    """Tensors of device 1 while device 0 is current."""
    p = build(EVERYTHING)
    expected = everything(p)
    for field in dataclasses.fields(p):
        if isinstance(value := getattr(p, field.name), Tensor):
            setattr(p, field.name, value.to("cuda:1"))
    out = torch.ops.moelora.scatter_lora(*p.forward_args())
    assert out.device.index == 1 and torch.equal(out.to(DEVICE), expected[2])


def test_half_the_memory_of_a_merged_weight():
    """A forward and backward allocates less than one copy of the weights."""
    experts, size, tokens = 64, 1024, 256
    weight = torch.randn(experts, size, size, dtype=BF16, device=DEVICE) / 32
    a, b = (torch.randn(experts, *s, device=DEVICE, requires_grad=True) for s in ((16, size), (size, 16)))
    gates, ids = torch.rand(tokens, experts, device=DEVICE).topk(2)
    route = torch.ops.moelora.flatten_sort_count(ids, experts)
    x = torch.randn(tokens, size, dtype=BF16, device=DEVICE, requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = functional.scatter_lora(x, weight, *route, 2, lora_a=a, lora_b=b, gates=gates)
    y.float().square().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes // 2
