"""The operators on a GPU: against the reference at real layer shapes, bit-identical, beyond 2³¹ elements, in
CUDA graphs, compiled, on other streams. The tests named `test_small…` are what compute-sanitizer runs.
"""

import dataclasses

import problems
import pytest
import torch
from cases import BF16, FP16, FP32, PACKED, ROWS, Case
from packings import NAMES, Packing
from torch import Tensor
from torch._dynamo.utils import counters

from torch_moelora import formats, functional, nn, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

DEVICE = "cuda"
EVERYTHING = Case(
    tokens=40, top_k=4, experts=6, k=72, n=88, rank=8, dtype=BF16, lora="fp32", bias="same", gates="fp32"
)
# Thousands of products, added up one after the other.
LONG_FP32_TOLERANCE = 4e-6
# TF32 keeps ten bits of each factor.
TF32_TOLERANCE = 2e-3


def moved(t: Tensor) -> Tensor:
    """On the GPU with the same strides: the whole storage travels."""
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return whole.to(DEVICE).as_strided(t.shape, t.stride(), t.storage_offset())


def moved_packed(w: formats.PackedWeight) -> formats.PackedWeight:
    return w._replace(**{k: moved(v) for k, v in w._asdict().items() if isinstance(v, Tensor)})


def build(case: Case) -> problems.Problem:
    p = problems.build(case)
    tensors = {f.name: getattr(p, f.name) for f in dataclasses.fields(p)}
    found = {k: moved(v) for k, v in tensors.items() if isinstance(v, Tensor)}
    packed = p.packed and moved_packed(p.packed)
    return dataclasses.replace(
        p, **found | ({} if packed is None else {"packed": packed, "weight": packed.codes})
    )


def calls(p: problems.Problem) -> dict[str, tuple]:
    """Operator → arguments; without LoRA there is no dA and dB."""
    args = {
        "scatter_lora": p.forward_args(),
        "scatter_lora_dx": p.dx_args(),
        "scatter_lora_dw": p.dw_args(),
        "scatter_lora_dbias": p.dbias_args(),
    }
    return (
        args
        if p.lora_a is None
        else args
        | {
            "scatter_lora_dab": p.dab_args(),
            "scatter_lora_backward": (*p.backward_args(), True, *p.packed_args),
        }
    )


def check(case: Case, *names: str) -> None:
    """These operators, or all."""
    p = build(case)
    lora = FP32 if case.lora == "fp32" else case.dtype
    dtypes = {
        "scatter_lora_dx": (case.dtype, FP32),
        "scatter_lora_dab": (lora, lora),
        "scatter_lora_backward": (case.dtype, FP32, lora, lora),
    }
    for name, args in calls(p).items():
        if not names or name in names:
            depends = case if name not in ("scatter_lora_dw", "scatter_lora_dbias") else case.with_(rank=0)
            problems.check(name, args, depends, dtypes.get(name, (case.dtype,)))


