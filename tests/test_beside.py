"""Experts in host memory beside an accelerator, on a device whose streams are late on purpose: values to the
bit, and that each wait is needed.
"""

import threading
from dataclasses import dataclass
from pathlib import Path

import late_device
import model_tiny
import moelora
import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from model_tiny import one_thread  # noqa: F401
from moelora import experts
from moelora.errors import MoeloraError
from moelora.placement import beside
from moelora.placement.beside import buffers, layer, link, rates, resident, settling, ways
from moelora.placement.beside.hot import Hot
from torch import Tensor

from benchmarks import beside as bench
from torch_moelora.formats import quantize
from torch_moelora.functional import moe_mlp

LATE = late_device.start()
RATES = rates.Rates(1e9, 1e9, 1e9, 1e12)
BF16 = torch.bfloat16
STREAMS = {"all late": 0, "copies ahead": 1, "all ahead": 2}


class Here:
    """A placement like the one beside an accelerator, with every place on the CPU."""

    def __init__(self, ids: list[int], count: int) -> None:
        self.ids, self.count = ids, count

    def sum(self, x, ids, gates, parameters, compute):
        if not self.ids:
            return compute(x, ids, gates, parameters)
        hot = Hot(self.ids, self.count, parameters, torch.device("cpu"))
        factors = {n: t[hot.rows] for n, t in parameters.items() if "_lora_" in n}
        own = parameters | hot.weights | factors | {"sum_fp32": True}
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


def run(problems: list[Problem], placements: list, device) -> list[list[Tensor]]:
    """Outputs and gradients of layers, each on its own input: forwards, then backwards."""
    outs = []
    for p, placement in zip(problems, placements, strict=True):
        x, gates = (t.detach().to(device).requires_grad_() for t in (p.x, p.gates))
        out = placement.sum(x, p.ids.to(device), gates, p.parameters, compute)
        outs.append((out, x, gates))
    results = []
    for p, (out, x, gates) in reversed(list(zip(problems, outs, strict=True))):
        wanted = p.leaves() | {"x": x, "gates": gates}
        weight = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape).to(out.dtype)
        found = torch.autograd.grad(out, list(wanted.values()), weight)
        results.append([t.detach().cpu() for t in (out, *found)])
    return results


def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(
        torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)
    )


WAYS = {"compute": ("compute", []), "hot": ("compute", [1, 4]), "bring": ("bring", []), "rule": ("auto", [0])}


@pytest.mark.parametrize("streams", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, "dense"), (BF16, "dense"), (BF16, "transposed"), (BF16, "nf4"), (BF16, "int8")],
)
def test_to_the_bit(dtype, kind, way, streams):
    """Four layers; the backward meets them the other way round."""
    problems = [problem(dtype, kind, tokens, seed) for seed, tokens in enumerate((33, 8, 1, 40))]
    way, hot = WAYS[way]
    expected = run(problems, [Here(hot if way == "compute" else [], E)] * 4, "cpu")
    with late_device.eager(streams):
        placements = placed(problems, way, hot)
        assert same(run(problems, placements, LATE), expected)
        assert same(run(problems, placements, LATE), expected)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_within_one_rounding_of_a_single_place(dtype):
    problems = [problem(dtype, "dense")]
    single = run(problems, [Here([], E)], "cpu")[0]
    several = run(problems, placed(problems, "compute", [1, 4]), LATE)[0]
    rounding = torch.finfo(dtype).eps
    for found, expected in zip(several, single, strict=True):
        close = torch.finfo(found.dtype).eps if found.dtype != dtype else rounding
        scale = expected.abs().max()
        assert (found - expected).abs().max() <= 2 * close * scale
    changed = several[0] != single[0]
    allowed = rounding * single[0].abs() + 64 * torch.finfo(torch.float32).eps * single[0].abs().max()
    assert not changed.any() or ((several[0] - single[0]).abs() <= allowed).all()


def _no_wait(*_):
    return None


def _behind_nothing(real):
    """Buffers that are said to be free at once."""
    return lambda self, buffer, event: real(self, buffer, torch.Event(LATE))


def _only_other(stream: str, real):
    """`after` for all streams but one."""

    def after(here, event):
        own = link.link_of(LATE).inward
        if (here == own) != (stream == "inward"):
            real(here, event)

    return after


