"""Gate, time and measure: the order in which a run does things."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from . import correctness, memory, operators, remote, timing
from .ceilings import Ceilings
from .layer import Batch, Case, Layer, make_batch, make_layer, make_weights
from .peers import find_contestant
from .peers.base import Contestant, Runner
from .registry import Shape
from .rows import Row, count_active, layer_row, operator_row


@dataclass
class Check:
    """One contestant's pass or failure at the gate."""

    case: Case
    part: str
    contestant: str
    errors: dict[str, float]
    tolerance: float

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

    def _able(self, case: Case) -> Iterator[Contestant]:
        """Those that can run this; the others are noted once a shape, with the reason."""
        for name in self.options.contestants:
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
            self.outcome.broken.append((case.shape.name, name, f"{type(error).__name__}: {error}"))
            return None

    def _load(self, layer: Layer, contestant: Contestant) -> Entrant | None:
        self.say(f"{_label(layer.case)}: loading {contestant.name}")
        before = memory.allocated(layer.case.device)
        runner = self._attempt(
            layer.case, contestant.name, lambda: contestant.load(layer, self.options.threads)
        )
        if runner is None:
            return None
        return Entrant(contestant, runner, memory.allocated(layer.case.device) - before)

    def _run_layer(self, layer: Layer) -> None:
        loaded = (self._load(layer, contestant) for contestant in self._able(layer.case))
        entrants = [entrant for entrant in loaded if entrant]
        rows: list[Row] = []
        try:
            for tokens in self.options.tokens:
                case = replace(layer.case, tokens=tokens)
                checked = make_batch(case.for_check())
                want = correctness.expected(layer, checked)
                rows += self._time_layer(layer, case, [e for e in entrants if self._gate(checked, want, e)])
        finally:
            for entrant in entrants:
                entrant.runner.close()
        self.outcome.rows += rows
        # The contestants' own processes are gone by now: their weights need not fit in beside another's.
        if layer.case.device == "cpu" and not self.options.no_memory:
            for row in rows:
                row.memory = self._peak_memory(row)

    def _gate(self, batch: Batch, want: dict, entrant: Entrant) -> bool:
        """Whether it may be timed."""
        case, name = batch.case, entrant.name
        self.say(f"{_label(case)}: checking {name}")
        got = self._attempt(case, name, lambda: entrant.runner.results(batch))
        if got is None:
            return False
        return self._judge(case, "layer", name, correctness.errors(got, want))

    def _judge(self, case: Case, part: str, name: str, errors: dict[str, float]) -> bool:
        check = Check(case, part, name, errors, correctness.TOLERANCE[case.dtype])
        self.outcome.checks.append(check)
        return check.passed

    def _time_layer(self, layer: Layer, case: Case, entrants: list[Entrant]) -> list[Row]:
        o = self.options
        batches = {routing: make_batch(replace(case, routing=routing)) for routing in o.routing}
        steps = {
            (entrant.name, routing): _step(entrant.runner, batch)
            for routing, batch in batches.items()
            for entrant in entrants
        }
        # A first step of this size may fail for want of memory: before the others are timed beside it.
        able = [e for e in entrants if self._attempt(case, e.name, steps[e.name, o.routing[0]])]
        names = [entrant.name for entrant in able]
        entries = {key: run for key, run in steps.items() if key[0] in names}
        self.say(f"{_label(case)}: timing {', '.join(names)}")
        times, ceilings = self._interleave(entries)
        rows = []
        for routing, batch in batches.items():
            active = count_active(batch.expert_idxs)
            for entrant in able:
                taken = times[entrant.name, routing]
                row = layer_row(batch.case, entrant.name, taken, active, ceilings)
                if case.device == "cuda":
                    row.memory = memory.cuda_peak(layer, batch, entrant.runner, entrant.held)
                rows.append(row)
        return rows

    def _interleave(self, entries: dict) -> tuple[dict, Ceilings]:
        """Times of everyone, and the ceilings as they were meanwhile."""
        found: list[Ceilings] = []
        o = self.options
        times = timing.interleave(entries, o.repeats, o.warmups, lambda: found.append(self.measure()))
        return times, Ceilings.meanwhile(found)

    def _peak_memory(self, row: Row) -> int | None:
        case, name = row.case, row.contestant
        self.say(f"{_label(case)}: peak memory of {name}")
        python, threads = find_contestant(name).python, self.options.threads
        return self._attempt(case, name, lambda: remote.peak_memory(name, case, python, threads))

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
            got = self._attempt(case, name, lambda run=implementation: operators.outputs(checked, run))
            if got is not None and self._judge(case.for_check(), part, name, correctness.errors(got, want)):
                entries[name] = _operator_step(timed, implementation, layer.weights["down"].device)
        times, ceilings = self._interleave(entries)
        for name, taken in times.items():
            self.outcome.rows.append(operator_row(part, case, name, taken, timed, ceilings))


def _label(case: Case) -> str:
    return f"{case.shape.name} T={case.tokens} r={case.rank}"


def _step(runner: Runner, batch: Batch) -> Callable[[], tuple[float, ...]]:
    return lambda: runner.time(batch)


def _operator_step(call: operators.Call, implementation: Callable, device: torch.device) -> Callable:
    return lambda: operators.step(call, implementation, device)
