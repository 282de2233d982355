"""`python -m moelora inspect`: what experts a checkpoint has, what LoRA would train, what that costs.

All but the measurement comes from the configuration and the headers of the weight files.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedConfig, PreTrainedModel

from moelora import checkpoints, packed_layout
from moelora.advice import unconverted
from moelora.commands import memory, pages
from moelora.experts import bind, is_experts, projections
from moelora.linears import slow_in_torch
from moelora.stored import files, header
from moelora.survey import activation, weights
from torch_moelora.functional import linear_lora, moe_mlp

MEASURED_BYTES = 2**28  # of weights: enough to be out of the caches, drawn in a second
REPEATS = 3
NF4_BYTES = 0.5 + 1 / 64 + 8 / (64 * 256)  # of a weight, with nested scales


@dataclass(frozen=True)
class Group:
    """Expert layers of one kind."""

    name: str
    count: int
    module: nn.Module  # one of them, without storage
    top_k: int
    dtype: torch.dtype

    @property
    def experts(self) -> int:
        return self._shape(1)[0]

    @property
    def parameters(self) -> int:
        """Of all its layers."""
        return self.count * sum(p.numel() for p in self.module.parameters())

    def trainable(self, rank: int, which: str) -> int:
        """LoRA parameters of all its layers; `which` is both, gate_up or down."""
        chosen = {"both": (0, 1), "gate_up": (0,), "down": (1,)}[which]
        return self.count * sum(e * rank * (n + k) for e, n, k in map(self._shape, chosen))

    def _shape(self, which: int) -> tuple[int, int, int]:
        """(E, out, in) of the first or the second projection."""
        weight = getattr(self.module, projections(self.module)[which])
        e, n, k = weight.shape
        return (e, k, n) if self.module.is_transposed else (e, n, k)

    def step_seconds(self, tokens: int, rank: int) -> float:
        """Forward and backward of all its layers, from some experts of one with their share of tokens."""
        (e, n, k), (_, hidden, inner) = self._shape(0), self._shape(1)
        each = (n * k + hidden * inner) * self.dtype.itemsize
        some = max(1, min(e, MEASURED_BYTES // each))
        rows = max(1, tokens * some // e)
        gated = self.module.has_gate

        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype).uniform_(-0.05, 0.05)

        first, second = draw(some, n, k), draw(some, hidden, inner)
        x = draw(rows, k).requires_grad_()
        ids = torch.randint(some, (rows, self.top_k))
        gates = torch.full((rows, self.top_k), 1 / self.top_k, dtype=self.dtype)
        lora = {
            name: draw(*shape, dtype=torch.float32).requires_grad_()
            for name, shape in (
                ("gate_up_lora_a", (some, rank, k)),
                ("gate_up_lora_b", (some, n, rank)),
                ("down_lora_a", (some, rank, inner)),
                ("down_lora_b", (some, hidden, rank)),
            )
        }

        def step() -> None:
            moe_mlp(x, ids, gates, first, second, gated=gated, **lora).sum().backward()

        return _median(step) * self.count * e / some


def main(explicit: dict) -> None:
    """Prints the inspection. MoeloraError tells the user what to mend."""
    directory = Path(explicit["model_dir"])
    outline, config = checkpoints.outline(directory)
    groups = list(_groups(outline, config))
    rank, which, tokens = explicit["rank"], explicit["projections"], explicit["tokens"]
    total, dtype = checkpoints.count(outline), groups[0].dtype
    print(f"{directory}: {type(outline).__name__}, {_count(total)} parameters, {_name(dtype)}")
    print(f"stored   {stored(directory, hasattr(config, 'quantization_config'))}")
    section = getattr(config, packed_layout.SECTION, None)
    if packed_layout.is_ours(section):
        print(f"packed   {packed_layout.read(section)}")
    print()
    print(_table(groups, rank, which))
    found = Cost(groups, total, config.get_text_config().hidden_size, rank, which, tokens)
    plan = memory.Plan(
        rank,
        which,
        tuple(explicit["target_modules"]),
        max(1, tokens // explicit["seq_length"]),
        min(tokens, explicit["seq_length"]),
        explicit["optimizer"],
        explicit["step_in_backward"],
        explicit["target_rank"],
        explicit["gradient_checkpointing"],
    )
    print(f"\nLoRA     rank {rank} on {which}: {_count(found.trainable)} trainable parameters")
    print(f"         of some layers only: {_some_layers(outline)}")
    if told := unconverted(outline):
        print(f"         {told}")
    with checkpoints.computing(directory):
        lines = memory_lines(outline, base(directory, outline, found), plan)
    print("\n".join(lines))
    if explicit["measure"]:
        experts, rest = found.seconds()
        threads = torch.get_num_threads()
        print(f"time     about {duration(experts + rest)} a step of {tokens} tokens on {threads} threads:")
        print(f"         {duration(experts)} in the experts, {duration(rest)} in the other weights;")
        print("         attention scores are not counted, gradient checkpointing adds a third")


@dataclass(frozen=True)
class Cost:
    """What a step takes."""

    groups: list[Group]
    parameters: int
    hidden_size: int
    rank: int
    which: str
    tokens: int

    @property
    def trainable(self) -> int:
        """LoRA parameters on the experts."""
        return sum(group.trainable(self.rank, self.which) for group in self.groups)

    def seconds(self) -> tuple[float, float]:
        """Of a step in the experts and in the other weights, extrapolated from a short measurement."""
        experts = sum(group.step_seconds(self.tokens, self.rank) for group in self.groups)
        others = self.parameters - sum(group.parameters for group in self.groups)
        return experts, _dense_seconds(others, self.tokens, self.hidden_size, self.groups[0].dtype)


def memory_lines(outline: nn.Module, base: memory.Base, plan: memory.Plan) -> list[str]:
    """What a step takes, and what would make it fit here. `outline` is of no use afterwards."""
    estimator = memory.Estimator(outline, base, plan)
    advice = estimator.advice(memory.room())
    return [f"memory   {estimator.memory().told()}", *(f"         {line}" for line in advice)]


def base(directory: Path | None, outline: PreTrainedModel, found: Cost) -> memory.Base:
    """How large a checkpoint's weights are in memory; without a directory, where they are to be made. Pages
    of embeddings do not stay (`pages.give_back`).
    """
    size = found.groups[0].dtype.itemsize
    experts = sum(group.parameters for group in found.groups)
    stored_bytes = sum(path.stat().st_size for path in files(directory)) if directory is not None else 0
    tables = sum(table.numel() * size for table in pages.looked_up(outline))
    if getattr(outline.config, "quantization_config", None) is not None:
        return memory.Base(0, stored_bytes - tables)
    packed = (found.parameters - experts) * size + int(experts * NF4_BYTES)
    whole = found.parameters * size
    if directory is not None and _maps(directory):
        return memory.Base(0, max(whole, stored_bytes) - tables, packed - tables)
    return memory.Base(whole, stored_bytes, packed - tables)


def cost(outline: nn.Module, config: PreTrainedConfig, rank: int, which: str, tokens: int) -> Cost:
    """What a step of so many tokens takes with LoRA on a model's experts (`which`: both, gate_up or down)."""
    total, hidden = checkpoints.count(outline), config.get_text_config().hidden_size
    return Cost(list(_groups(outline, config)), total, hidden, rank, which, tokens)