REMOVED = {
    "rows leave behind what makes them": ("compute", lambda m: m.setattr(link, "after", _no_wait)),
    "the host waits for rows": ("compute", lambda m: m.setattr(link, "wait", _no_wait)),
    "a buffer in use is nobody else's": (
        "compute",
        lambda m: m.setattr(buffers.Buffers, "give", _behind_nothing(buffers.Buffers.give)),
    ),
    "the host waits for a full buffer": ("limit", lambda m: m.setattr(buffers, "wait", _no_wait)),
    "weights are waited for": (
        "bring",
        lambda m: m.setattr(resident, "after", _only_other("compute", resident.after)),
    ),
    "weights in use are not overwritten": (
        "bring",
        lambda m: m.setattr(resident, "after", _only_other("inward", resident.after)),
    ),
}


@pytest.fixture
def own_link(monkeypatch):
    """A link of the test's own, so that what it breaks is not met again."""
    monkeypatch.setattr(link, "_LINKS", {})
    yield
    torch.accelerator.synchronize()


def _values(way: str, streams: int) -> bool:
    problems = [problem(BF16, "dense", 40, seed) for seed in range(5)]
    hot = [1, 4] if way != "bring" else []
    expected = run(problems, [Here(hot, E)] * 5, "cpu")
    if way == "limit":
        link.link_of(LATE).buffers.limit = 0
        way = "compute"
    with late_device.eager(streams):
        placements = placed(problems, way, hot)
        return all(same(run(problems, placements, LATE), expected) for _ in range(2))


@pytest.mark.parametrize("removed", REMOVED)
def test_every_wait_is_needed(removed, monkeypatch, own_link):
    """With all of them values are right on late streams, and on streams that run ahead; without one not."""
    way, remove = REMOVED[removed]
    assert all(_values(way, streams) for streams in (0, 1))
    link._LINKS.clear()
    with monkeypatch.context() as changed:
        remove(changed)
        assert not all(_values(way, streams) for streams in (0, 1))


def test_nobody_waits_for_the_device(own_link):
    problems = [problem(BF16, "nf4", seed=seed) for seed in range(3)]
    for way, hot in (("compute", [1]), ("bring", [])):
        placements = placed(problems, way, hot)
        outs = []
        before = late_device.counts()
        for p, placement in zip(problems, placements, strict=True):
            x = p.x.detach().to(LATE).requires_grad_()
            outs.append(placement.sum(x, p.ids.to(LATE), p.gates.detach().to(LATE), p.parameters, compute))
        for out in outs:
            out.backward(torch.ones_like(out))
        after = late_device.counts()
        assert after.device_synchronisations == before.device_synchronisations
        assert after.stream_synchronisations == before.stream_synchronisations
        # Rows of three layers out and their gradients; where weights come over, LoRA's gradients alone.
        assert after.event_synchronisations - before.event_synchronisations == (9 if way == "compute" else 3)


def test_the_accelerator_is_given_its_share_first(monkeypatch):
    """Forward and backward; and the host does not wait for it."""
    p = problem(BF16, "dense")
    (placement,) = placed([p], "compute", [1, 4])
    seen = []
    made, gradients = ways.Share.__init__, ways.Share.gradients

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        seen.append(("forward", self.out.device.type))

    def differentiate(self, dy, retain):
        seen.append(("backward", self.out.device.type))
        return gradients(self, dy, retain)

    monkeypatch.setattr(ways.Share, "__init__", make)
    monkeypatch.setattr(ways.Share, "gradients", differentiate)
    x = p.x.detach().to(LATE).requires_grad_()
    out = placement.sum(x, p.ids.to(LATE), p.gates.detach().to(LATE), p.parameters, compute)
    behind = torch.Event(LATE)
    behind.record()
    assert not behind.query()  # all of it is still to be done, the host's share excepted
    out.backward(torch.ones_like(out))
    assert seen == [("forward", "late"), ("forward", "cpu"), ("backward", "late"), ("backward", "cpu")]


def test_buffers_are_reused_and_bounded():
    pool = buffers.Buffers(limit=1 << 16)
    done, pending = torch.Event(LATE), torch.Event(LATE)
    first = pool.take(5000)
    assert first.numel() == 8192 and first.is_pinned()
    pool.give(first, done)
    assert pool.take(8192) is first  # its event has nothing to wait for
    torch.ones(3, device=LATE)
    pending.record()
    pool.give(first, pending)
    second = pool.take(8192)
    assert second is not first and pool.allocated == 2 * 8192
    rest = [pool.take(8192) for _ in range(6)]
    assert pool.allocated == 1 << 16
    assert pool.take(8000) is first and pending.query()  # waited for rather than exceed the limit
    for buffer in (first, second, *rest):
        pool.give(buffer, done)
    pool.take(1 << 16)
    assert pool.allocated == 1 << 16  # others went
    assert pool.take(0).numel() == buffers.LEAST


