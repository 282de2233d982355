"""Gate, time and measure: the order in which a run does things."""

from __future__ import annotations

import argparse
import faulthandler
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import torch

from . import correctness, memory, operators, products, remote, timing
from .ceilings import Ceilings
from .layer import Batch, Case, Layer, make_batch, make_layer, make_weights
from .peers import find_contestant
from .peers.base import Contestant, Runner
from .registry import Shape
from .rows import Row, StoppedRow, count_active, layer_row, operator_row

PATIENCE = 3  # times the limit, for a step that was done within it before
Peaks = dict[tuple[str, Case], int | None]  # contestant and case that may be timed → bytes beyond the weights


@dataclass
class Check:
    """One contestant's pass or failure at the gate."""

    case: Case
    part: str
    contestant: str
    errors: dict[str, float]  # beside the reference with the weights that the contestant computes with
    tolerance: float
    original: dict[str, float] | None = None  # beside that with the layer's, where rounding made others

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.errors.items(), key=lambda item: item[1])

    @property
    def passed(self) -> bool:
        return self.worst[1] <= self.tolerance


@dataclass
class Outcome:
    """Everything a run found."""

    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    left_out: list[tuple[str, str, str]] = field(default_factory=list)  # shape, contestant, reason
    broken: list[tuple[str, str, str]] = field(default_factory=list)  # the same, for what raised
    stopped: list[StoppedRow] = field(default_factory=list)
    replaced: list[tuple[str, str, str]] = field(default_factory=list)  # contestant, stand-in, reason
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        return not self.broken and all(check.passed for check in self.checks)


@dataclass
class Entrant:
    """A contestant with its hold on the layer at hand."""

    contestant: Contestant
    runner: Runner
    held: int  # bytes its own loading took on the device, CUDA only
    weights: int  # bytes of those of all experts

    @property
    def name(self) -> str:
        return self.contestant.name


