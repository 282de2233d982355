"""One line of the result, and the floor it is compared with."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from .ceilings import Ceilings
from .layer import Case
from .operators import Call
from .timing import Timing


@dataclass
class Row:
    """One contestant at one case. `part` is "layer" or an operator, e.g. "scatter_lora gate_up"."""

    part: str
    case: Case
    contestant: str
    timing: Timing
    flops: int  # of the base products; of the operator itself where it has none
    moved: int  # bytes that must be read or written at least
    ceilings: Ceilings  # measured in turn with the contestants
    active_experts: int | None = None
    memory: int | None = None  # peak bytes beyond the weights
    weights: int | None = None  # bytes of all experts' weights

    @property
    def floor(self) -> float:
        """Seconds."""
        return max(self.flops / self.ceilings.rate, self.moved / self.ceilings.bandwidth)

    @property
    def of_peak(self) -> float:
        return self.flops / self.timing.median / self.ceilings.rate

    @property
    def of_bandwidth(self) -> float:
        return self.moved / self.timing.median / self.ceilings.bandwidth

    def to_json(self) -> dict:
        case = self.case.to_json()
        shape = case.pop("shape")
        del case["check_rows"], case["seed"], case["device"]
        return {
            "part": self.part,
            "contestant": self.contestant,
            "shape": shape["name"],
            **case,
            "seconds": asdict(self.timing),
            "flops": self.flops,
            "bytes": self.moved,
            "active_experts": self.active_experts,
            "ceiling_flops_per_second": self.ceilings.rate,
            "ceiling_bytes_per_second": self.ceilings.bandwidth,
            "floor_seconds": self.floor,
            "flops_per_second": self.flops / self.timing.median,
            "share_of_peak": self.of_peak,
            "share_of_bandwidth": self.of_bandwidth,
            "peak_memory_beyond_weights_bytes": self.memory,
            "weight_bytes": self.weights,
        }


@dataclass
class StoppedRow:
    """A contestant that took longer than it may at a case."""

    part: str
    case: Case
    contestant: str
    seconds: float

    def to_json(self) -> dict:
        case = self.case
        return {
            "part": self.part,
            "contestant": self.contestant,
            "shape": case.shape.name,
            "tokens": case.tokens,
            "rank": case.rank,
            "routing": case.routing,
            "after_seconds": self.seconds,
        }


def count_active(expert_idxs: Tensor) -> int:
    return int(expert_idxs.unique().numel())


def layer_row(
    case: Case, contestant: str, timing: Timing, active: int, ceilings: Ceilings, weights: int
) -> Row:
    """Forward and backward of the whole layer: each active expert's weights are read once in each.
    weights: bytes of those of all experts.
    """
    flops = case.shape.base_flops(case.tokens)
    moved = 2 * active * weights // case.shape.experts
    return Row("layer", case, contestant, timing, flops, moved, ceilings, active, weights=weights)


def operator_row(
    part: str, case: Case, contestant: str, timing: Timing, call: Call, ceilings: Ceilings
) -> Row:
    return Row(part, case, contestant, timing, call.flops, call.moved, ceilings)