def everything(p: problems.Problem) -> list[Tensor]:
    ids = moved(problems.expert_ids(p.case, torch.Generator().manual_seed(1)))
    results = [*torch.ops.moelora.flatten_sort_count(ids, p.case.experts)]
    for name, args in calls(p).items():
        out = getattr(torch.ops.moelora, name)(*args)
        results += out if isinstance(out, tuple) else (out,)
    y = torch.ops.moelora.glu(p.dy)
    return [*results, y, torch.ops.moelora.glu_backward(y, p.dy)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", (*ROWS, *PACKED), ids=lambda case: case.reason)
def test_rows(case):
    check(case)


LAYERS = {
    "gate_up of Qwen3-30B-A3B": Case(k=2048, n=1536, top_k=8, lora="fp32", y_grouped=True),
    "down of Qwen3-30B-A3B": Case(k=768, n=2048, top_k=8, lora="fp32", gates="fp32", x_grouped=True),
    "gate_up of gpt_oss": Case(
        k=2880, n=5760, top_k=4, lora="fp32", bias="same", weight_layout="transposed", lora_layout="peft"
    ),
}


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("rows", [4, 64, 256, 1024])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers(layer, rows, rank):
    """bf16, at so many rows an expert that each row of the table for these shapes is met."""
    check(layer.with_(dtype=BF16, experts=16, tokens=rows * 16 // layer.top_k, rank=rank))


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers_in_other_dtypes(layer, dtype, monkeypatch):
    monkeypatch.setitem(problems.TOLERANCE, FP32, LONG_FP32_TOLERANCE)
    check(layer.with_(dtype=dtype, lora="same", experts=8, tokens=256 * 8 // layer.top_k, rank=16))


def packing_of(name: str, transposed: bool = False) -> Packing:
    """As checkpoints have it."""
    row = formats.FORMATS[name]
    group = row.groups.default
    return Packing(name, group, row.scale_dtypes[0], rows="block", zero=bool(row.zero), transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True], ids=["as_it_is", "turned"])
@pytest.mark.parametrize("rows", [4, 256])
@pytest.mark.parametrize("name", NAMES)
def test_packed_layers(name, rows, transposed):
    packing = packing_of(name, transposed)
    check(
        LAYERS["gate_up of Qwen3-30B-A3B"].with_(
            dtype=BF16, experts=16, tokens=rows * 2, rank=16, packing=packing
        ),
        "scatter_lora",
        "scatter_lora_dx",
        "scatter_lora_backward",
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_quantised_here_as_on_the_cpu(name, nested):
    """Codes and scales are the same bits, and so is what they stand for; the mean of nested scales is summed
    in another order.
    """
    if nested and not formats.FORMATS[name].nested:
        return
    weight = torch.randn(3, 256, 384, generator=torch.Generator().manual_seed(0)).to(BF16)
    here, there = (formats.quantize(w, name, nested=nested) for w in (weight, weight.to(DEVICE)))
    if nested:
        torch.testing.assert_close(there.scale2.cpu(), here.scale2, rtol=1e-6, atol=1e-6)
        there = there._replace(scale2=here.scale2.to(DEVICE))
    for a, b in zip(here[:4], there[:4], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a.view(torch.uint8), b.cpu().view(torch.uint8))
    assert torch.equal(here.dequantize(BF16), there.dequantize(BF16).cpu())


def test_tf32_where_torch_allows_it(monkeypatch):
    """More than fp32's error, less than TF32's bound: the switch is obeyed, both ways."""
    case = LAYERS["gate_up of Qwen3-30B-A3B"].with_(dtype=FP32, lora="same", experts=8, tokens=256, rank=16)
    p = build(case)
    ref = reference.scatter_lora(*p.forward_args())
    errors = {}
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        out = torch.ops.moelora.scatter_lora(*p.forward_args())
        errors[allowed] = ((out - ref).norm() / ref.norm()).item()
    assert errors[False] < LONG_FP32_TOLERANCE < errors[True] < TF32_TOLERANCE


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


@pytest.mark.parametrize("transposed", [False, True], ids=["as_it_is", "turned"])
@pytest.mark.parametrize("name", NAMES)
def test_small_packed(name, transposed):
    check(EVERYTHING.with_(k=384, n=256, packing=packing_of(name, transposed)))


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


def room_for(gigabytes: float) -> bool:
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > gigabytes * 1e9


def routed_to(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return torch.ops.moelora.flatten_sort_count(ids.to(DEVICE).view(-1, 1), experts)


def assert_near(got: Tensor, want: Tensor) -> None:
    assert ((got.double() - want).norm() <= 4e-3 * want.norm()).item()


@pytest.mark.skipif(not room_for(30), reason="needs 30 GB of free device memory")
def test_rows_beyond_32_bits():
    """S·K and S·N past 2³¹: of x, y, dy and dx the last rows are compared."""
    size, width, tail = 4096, 32, 200
    rows = 2**31 // size + tail
    gen = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(2, width, size, dtype=BF16, device=DEVICE, generator=gen) / 64
    route = routed_to((torch.arange(rows) >= rows - tail).long(), 2)
    x = torch.randn(rows, size, dtype=BF16, device=DEVICE, generator=gen)
    y = torch.ops.moelora.scatter_lora(x, weight, *route, 1)
    assert_near(y[-tail:], x[-tail:].double() @ weight[1].double().T)
    dw = torch.ops.moelora.scatter_lora_dw(y, x, *route, 1)
    assert_near(dw[1], y[-tail:].double().T @ x[-tail:].double())
    del x, dw
    dx, _ = torch.ops.moelora.scatter_lora_dx(y, weight, *route, 1)
    assert_near(dx[-tail:], y[-tail:].double() @ weight[1].double())
    wide = torch.ops.moelora.scatter_lora(y, weight.transpose(1, 2).contiguous(), *route, 1)
    assert_near(wide[-tail:], y[-tail:].double() @ weight[1].double())


@pytest.mark.skipif(not room_for(30), reason="needs 30 GB of free device memory")
def test_weights_beyond_32_bits():
    """E·N·K past 2³¹: the last expert's product, dX and dW."""
    experts, size, rows = 33, 8192, 100
    weight = torch.zeros(experts, size, size, dtype=BF16, device=DEVICE)
    weight[-1].normal_(std=1 / 64)
    route = routed_to(torch.full((rows,), experts - 1), experts)
    x = torch.randn(rows, size, dtype=BF16, device=DEVICE)
    last = weight[-1].double()
    assert_near(torch.ops.moelora.scatter_lora(x, weight, *route, 1), x.double() @ last.T)
    dx, _ = torch.ops.moelora.scatter_lora_dx(x, weight, *route, 1)
    assert_near(dx, x.double() @ last)
    del weight
    dw = torch.ops.moelora.scatter_lora_dw(x, x, *route, 1)
    assert_near(dw[-1], x.double().T @ x.double())
    assert torch.count_nonzero(dw[:-1]) == 0


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
