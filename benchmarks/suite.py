"""Gate, time and measure: the order in which a run does things."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from . import correctness, remote, timing
from .ceilings import Ceilings
from .layer import Batch, Case, Layer, make_batch, make_layer, make_weights
from .peers import find_contestant
from .peers.base import Contestant, Runner
from .registry import Shape
from .rows import Row, count_active, layer_row


@dataclass
class Check:
    """One contestant's pass or failure at the gate."""

    case: Case
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
    skipped: list[tuple[str, str, str]] = field(default_factory=list)  # shape, contestant, reason
    versions: dict[str, str] = field(default_factory=dict)


class Suite:
    """Runs what the options ask for. `say` is told what is going on."""

    def __init__(self, options: argparse.Namespace, ceilings: Ceilings, say: Callable[[str], None]) -> None:
        self.options, self.say = options, say
        self.outcome = Outcome(ceilings)

    def run(self) -> Outcome:
        for shape in self.options.shape:
            self._run_shape(shape)
        return self.outcome

    def _case(self, shape: Shape, **fields) -> Case:
        o = self.options
        first = {"tokens": o.tokens[0], "rank": o.rank[0], "routing": o.routing[0]}
        fixed = {"dtype": o.dtype, "lora_dtype": o.lora_dtype, "device": o.device, "seed": o.seed}
        return Case(shape, **{**first, **fixed, **fields})

    def _run_shape(self, shape: Shape) -> None:
        """All ranks and token counts share one set of weights; it is gone before the next shape's is made."""
        case = self._case(shape)
        contestants = list(self._able(case))
        if not contestants:
            return
        self.say(f"{shape.name}: making weights")
        weights, biases = make_weights(case)
        for rank in self.options.rank:
            layer = make_layer(replace(case, rank=rank), weights, biases)
            self._run_layer(layer, contestants)

    def _able(self, case: Case) -> Iterator[Contestant]:
        for name in self.options.contestants:
            contestant = find_contestant(name)
            reason = contestant.missing(case)
            if case.device not in contestant.devices:
                reason = f"not for {case.device}"
            if reason:
                self.outcome.skipped.append((case.shape.name, name, reason))
            else:
                self.outcome.versions[name] = contestant.version()
                yield contestant

    def _run_layer(self, layer: Layer, contestants: list[Contestant]) -> None:
        runners: dict[str, Runner] = {}
        try:
            for contestant in contestants:
                self.say(f"{layer.shape.name} r={layer.case.rank}: loading {contestant.name}")
                runners[contestant.name] = contestant.load(layer, self.options.threads)
            for tokens in self.options.tokens:
                case = replace(layer.case, tokens=tokens)
                passed = {n: runner for n, runner in runners.items() if self._gate(layer, case, n, runner)}
                self._time_layer(case, passed)
        finally:
            for runner in runners.values():
                runner.close()

    def _gate(self, layer: Layer, case: Case, name: str, runner: Runner) -> bool:
        case = case.for_check()
        self.say(f"{case.shape.name} T={case.tokens} r={case.rank}: checking {name}")
        batch = make_batch(case)
        errors = correctness.errors(runner.results(batch), correctness.expected(layer, batch))
        check = Check(case, name, errors, correctness.TOLERANCE[case.dtype])
        self.outcome.checks.append(check)
        return check.passed

    def _time_layer(self, case: Case, runners: dict[str, Runner]) -> None:
        o = self.options
        batches = {routing: make_batch(replace(case, routing=routing)) for routing in o.routing}
        entries = {
            (name, routing): _step(runner, batch)
            for routing, batch in batches.items()
            for name, runner in runners.items()
        }
        label = f"{case.shape.name} T={case.tokens} r={case.rank}"
        self.say(f"{label}: timing {', '.join(runners)}")
        times = timing.interleave(entries, o.repeats, o.warmups)
        for (name, routing), taken in times.items():
            batch = batches[routing]
            memory = None if o.no_memory else self._memory(batch, name, runners[name])
            active = count_active(batch.expert_idxs)
            row = layer_row(batch.case, name, taken, active, self.outcome.ceilings, memory)
            self.outcome.rows.append(row)

    def _memory(self, batch: Batch, name: str, runner: Runner) -> int:
        case = batch.case
        self.say(f"{case.shape.name} T={case.tokens} r={case.rank}: peak memory of {name}")
        return remote.peak_memory(name, case, find_contestant(name).python, self.options.threads)


def _step(runner: Runner, batch: Batch) -> Callable[[], tuple[float, ...]]:
    return lambda: runner.time(batch)
