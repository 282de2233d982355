"""The host's share in a thread of its own, while a device that is late on purpose is given the other: both
are at work, that errors of both surface, and that it computes as its caller would.
"""

import contextlib
import contextvars
import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import late_device
import pytest
import torch
from beside_layers import BF16, LATE, E, Here, compute, lent, placed, problem, run, same
from moelora.placement.beside import link, shares, ways
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torch_moelora.batch_invariance import as_in_forward, is_batch_invariant

HOT = [1, 4]


@pytest.fixture
def own_link(monkeypatch):
    """A link of the test's own, so that what it breaks is not met again."""
    monkeypatch.setattr(link, "_LINKS", {})
    yield
    torch.accelerator.synchronize()


class Meeting:
    """Shares of two places, of which the accelerator's waits in mid-launch until the host's has begun."""

    def __init__(self, monkeypatch) -> None:
        self.begun, self.seen, self.threads = threading.Event(), [], {}
        gradients = ways.Share.gradients

        def differentiate(share, dy, retain):
            self.meet("backward", share.out.device.type)
            return gradients(share, dy, retain)

        monkeypatch.setattr(ways.Share, "gradients", differentiate)

    def compute(self, x, ids, gates, parameters):
        self.meet("forward", x.device.type)
        return compute(x, ids, gates, parameters)

    def meet(self, step: str, place: str) -> None:
        self.threads[step, place] = threading.get_ident()
        if place == "cpu":
            self.seen.append(f"{step}: the host's has begun")
            self.begun.set()
        elif self.begun.wait(20):
            self.begun.clear()
            self.seen.append(f"{step}: the accelerator's goes on")


def test_the_host_computes_while_the_accelerator_is_given_its_share(monkeypatch, own_link):
    """Forward and backward; what the accelerator is given, the caller gives it, and nobody waits for it."""
    p = problem(BF16, "dense")
    (placement,) = placed([p], "compute", HOT)
    meeting = Meeting(monkeypatch)
    x = p.x.detach().to(LATE).requires_grad_()
    parameters, _ = lent(p, HOT)
    out = placement.sum(x, p.ids.to(LATE), p.gates.detach().to(LATE), parameters, meeting.compute)
    behind = torch.Event(LATE)
    behind.record()
    assert not behind.query()  # all of it is still to be done, the host's share excepted
    out.backward(torch.ones_like(out))
    assert meeting.seen == [
        f"{step}: {told}"
        for step in ("forward", "backward")
        for told in ("the host's has begun", "the accelerator's goes on")
    ]
    where = meeting.threads
    assert where["forward", LATE.type] == threading.get_ident()
    assert where["backward", LATE.type] != threading.get_ident()  # autograd's for the device
    assert where["forward", "cpu"] == where["backward", "cpu"]
    assert len(set(where.values())) == 3


def arguments(p) -> tuple:
    """On the device, with hot experts; gates and parameters as they are differentiated."""
    x, gates = p.x.detach().to(LATE).requires_grad_(), p.gates.detach().to(LATE)
    return x, p.ids.to(LATE), gates, lent(p, HOT)[0]


class Broken(Meeting):
    """One place's share raises, the host's only once the accelerator's has: both were at work."""

    def __init__(self, monkeypatch, where: set[tuple[str, str]]) -> None:
        super().__init__(monkeypatch)
        self.where, self.ended, self.raised = where, [], threading.Event()
        monkeypatch.setattr(ways.Share, "__init__", self._ending(ways.Share.__init__))
        monkeypatch.setattr(ways.Share, "gradients", self._ending(ways.Share.gradients))

    def _ending(self, real):
        def share(*args, **kwargs):
            try:
                return real(*args, **kwargs)
            finally:
                self.ended.append(threading.current_thread().name)

        return share

    def meet(self, step: str, place: str) -> None:
        super().meet(step, place)
        if place == "cpu" and (step, LATE.type) in self.where:
            assert self.raised.wait(20)
        if (step, place) in self.where:
            self.raised.set()
            raise ZeroDivisionError(f"{step} on {place}")