class Suite:
    """Runs what the options ask for. `say` is told what is going on."""

    def __init__(
        self,
        options: argparse.Namespace,
        ceilings: Ceilings,
        measure: Callable[[], Ceilings],
        say: Callable[[str], None],
    ) -> None:
        """measure: the ceilings once more, in a short time."""
        self.options, self.measure, self.say = options, measure, say
        self.outcome = Outcome(ceilings)

    def run(self) -> Outcome:
        self.names = self._choose()
        for shape in self.options.shape:
            self._run_shape(shape)
        return self.outcome

    def _run_shape(self, shape: Shape) -> None:
        """All ranks and token counts share one set of weights; it is gone before the next shape's is made."""
        o = self.options
        case = Case(
            shape, max(o.tokens), o.rank[0], o.dtype, o.lora_dtype, o.routing[0], o.device, o.seed
        )  # fmt: skip
        if not any(True for _ in self._able(case)):
            return
        self.say(f"{shape.name}: making weights")
        weights, biases = make_weights(case)
        for rank in o.rank:
            layer = make_layer(replace(case, rank=rank), weights, biases)
            if not o.operators:
                self._run_layer(layer)
            if not o.layer:
                self._run_operators(layer)

    def _choose(self) -> list[str]:
        """The contestants' names, with stand-ins where torch's products in the dtype are hopeless."""
        o = self.options
        found = {name: find_contestant(name).stand_in for name in o.contestants}
        if o.device != "cpu" or o.dtype == "fp32" or not any(found.values()):
            return o.contestants
        self.say(f"timing torch's products in {o.dtype}")
        reason = products.why_not(o.dtype, remote.product_rates((o.dtype, "fp32"), o.limit))
        if reason is None:
            return o.contestants
        self.outcome.replaced = [(name, other, reason) for name, other in found.items() if other]
        return list(dict.fromkeys(other or name for name, other in found.items()))

    def _able(self, case: Case) -> Iterator[Contestant]:
        """Those that can run this; the others are noted once a shape, with the reason."""
        for name in self.names:
            contestant = find_contestant(name)
            reason = contestant.missing(case)
            if case.device not in contestant.devices:
                reason = f"not for {case.device}"
            if reason is None:
                self.outcome.versions.setdefault(name, contestant.version())
                yield contestant
            elif (note := (case.shape.name, name, reason)) not in self.outcome.left_out:
                self.outcome.left_out.append(note)

    def _attempt(self, case: Case, name: str, work: Callable[[], object]) -> object | None:
        """What `work` returns; None, and a note, if it raises: a contestant must not end the run."""
        try:
            return work()
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            self._note(case, name, error)
            return None

    def _note(self, case: Case, name: str, error: Exception) -> None:
        if isinstance(error, remote.Stopped):
            self.outcome.stopped.append(StoppedRow("layer", case, name, error.seconds))
        else:
            self.outcome.broken.append((case.shape.name, name, f"{type(error).__name__}: {error}"))

    def _load(self, layer: Layer, contestant: Contestant) -> Entrant | None:
        self.say(f"{_label(layer.case)}: loading {contestant.name}")
        before, o = memory.allocated(layer.case.device), self.options
        runner = self._attempt(
            layer.case, contestant.name, lambda: contestant.load(layer, o.threads, o.limit)
        )
        if runner is None:
            return None
        held = memory.allocated(layer.case.device) - before
        return Entrant(contestant, runner, held, contestant.weight_bytes(layer))

    def _run_layer(self, layer: Layer) -> None:
        """On the CPU each contestant is tried out in a process of its own at first, while no other one's
        weights are in memory: who is stopped there cannot hold up the run.
        """
        contestants = list(self._able(layer.case))
        peaks: Peaks = {}
        for tokens, routing in product(self.options.tokens, self.options.routing):
            for contestant in contestants:
                self._try_out(replace(layer.case, tokens=tokens, routing=routing), contestant, peaks)
        known = {name for name, _ in peaks}
        loaded = (self._load(layer, contestant) for contestant in contestants if contestant.name in known)
        entrants = [entrant for entrant in loaded if entrant]
        try:
            for tokens in self.options.tokens:
                mine = [e for e in entrants if any(n == e.name and c.tokens == tokens for n, c in peaks)]
                if not mine:
                    continue
                case = replace(layer.case, tokens=tokens)
                checked = make_batch(case.for_check())
                want = correctness.expected(layer, checked)
                passed = [entrant for entrant in mine if self._gate(layer, checked, want, entrant)]
                self._time_layer(layer, case, passed, peaks)
        finally:
            for entrant in entrants:
                entrant.runner.close()

    def _try_out(self, case: Case, contestant: Contestant, peaks: Peaks) -> None:
        """Adds the case to `peaks` if it may be timed."""
        o, name = self.options, contestant.name
        if case.device == "cuda" or (o.no_memory and contestant.own):
            peaks[name, case] = None
            return
        self.say(f"{_label(case)}: trying out {name}")
        found = self._attempt(
            case, name, lambda: remote.try_out(name, case, contestant.python, o.threads, o.limit)
        )
        if found is not None:
            peaks[name, case] = None if o.no_memory else found

    def _gate(self, layer: Layer, batch: Batch, want: dict, entrant: Entrant) -> bool:
        """Whether it may be timed. want: what the layer's own weights give."""
        case, name = batch.case, entrant.name
        self.say(f"{_label(case)}: checking {name}")
        got = self._attempt(case, name, self._watched(lambda: entrant.runner.results(batch)))
        if got is None:
            return False
        errors, weights = correctness.errors(got, want), entrant.contestant.numbers(layer)
        if weights is layer.weights:
            return self._judge(case, "layer", name, errors)
        own = correctness.errors(got, correctness.expected(replace(layer, weights=weights), batch))
        return self._judge(case, "layer", name, own, original=errors)

    def _judge(self, case: Case, part: str, name: str, errors: dict, original: dict | None = None) -> bool:
        check = Check(case, part, name, errors, correctness.TOLERANCE[case.dtype], original)
        self.outcome.checks.append(check)
        return check.passed

    def _time_layer(self, layer: Layer, case: Case, entrants: list[Entrant], peaks: Peaks) -> None:
        batches = {routing: make_batch(replace(case, routing=routing)) for routing in self.options.routing}
        steps = {
            (entrant.name, routing): self._watched(_step(entrant.runner, batch))
            for routing, batch in batches.items()
            for entrant in entrants
            if (entrant.name, batch.case) in peaks
        }
        # A first step of this size may fail for want of memory: before the others are timed beside it.
        first = {name: step for (name, _), step in reversed(steps.items())}
        able = [name for name, step in reversed(first.items()) if self._attempt(case, name, step)]
        entries = {key: step for key, step in steps.items() if key[0] in able}
        if not entries:
            return
        self.say(f"{_label(case)}: timing {', '.join(able)}")
        lost = lambda key, error: self._note(batches[key[1]].case, key[0], error)  # noqa: E731
        times, ceilings = self._interleave(entries, lost)
        by_name = {entrant.name: entrant for entrant in entrants}
        for (name, routing), taken in times.items():
            batch, entrant = batches[routing], by_name[name]
            active = count_active(batch.expert_idxs)
            row = layer_row(batch.case, name, taken, active, ceilings, entrant.weights)
            row.memory = peaks[name, batch.case]
            if case.device == "cuda":
                row.memory = memory.cuda_peak(layer, batch, entrant.runner, entrant.held)
            self.outcome.rows.append(row)

    def _interleave(self, entries: dict, lost: Callable) -> tuple[dict, Ceilings]:
        """Times of everyone, and the ceilings as they were meanwhile."""
        found: list[Ceilings] = []
        o = self.options
        times = timing.interleave(entries, o.repeats, o.warmups, lambda: found.append(self.measure()), lost)
        return times, Ceilings.meanwhile(found)

    def _watched(self, work: Callable) -> Callable:
        """Ends the run with a traceback if `work` hangs after all: on CUDA kernels may be searched for."""
        if self.options.device == "cuda":
            return work

        def watched():
            faulthandler.dump_traceback_later(PATIENCE * self.options.limit, exit=True, file=sys.__stderr__)
            try:
                return work()
            finally:
                faulthandler.cancel_dump_traceback_later()

        return watched

    def _run_operators(self, layer: Layer) -> None:
        for tokens in self.options.tokens:
            for routing in self.options.routing:
                case = replace(layer.case, tokens=tokens, routing=routing)
                implementations = {c.name: c.operators() for c in self._able(case)}
                if not any(implementations.values()):
                    return
                checked = operators.make_calls(layer, make_batch(case.for_check()))
                timed = operators.make_calls(layer, make_batch(case))
                for part, call in timed.items():
                    self._run_part(layer, case, part, checked[part], call, implementations)

    def _run_part(self, layer, case: Case, part: str, checked, timed, implementations) -> None:
        """One operator: gate and time everyone who has it."""
        able = {
            name: found[timed.operator] for name, found in implementations.items() if timed.operator in found
        }
        if not able:
            return
        self.say(f"{_label(case)}: {part}")
        want = operators.expected(checked, layer)
        entries = {}
        for name, implementation in able.items():
            work = self._watched(lambda run=implementation: operators.outputs(checked, run))
            got = self._attempt(case, name, work)
            if got is not None and self._judge(case.for_check(), part, name, correctness.errors(got, want)):
                step = _operator_step(timed, implementation, layer.weights["down"].device)
                entries[name] = self._watched(step)
        if not entries:
            return
        times, ceilings = self._interleave(entries, lambda name, error: self._note(case, name, error))
        for name, taken in times.items():
            self.outcome.rows.append(operator_row(part, case, name, taken, timed, ceilings))


def _label(case: Case) -> str:
    return f"{case.shape.name} T={case.tokens} r={case.rank}"


def _step(runner: Runner, batch: Batch) -> Callable[[], tuple[float, ...]]:
    return lambda: runner.time(batch)


def _operator_step(call: operators.Call, implementation: Callable, device: torch.device) -> Callable:
    return lambda: operators.step(call, implementation, device)