def test_page_locked_memory_does_not_grow(own_link):
    problems = [problem(BF16, "dense", seed=seed) for seed in range(3)]
    placements = placed(problems, "compute", [2])
    run(problems, placements, LATE)
    torch.accelerator.synchronize()
    before = link.link_of(LATE).buffers.allocated
    for _ in range(5):
        run(problems, placements, LATE)
        torch.accelerator.synchronize()
    assert link.link_of(LATE).buffers.allocated <= 2 * before


def test_an_error_on_the_host_is_raised_by_its_forward(own_link):
    problems = [problem(BF16, "dense", seed=seed) for seed in range(2)]
    expected = run(problems, [Here([1], E)] * 2, "cpu")

    def broken(x, ids, gates, parameters):
        if x.device.type == "cpu":
            raise ZeroDivisionError("in the host's share")
        return compute(x, ids, gates, parameters)

    placements = placed(problems, "compute", [1])
    p = problems[0]
    with pytest.raises(ZeroDivisionError, match="the host's share"):
        placements[0].sum(p.x.detach().to(LATE), p.ids.to(LATE), p.gates.to(LATE), p.parameters, broken)
    assert same(run(problems, placements, LATE), expected)


def test_an_error_on_the_way_is_raised_by_its_forward(monkeypatch, own_link):
    problems = [problem(BF16, "dense", seed=seed) for seed in range(3)]
    expected = run(problems, [Here([], E)] * 3, "cpu")
    placements = placed(problems, "bring", [])
    copy, failing = resident.Resident._copy, [True]

    def sometimes(self, to, source):
        if failing:
            raise OSError("the file is gone")
        copy(self, to, source)

    monkeypatch.setattr(resident.Resident, "_copy", sometimes)
    with pytest.raises(OSError, match="the file is gone"):
        run(problems, placements, LATE)
    failing.clear()
    assert same(run(problems, placements, LATE), expected)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_what_is_brought(kind, own_link, monkeypatch):
    """As it is stored, a layer ahead, in the direction of the pass; what is still there is not sent again."""
    problems = [problem(BF16, kind, seed=seed) for seed in range(4)]
    placements = placed(problems, "bring", [])
    order, fill = [], resident.Resident._fill

    def filling(self, slot, index):
        order.append(index)
        fill(self, slot, index)

    monkeypatch.setattr(resident.Resident, "_fill", filling)
    run(problems, placements, LATE)
    torch.accelerator.synchronize()
    buffer = placements[0].together.resident(link.link_of(LATE))
    assert order == [0, 1, 2, 3, 1, 0]
    stored = sum(w.nbytes for w in placements[0].stored().values())
    aligned = sum(load.nbytes for load in buffer.loads) // 4
    assert stored <= aligned <= stored + 8 * resident.ALIGNMENT
    assert buffer.bytes_brought == len(order) * aligned
    assert sum(slot.buffer.numel() for slot in buffer._slots) == 2 * aligned


def test_threads(own_link):
    """Each with a stream of its own, all with the same two buffers."""
    problems = [problem(BF16, "dense", seed=seed) for seed in range(3)]
    for way, hot in (("compute", [1]), ("bring", [])):
        expected = run(problems, [Here(hot, E)] * 3, "cpu")
        placements, results = placed(problems, way, hot), [None] * 4

        def work(i, placements=placements, results=results):
            with torch.Stream(LATE):
                results[i] = run(problems, placements, LATE)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(found is not None and same(found, expected) for found in results)