@pytest.mark.parametrize("step", ["forward", "backward"])
@pytest.mark.parametrize("places", [["cpu"], [LATE.type], ["cpu", LATE.type]], ids=" and ".join)
def test_errors(step, places, monkeypatch, own_link):
    """Raised by the call that they belong to, the accelerator's first; the other share has ended by then."""
    problems = [problem(BF16, "dense")]
    expected = run(problems, [Here(HOT, E)], "cpu")
    placements = placed(problems, "compute", HOT)
    with monkeypatch.context() as changed:
        broken = Broken(changed, {(step, place) for place in places})
        given, out = arguments(problems[0]), None
        with pytest.raises(ZeroDivisionError, match=f"{step} on {max(places)}") as raised:
            out = placements[0].sum(*given, broken.compute)
            broken.ended.clear()
            out.backward(torch.ones_like(out))
        assert len(broken.ended) == 2
        assert link.link_of(LATE).worker._idle.acquire(blocking=False)
        link.link_of(LATE).worker._idle.release()
    kept = weakref.ref(given[0])
    del raised, given, broken, out
    gc.collect()
    assert kept() is None
    assert same(run(problems, placements, LATE), expected)


def test_what_the_host_computes_with(monkeypatch, own_link):
    """Everything of the caller's that a thread has by itself."""
    p = problem(torch.float32, "dense")
    (placement,) = placed([p], "compute", HOT)
    variable = contextvars.ContextVar("variable", default=None)
    seen = {}

    def look(x, ids, gates, parameters):
        kinds = ("cpu", LATE.type)
        seen[x.device.type] = (
            variable.get(),
            torch.is_inference_mode_enabled(),
            [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in kinds],
            is_batch_invariant(),
            torch.get_num_threads(),
            torch.accelerator.current_stream(LATE),
            torch.are_deterministic_algorithms_enabled(),
        )
        seen[x.device.type, "thread"] = threading.get_ident()
        return compute(x, ids, gates, parameters)

    x, ids, gates, parameters = arguments(p)
    inputs = (x.detach(), ids, gates, parameters, look)
    every = [
        contextlib.nullcontext(),
        torch.inference_mode(),
        torch.autocast("cpu", BF16),
        as_in_forward(True),
        torch.Stream(LATE),
    ]
    threads = torch.get_num_threads()
    for count, context in enumerate(every, 1):
        variable.set(count)
        torch.set_num_threads(count)
        try:
            with context, torch.no_grad():
                placement.sum(*inputs)
        finally:
            torch.set_num_threads(threads)
        assert seen["cpu"] == seen[LATE.type] and seen["cpu"][0] == count == seen["cpu"][4]
        assert seen["cpu", "thread"] != seen[LATE.type, "thread"] == threading.get_ident()
    with torch.autocast(LATE.type, torch.float16), torch.no_grad():  # the host follows the device's
        placement.sum(*inputs)
    assert seen["cpu"][2] == [torch.float16] * 2 and seen[LATE.type][2] == [False, torch.float16]


@pytest.mark.parametrize("streams", [0, 2])
@pytest.mark.parametrize(("way", "hot"), [("compute", HOT), ("compute", []), ("bring", [])])
def test_training_after_inference_mode(way, hot, streams, own_link):
    """What the first calls made and left is good for those that need gradients."""
    problems = [problem(BF16, kind) for kind in ("dense", "nf4")]
    placements = placed(problems, way, hot)
    with late_device.eager(streams):
        with torch.inference_mode():
            for p, placement in zip(problems, placements, strict=True):
                placement.sum(p.x.to(LATE), p.ids.to(LATE), p.gates.to(LATE), lent(p, hot)[0], compute)
        torch.accelerator.synchronize()
        assert same(run(problems, placements, LATE), run(problems, [Here(hot, E)] * 2, "cpu"))


