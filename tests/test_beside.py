"""Experts in host memory beside an accelerator, on a device whose streams are late on purpose: values to the
bit, and that each wait is needed.
"""

import threading
from pathlib import Path

import late_device
import pytest
import torch
from beside_layers import BF16, LATE, STREAMS, WIDE, E, H, Here, compute, lent, placed, problem, run, same
from moelora.placement import beside
from moelora.placement.beside import buffers, link, order, rates, resident

from benchmarks import beside as bench


@pytest.fixture
def own_link(monkeypatch):
    """A link of the test's own, so that what it breaks is not met again."""
    monkeypatch.setattr(link, "_LINKS", {})
    yield
    torch.accelerator.synchronize()


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
    for found, expected in zip(several[:2], single[:2], strict=True):  # the sum, and x's gradient
        assert found.dtype == expected.dtype == dtype
        slack = 64 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert ((found - expected).abs() <= rounding * expected.abs() + slack).all()


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
        "bring",  # which sends factors of a size one after the other
        lambda m: m.setattr(buffers.Buffers, "give", _behind_nothing(buffers.Buffers.give)),
    ),
    "the host waits for a full buffer": ("sends", lambda m: m.setattr(buffers, "wait", _no_wait)),
    "weights are waited for": (
        "bring",
        lambda m: m.setattr(resident, "after", _only_other("compute", resident.after)),
    ),
    "weights in use are not overwritten": (
        "bring",
        lambda m: m.setattr(resident, "after", _only_other("inward", resident.after)),
    ),
}


def _sends_arrive(streams: int) -> bool:
    """One after the other, through a single buffer: the limit allows no second one."""
    own = link.link_of(LATE)
    own.buffers.limit = 0
    sources = [torch.full((1000,), float(number)) for number in range(3)]
    with late_device.eager(streams):
        sent = [own.send(source) for source in sources]
        return all(torch.equal(t.cpu(), source) for t, source in zip(sent, sources, strict=True))


def _values(way: str, streams: int) -> bool:
    if way == "sends":  # not by way of layers, where the worker may be late enough to be right by chance
        return _sends_arrive(streams)
    problems = [problem(BF16, "dense", 40, seed) for seed in range(5)]
    hot = [1, 4] if way != "bring" else []
    expected = run(problems, [Here(hot, E)] * 5, "cpu")
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
            parameters, _ = lent(p, hot)
            outs.append(placement.sum(x, p.ids.to(LATE), p.gates.detach().to(LATE), parameters, compute))
        for out in outs:
            out.backward(torch.ones_like(out))
        after = late_device.counts()
        assert after.device_synchronisations == before.device_synchronisations
        assert after.stream_synchronisations == before.stream_synchronisations
        # Rows of three layers out, the sums' gradients; where weights come over, LoRA's gradients alone.
        assert after.event_synchronisations - before.event_synchronisations == (6 if way == "compute" else 3)


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
        placements[0].sum(p.x.detach().to(LATE), p.ids.to(LATE), p.gates.to(LATE), lent(p, [1])[0], broken)
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


def test_hot_experts_are_copied_on_another_stream(own_link):
    problems = [problem(BF16, kind) for kind in ("dense", "nf4")]
    expected = run(problems, [Here([1, 4], E)] * 2, "cpu")
    placements = placed(problems, "compute", [1, 4])
    with torch.Stream(LATE):
        for one, p in zip(placements, problems, strict=True):
            one._hot_on(LATE, p.parameters)
    with torch.Stream(LATE):
        assert same(run(problems, placements, LATE), expected)


def test_streams_that_threads_share():
    """Each thread goes back to its own stream, though the first that came goes first."""
    shared, both_in, first_out, found = torch.Stream(LATE), threading.Barrier(2), threading.Event(), {}

    def work(number):
        with torch.Stream(LATE):
            own = torch.accelerator.current_stream(LATE)
            if number:
                both_in.wait(20)
            with order.on(shared):
                assert torch.accelerator.current_stream(LATE) == shared
                both_in.wait(20)
                first_out.wait(20) if number else both_in.wait(20)
            found[number] = torch.accelerator.current_stream(LATE) == own
            first_out.set()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {0: True, 1: True}


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


def test_autocast():
    """The host's part follows the device's."""
    p = problem(torch.float32, "dense")
    (placement,) = placed([p], "compute", [])
    with torch.no_grad():
        with torch.autocast("cpu", BF16):
            expected = compute(p.x, p.ids, p.gates, p.parameters)
        with torch.autocast(LATE.type, BF16):
            found = placement.sum(p.x.to(LATE), p.ids.to(LATE), p.gates.to(LATE), p.parameters, compute)
    assert found.dtype == BF16 and torch.equal(found.cpu(), expected)


def test_backward_twice():
    p = problem(BF16, "dense")
    (placement,) = placed([p], "compute", [1])
    x = p.x.detach().to(LATE).requires_grad_()
    out = placement.sum(x, p.ids.to(LATE), p.gates.detach().to(LATE), lent(p, [1])[0], compute)
    one, two = (
        torch.autograd.grad(out.float().sum(), x, retain_graph=keep)[0].cpu() for keep in (True, False)
    )
    assert torch.equal(one, two)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(out.float().sum(), x)


def test_trained_weights_stay(own_link):
    """Their gradients are the true ones, and no copy of them is used."""
    p = problem(torch.float32, "dense")
    for name in ("gate_up_weight", "down_weight"):
        p.parameters[name].requires_grad_()
    (placement,) = placed([p], "bring", [1])
    assert same(run([p], [placement], LATE), run([p], [Here([], E)], "cpu"))
    assert "its weights are trained" in str(placement)


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


def test_the_profiler_sees_both_shares():
    """Of each layer forward and backward, each in its own thread: an overlap is read from these."""
    layers = [bench.build(8, 64, 64, 4, "dense", BF16, seed) for seed in range(bench.LAYERS)]
    b = bench.Bench(LATE, layers, 20, 2, [0, 1])
    events = [e for e in b.events(b.placed("compute", b.hot), None) if e.name.startswith("moelora share")]
    names = [e.name for e in events]
    for place in ("cpu", LATE.type):
        for step in ("", ", backward"):
            assert names.count(f"moelora share on {place}{step}") == bench.LAYERS
    host = {e.thread for e in events if "share on cpu" in e.name}
    assert len(host) == 1 and not host & {e.thread for e in events if "share on cpu" not in e.name}


def test_no_device_is_named():
    for path in Path(beside.__file__).parent.rglob("*.py"):
        assert "cuda" not in path.read_text().lower(), path.name