SIZE = rates.Size(experts=128, weights=3 * 2048 * 768, nbytes=128 * 3 * 2048 * 768 // 2, hidden=2048)
MACHINE = rates.Rates(link=24e9, host_bytes=40e9, host_flops=4e11, device_flops=3e14)


def test_the_rule():
    """A token at a time where the weights are, thousands where the arithmetic is; one turning point."""
    assert rates.better(1, 8, SIZE, MACHINE) == "compute"
    assert rates.better(4096, 8, SIZE, MACHINE) == "bring"
    point = rates.turning_point(8, SIZE, MACHINE)
    assert rates.better(point - 1, 8, SIZE, MACHINE) == "compute"
    assert rates.better(point, 8, SIZE, MACHINE) == "bring"
    assert 10 < point < 1000
    assert rates.bring_seconds(4096, 8, SIZE, MACHINE) == pytest.approx(SIZE.nbytes / 24e9)
    assert rates.turning_point(8, SIZE, MACHINE._replace(device_flops=1e11)) is None


def test_rates_are_measured():
    p = problem(BF16, "nf4")
    found = rates.measure(link.link_of(LATE), compute, p.parameters, BF16)
    assert all(rate > 0 for rate in found)
    assert "GB/s" in str(found)
    assert rates.Size.of(p.parameters) == (E, 3 * H * WIDE, sum(
        p.parameters[n].nbytes for n in ("gate_up_weight", "down_weight")
    ), H)  # fmt: skip


# Whole models.


def put(model: torch.nn.Module) -> torch.nn.Module:
    """Experts and their LoRA in host memory, all else on the device."""
    model.to(LATE)
    for module in model.modules():
        if experts.is_experts(module):
            module.to("cpu")
        if type(module).__name__ == "ParamWrapper":
            module.lora_A.to("cpu")
            module.lora_B.to("cpu")
    return model


def step(model: torch.nn.Module, times: int = 1) -> list[Tensor]:
    """The loss and all gradients, of `times` forwards before their backwards."""
    model.zero_grad()
    tokens = [model_tiny.tokens(length=12 + i).to(LATE) for i in range(times)]
    losses = [model(input_ids=t, labels=t).loss for t in tokens]
    sum(losses).backward()
    return [t.detach().cpu() for t in (*losses, *(p.grad for p in model.parameters() if p.requires_grad))]


@pytest.fixture
def served_there(monkeypatch):
    """Lets weights be on the late device itself."""
    monkeypatch.setattr(experts, "DEVICES", (*experts.DEVICES, late_device.NAME))


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "mixtral_tanh"])
def kind(request):
    return request.param


def test_models(kind, served_there):
    """Beside to the bit what all on the accelerator gives; checkpointed and several forwards at once, too."""
    there = model_tiny.adapt(model_tiny.build(kind, BF16)).to(LATE)
    moelora.enable(there)
    expected, three = step(there), step(there, 3)
    model = put(model_tiny.adapt(model_tiny.build(kind, BF16)))
    told = str(moelora.enable(model))
    assert "on cpu beside late:0" in told and "not measured yet" in told
    for way in ("compute", "bring"):
        moelora.place(model, way=way)
        assert same([step(model)], [expected])
        assert same([step(model, 3)], [three])
        for reentrant in (True, False):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            model.train()
            assert same([step(model)], [expected])
            model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    moelora.place(model, way="auto")
    assert same([step(model)], [expected])
    assert "GF/s" in str(moelora.report(model))
    places = {p.device.type for n, p in model.named_parameters() if p.requires_grad}
    assert places == {"cpu"}


def test_optimiser_state_stays():
    model = put(model_tiny.adapt(model_tiny.build("qwen3_moe", BF16)))
    moelora.enable(model)
    moelora.place(model, hot=2, way="compute")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = step(model)[0]
    optimizer.step()
    assert {t.device.type for s in optimizer.state.values() for t in s.values()} == {"cpu"}
    assert step(model)[0] < before


def test_backward_twice():
    p = problem(BF16, "dense")
    (placement,) = placed([p], "compute", [1])
    x = p.x.detach().to(LATE).requires_grad_()
    out = placement.sum(x, p.ids.to(LATE), p.gates.detach().to(LATE), p.parameters, compute)
    one, two = (
        torch.autograd.grad(out.float().sum(), x, retain_graph=keep)[0].cpu() for keep in (True, False)
    )
    assert torch.equal(one, two)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(out.float().sum(), x)