def test_autocast(own_link):
    """Values and gradients, and the cache of the caller's casts outlives the host's share."""
    p = problem(torch.float32, "dense")
    found = []
    for placement, device in ((Here(HOT, E), "cpu"), (placed([p], "compute", HOT)[0], LATE)):
        with torch.autocast(torch.device(device).type, BF16):
            found.append(run([p], [placement], device))
    for a, e in zip(found[1][0], found[0][0], strict=True):
        assert (a.float() - e.float()).norm() <= 1e-2 * e.float().norm()
    weight = torch.randn(4, 4, requires_grad=True)
    with torch.autocast("cpu", BF16):
        first = torch.mm(weight, weight).grad_fn.next_functions[0][0]
        run([p], placed([p], "compute", HOT), LATE)
        assert torch.mm(weight, weight).grad_fn.next_functions[0][0] is first


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen |= {t.device.type for t in args if isinstance(t, torch.Tensor)}
        return function(*args, **(kwargs or {}))


def test_modes_see_both_shares(own_link):
    """A mode is a thread's: both shares stay in it."""
    p = problem(BF16, "dense")
    (placement,) = placed([p], "compute", HOT)
    names = []

    def look(x, ids, gates, parameters):
        names.append(threading.current_thread().name)
        mode.seen.clear()
        out = compute(x, ids, gates, parameters)
        assert mode.seen == {x.device.type}
        return out

    given = arguments(p)
    with Counting() as mode:
        placement.sum(*given, look)
    assert names == [threading.current_thread().name] * 2


@pytest.mark.parametrize("way", ["compute", "bring"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, way, monkeypatch, own_link):
    """The same bits, the block computed anew once, and meanwhile what it saved is not kept."""
    problems = [problem(BF16, "dense", seed=seed) for seed in range(2)]
    hot = HOT if way == "compute" else []
    placements = placed(problems, way, hot)
    given = [lent(p, hot) for p in problems]
    calls, kept = [], []
    makes = ways.Share.__init__

    def make(self, *args, **kwargs):
        makes(self, *args, **kwargs)
        kept.append(weakref.ref(self._out))

    monkeypatch.setattr(ways.Share, "__init__", make)

    def block(x):
        calls.append(threading.get_ident())
        for p, placement, (parameters, _) in zip(problems, placements, given, strict=True):
            x = placement.sum(x, p.ids.to(LATE), p.gates.to(LATE), parameters, compute)
        return x

    def gradients(forward):
        x = problems[0].x.detach().to(LATE).requires_grad_()
        out = forward(x)
        leaves = [leaf for _, leaves in given for leaf in leaves.values()]
        for leaf in leaves:
            leaf.grad = None
        saved = []
        if forward is not block and not reentrant:
            saved = [t for kept in boxes for box in kept._boxes for t in box]
            assert saved and all(t is None for t in saved)
        out.backward(torch.ones_like(out))
        return [t.cpu() for t in (out.detach(), x.grad, *(leaf.grad for leaf in leaves))]

    expected = gradients(block)
    boxes = []
    begins = shares.Kept.__init__
    monkeypatch.setattr(shares.Kept, "__init__", lambda self: (begins(self), boxes.append(self))[0])
    calls.clear()
    found = gradients(lambda x: checkpoint(block, x, use_reentrant=reentrant))
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))
    assert len(calls) == 2


def test_checkpointed_shares_meet(monkeypatch, own_link):
    """Under hooks for what is saved, too, both are at work at once."""
    p = problem(BF16, "dense")
    (placement,) = placed([p], "compute", HOT)
    meeting = Meeting(monkeypatch)
    x, *rest = arguments(p)
    out = checkpoint(lambda x: placement.sum(x, *rest, meeting.compute), x, use_reentrant=False)
    out.backward(torch.ones_like(out))
    both = ["the host's has begun", "the accelerator's goes on"]
    assert meeting.seen == [f"{step}: {told}" for step in ("forward", "forward", "backward") for told in both]