def _groups(outline: nn.Module, config: PreTrainedConfig) -> Iterator[Group]:
    """Expert layers, those that differ only in their number together."""
    same: dict[tuple, list[tuple[str, nn.Module]]] = {}
    for name, module in outline.named_modules():
        if is_experts(module):
            shapes = tuple(tuple(p.shape) for p in module.parameters())
            same.setdefault((re.sub(r"\d+", "*", name), type(module), shapes), []).append((name, module))
    text = config.get_text_config()
    names = (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_k",
        "top_k_experts",
        "moe_top_k",
    )
    top_k = next((k for k in (getattr(text, name, None) for name in names) if isinstance(k, int)), 1)
    for (pattern, *_), members in same.items():
        name = pattern if len(members) > 1 else members[0][0]
        yield Group(name, len(members), members[0][1], top_k, config.dtype or torch.float32)


def _some_layers(outline: nn.Module) -> str:
    """How a part of the layers is adapted: what does it for linear layers does not do it here."""
    name, module = next((name, module) for name, module in outline.named_modules() if is_experts(module))
    first = ", ".join(f'"{name}.{projection}"' for projection in projections(module))
    return f"target_parameters=[{first}, ...]; PEFT ignores layers_to_transform and exclude_modules there"


def _table(groups: list[Group], rank: int, which: str) -> str:
    table = Table(box=None, pad_edge=False, header_style="")
    for heading in (
        "expert layers",
        "class",
        "experts",
        "weights",
        "activation",
        "computed by",
        "LoRA parameters",
    ):
        table.add_column(heading)
    for group in groups:
        binding = bind(group.module)
        experts = f"{group.experts}, {group.top_k} a token"
        table.add_row(
            group.name + (f"  ×{group.count}" if group.count > 1 else ""),
            type(group.module).__name__,
            experts,
            weights(group.module),
            activation(group.module, binding),
            f"transformers: {binding.reason}" if binding.reason else "operators",
            _count(group.trainable(rank, which)),
        )
    console = Console(file=StringIO(), width=200, color_system=None)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _experts(directory: Path) -> tuple[int, int, set[str]]:
    """How many tensors of single experts the weight files have, how many of all of a layer, their dtypes."""
    single, fused, dtypes = 0, 0, set()
    for path in files(directory):
        for name, dtype in header(path).items():
            if re.search(r"experts\.\d+\.", name):
                single += 1
            elif "experts." in name and "shared_expert" not in name:
                fused += 1
            else:
                continue
            dtypes.add(dtype)
    return single, fused, dtypes


def _maps(directory: Path) -> bool:
    """Whether dense experts are used where they lie in the files."""
    single, fused, _ = _experts(directory)
    return bool(fused and not single)


def stored(directory: Path, packed: bool = False) -> str:
    """How the experts lie in the weight files, from their headers."""
    single, fused, dtypes = _experts(directory)
    if not single and not fused:
        return "no expert weights in *.safetensors here"
    kinds = ", ".join(sorted(dtypes))
    if single and packed:
        return f"{single} tensors of single experts, {kinds}: the first load stacks them in a cache, for good"
    if single:
        return f"{single} matrices of single experts, {kinds}: transformers merges them while loading"
    return f"{fused} tensors of all experts, {kinds}: loading them in their dtype maps the files"


def _dense_seconds(parameters: int, tokens: int, hidden: int, dtype: torch.dtype) -> float:
    """Forward and dX of `parameters` frozen weights, by one product of their width on what will do it."""
    x, weight = torch.ones(tokens, hidden, dtype=dtype), torch.ones(2 * hidden, hidden, dtype=dtype)
    product = linear_lora if slow_in_torch(weight) else linear
    return 2 * _median(lambda: product(x, weight)) * parameters / weight.numel()


def _median(step: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS + 1):  # the first one warms up
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _count(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def duration(value: float) -> str:
    """Seconds in words."""
    if value >= 5400:
        return f"{value / 3600:.1f} h"
    if value >= 600:
        return f"{value / 60:.0f} min"
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