def test_hot_experts_are_the_most_used():
    model = put(model_tiny.adapt(model_tiny.build("qwen3_moe", BF16)))
    moelora.enable(model)
    batches = [{"input_ids": model_tiny.tokens().to(LATE)}]
    chosen = []
    for block in model.base_model.model.model.layers:
        block.mlp.gate.register_forward_hook(lambda m, a, out: chosen.append(out[-1].cpu()))
    report = moelora.place(model, hot=2, batches=batches)
    assert "2 of them there" in str(report)
    for module, ids in zip((m for m in model.modules() if experts.is_experts(m)), chosen[:2], strict=True):
        counts = torch.bincount(ids.flatten(), minlength=5)
        hot = settling.beside(module).ids
        assert counts[hot].min() >= counts[[e for e in range(5) if e not in hot]].max()
    names = {name: [3] for name in ("model.layers.0.mlp.experts",)}
    moelora.place(model, hot=names)
    found = [settling.beside(m).ids for m in model.modules() if experts.is_experts(m)]
    assert found == [[3], []]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"hot": 6}, "expected 0 to 5 experts"),
        ({"hot": {"model.layers.9": [0]}}, "expected names of expert layers"),
        ({"hot": {"model.layers.0.mlp.experts": [5]}}, "expected experts 0 to 4"),
        ({"way": "fly"}, "way: expected one of auto, compute, bring, got 'fly'"),
    ],
)
def test_bad_arguments(arguments, told):
    model = put(model_tiny.build("qwen3_moe", layers=1))
    moelora.enable(model)
    with pytest.raises(MoeloraError, match=told):
        moelora.place(model, **arguments)


def test_without_an_accelerator_in_the_model():
    model = model_tiny.build("qwen3_moe", layers=1)
    report = moelora.enable(model)
    assert report.layers[0].places == ()
    with pytest.raises(MoeloraError, match="no layer's are"):
        moelora.place(model, hot=1)


def test_weights_that_change_are_copied_anew():
    model = put(model_tiny.adapt(model_tiny.build("qwen3_moe", torch.float32)))
    moelora.enable(model)
    tokens = model_tiny.tokens().to(LATE)
    for arguments in ({"hot": 3, "way": "compute"}, {"hot": 0, "way": "bring"}):
        moelora.place(model, **arguments)
        with torch.no_grad():
            adapted = model(input_ids=tokens).logits.cpu()
            model.merge_adapter()
            merged = model(input_ids=tokens).logits.cpu()
            model.unmerge_adapter()
        assert model_tiny.difference(merged, adapted) < 1e-5


def test_trained_weights_stay(own_link):
    """Their gradients are the true ones, and no copy of them is used."""
    p = problem(torch.float32, "dense")
    for name in ("gate_up_weight", "down_weight"):
        p.parameters[name].requires_grad_()
    (placement,) = placed([p], "bring", [1])
    assert same(run([p], [placement], LATE), run([p], [Here([], E)], "cpu"))
    assert "its weights are trained" in str(placement)


def test_accelerate_offloads(served_there):
    """Its hooks, which would bring dense weights in every call, are away while enabled, and back then."""
    model = model_tiny.build("qwen3_moe", BF16)
    there = model_tiny.build("qwen3_moe", BF16).to(LATE)
    tokens = model_tiny.tokens().to(LATE)
    moelora.enable(there)
    names = [n for n, m in model.named_modules() if experts.is_experts(m)]
    state = {k: v for k, v in model.state_dict().items() if ".experts." in k}
    attach_align_device_hook_on_blocks(
        model,
        execution_device={"": LATE} | dict.fromkeys(names, LATE),
        offload={"": False} | dict.fromkeys(names, True),
        weights_map=state,
    )
    module = model.get_submodule(names[0])
    assert module.down_proj.device.type == "meta"
    report = moelora.enable(model)
    assert module.down_proj.device.type == "cpu" and all(layer.places for layer in report.layers)
    moelora.place(model, way="compute")
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits.cpu(), there(input_ids=tokens).logits.cpu())
    moelora.disable(model)
    assert module.down_proj.device.type == "meta" and hasattr(module, "_hf_hook")


def test_benchmark():
    """All that `make gpu` measures runs here too."""
    kinds = {}
    for kind in ("dense", "nf4"):
        layers = [bench.build(8, 64, 64, 4, kind, BF16, seed) for seed in range(bench.LAYERS)]
        found = bench.run(bench.Bench(LATE, layers, 20, 2, [0, 1]), 2, None)
        kinds[kind] = {result["name"]: result for result in found["results"]}
        assert found["against_the_slower_half"] > 0
    for results in kinds.values():
        assert all(result["milliseconds"] > 0 for result in results.values())
        assert {"both at work", "brought over", "everything there", "everything on the CPU"} <= set(results)


def test_no_device_is_named():
    for path in Path(beside.__file__).parent.rglob("*.py"):
        assert "cuda" not in path.read_text().lower(), path.name