def test_offloaded(own_link):
    """Hooks see what both save, in one order, and a graph that is kept gives the same twice."""
    p = problem(BF16, "dense")
    (placement,) = placed([p], "compute", HOT)
    packed, unpacked = [], []

    def pack(t):
        packed.append((t.device.type, t.shape))
        return t.cpu(), t.device

    def unpack(kept):
        unpacked.append(threading.get_ident())
        return kept[0].to(kept[1])

    x, *rest = arguments(p)
    orders = []
    for _ in range(3):
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = placement.sum(x, *rest, compute)
        orders.append(list(packed))
    assert orders[0] == orders[1] == orders[2] and {kind for kind, _ in packed} == {"cpu", LATE.type}
    one, two = (torch.autograd.grad(out.float().sum(), x, retain_graph=k)[0].cpu() for k in (True, False))
    plain = torch.autograd.grad(placement.sum(x, *rest, compute).float().sum(), x)[0].cpu()
    assert torch.equal(one, two) and torch.equal(one, plain)
    assert len(unpacked) == 2 * len(packed) and len(set(unpacked)) == 1


def test_within_a_share(own_link):
    """A host's share that itself meets a layer of this kind, forward and backward."""
    outer, inner = (problem(BF16, "dense", seed=seed) for seed in range(2))
    first, second = placed([outer, inner], "compute", HOT)
    rest = (*arguments(inner)[1:], compute)
    names = []

    def nested(x, ids, gates, parameters):
        if x.device.type == "cpu":
            names.append(threading.current_thread().name)
            x = second.sum(x.to(LATE), *rest).cpu()
        return compute(x, ids, gates, parameters)

    x, *given = arguments(outer)
    out = first.sum(x, *given, nested)
    out.backward(torch.ones_like(out))
    assert names[0].startswith("moelora-host") and x.grad.cpu().isfinite().all()


def test_a_worker_that_is_busy(own_link):
    """Nobody waits for another's: the host's share is then the caller's."""
    p = problem(BF16, "dense")
    expected = run([p], [Here(HOT, E)], "cpu")
    placements = placed([p], "compute", HOT)
    worker = link.link_of(LATE).worker
    with worker._idle:
        assert same(run([p], placements, LATE), expected)
    assert worker._thread is None
    assert same(run([p], placements, LATE), expected)
    assert worker._thread is not None


def test_without_hot_experts_there_is_no_other_thread(own_link):
    p = problem(BF16, "dense")
    run([p], placed([p], "compute", []), LATE)
    assert link.link_of(LATE).worker._thread is None


def test_a_fork_has_a_worker_of_its_own(own_link):
    """Its parent's is not there, whatever it was doing when the process forked."""
    worker = link.link_of(LATE).worker
    assert worker.both(lambda: 1, lambda: 2, 1) == (1, 2)
    with worker._idle:
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(BaseException):
                own = link.link_of(LATE).worker
                begun = threading.Event()
                both = own.both(lambda: begun.wait(20), begun.set, torch.get_num_threads())
                code = 0 if both == (True, None) and own is not worker else 2
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


PROGRAM = """
import atexit, sys, threading, types
for name in ("moelora", "moelora.placement", "moelora.placement.beside"):  # without all that they import
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = ["{python}/" + name.replace(".", "/")]
import late_device
from moelora.placement.beside.worker import Worker
worker = Worker(late_device.start())
names = lambda: worker.both(threading.get_ident, threading.get_ident, 1)
atexit.register(lambda: print(len(set(names()))))
print(len(set(names())))
"""


def test_the_interpreter_ends():
    """At once; on the way out, when threads have ended, both shares are the caller's."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{python}", str(tests.parent / "python"))],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "2\n1\n"), done.stderr
