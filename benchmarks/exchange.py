"""What it costs to have a layer's experts on several ranks: measured, and on paper for faster networks.

python -m benchmarks.exchange --ranks 2 --tokens 512       a layer on processes over gloo, of one thread each
python -m benchmarks.exchange --paper                      from bytes and FLOPs alone
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

RANK = 16  # of LoRA


class Layer(NamedTuple):
    """An expert layer: experts, hidden and intermediate size, experts a token; how many of it a model has."""

    experts: int
    hidden: int
    inner: int
    top_k: int
    layers: int

    def flops(self, tokens: int) -> float:
        """Of the base products of `tokens`, forward and in dX."""
        return tokens * self.top_k * 3 * self.hidden * self.inner * 2 * 2

    def bytes(self, tokens: int, ranks: int) -> float:
        """What a rank sends (and receives), forward and backward, if every expert is equally likely.

        A token goes to each of the others that has one of its experts. There: x in 16 bits, gates, ids;
        back: a sum in 32 bits. In the backward 16 bits each way, and the gates' gradients.
        """
        others = (ranks - 1) * (1 - (1 - 1 / ranks) ** self.top_k)
        there = 2 * self.hidden + 8 * self.top_k
        return (
            tokens * others * (there + 4 * self.hidden + 2 * self.hidden + 2 * self.hidden + 4 * self.top_k)
        )


LAYERS = {
    "qwen3-30b-a3b": Layer(128, 2048, 768, 8, 48),
    "deepseek-v3": Layer(256, 7168, 2048, 8, 58),
}
TOKENS = 4096  # a rank, on paper
LINKS = {"10 Gb/s": 1.25e9, "100 Gb/s": 12.5e9}  # bytes a second each way
RATES = {"0.4 TF/s": 4e11, "4 TF/s": 4e12, "40 TF/s": 4e13}  # what a rank's processors reach in the layer


def until(layer: Layer, rate: float, link: float) -> int | None:
    """The first number of ranks with which the exchange takes longer than the layer; None: there is none."""
    ranks = 2
    while layer.bytes(TOKENS, ranks) / link <= layer.flops(TOKENS) / rate:
        ranks += 1
        if ranks > layer.experts:
            return None
    return ranks


def paper() -> str:
    """Tables in markdown."""
    lines = [f"| {TOKENS} tokens a rank | MB a layer, 2 · 8 · 64 ranks |", "|---|---:|"]
    lines[0] += "".join(f" {link}: ms, 2 · 8 · 64 ranks |" for link in LINKS)
    lines[1] += "---:|" * len(LINKS)
    for name, layer in LAYERS.items():
        sizes = [layer.bytes(TOKENS, ranks) for ranks in (2, 8, 64)]
        row = f"| {name} | {' · '.join(f'{size / 1e6:.0f}' for size in sizes)} |"
        for link in LINKS.values():
            row += f" {' · '.join(f'{size / link * 1e3:.0f}' for size in sizes)} |"
        lines.append(row)
    lines += [
        "",
        "| a rank computes at | " + " | ".join(f"{n}: layer, ms | {n}: longer from" for n in LAYERS) + " |",
    ]
    lines.append("|---|" + "---:|" * (2 * len(LAYERS)))
    for told, rate in RATES.items():
        row = f"| {told} |"
        for layer in LAYERS.values():
            firsts = [until(layer, rate, link) for link in LINKS.values()]
            told_firsts = " · ".join("never" if first is None else f"{first} ranks" for first in firsts)
            row += f" {layer.flops(TOKENS) / rate * 1e3:.0f} | {told_firsts} |"
        lines.append(row)
    return "\n".join(lines)


def _parameters(layer: Layer, experts: int) -> dict[str, Tensor]:
    made = {
        "gate_up_weight": torch.randn(experts, 2 * layer.inner, layer.hidden, dtype=torch.bfloat16) * 0.02,
        "down_weight": torch.randn(experts, layer.hidden, layer.inner, dtype=torch.bfloat16) * 0.02,
        "gate_up_bias": None,
        "down_bias": None,
    }
    for name, out, inner in (("gate_up", 2 * layer.inner, layer.hidden), ("down", layer.hidden, layer.inner)):
        made[f"{name}_lora_a"] = torch.randn(experts, RANK, inner).mul_(0.02).requires_grad_()
        made[f"{name}_lora_b"] = torch.randn(experts, out, RANK).mul_(0.02).requires_grad_()
    return made


def process(rank: int, ranks: int, name: str, tokens: int, repeats: int, directory: str) -> None:
    """One rank: a placed layer's step, the part of it that is spent in exchanges, and its share alone."""
    from moelora.placement.group import Group
    from moelora.placement.owners import owners_of
    from moelora.placement.ranks import Ranks

    from torch_moelora.functional import moe_mlp

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    torch.manual_seed(rank)
    layer = LAYERS[name]
    group = Group()
    placement = Ranks(group, name, 0, owners_of("spread", layer.experts, ranks))
    parameters = _parameters(layer, len(placement.own))
    x = torch.randn(tokens, layer.hidden, dtype=torch.bfloat16, requires_grad=True)
    scores = torch.randn(tokens, layer.experts).softmax(-1).topk(layer.top_k)
    gates, dy = scores.values.requires_grad_(), torch.randn(tokens, layer.hidden, dtype=torch.bfloat16)
    spent, sizes = [], []

    def timed(rows: Tensor, sent: list[int], received: list[int], where: str) -> Tensor:
        dist.barrier()  # so that waiting for a slower rank is not counted as the exchange
        begun = time.perf_counter()
        found = Group.exchange(group, rows, sent, received, where)
        spent.append(time.perf_counter() - begun)
        sizes.append((sum(sent) - sent[rank]) * rows[:1].nbytes)
        return found

    group.exchange = timed

    def compute(x: Tensor, ids: Tensor, gates: Tensor, parameters: dict) -> Tensor:
        return moe_mlp(x, ids, gates, **parameters)

    def placed() -> None:
        placement.sum(x, scores.indices, gates, parameters, compute).backward(dy)

    def alone() -> None:  # as many rows, all of this rank's experts
        compute(x, scores.indices % len(placement.own), gates, parameters).backward(dy)

    told = {}
    for what, step in (("placed", placed), ("alone", alone)):
        step()
        times, exchanges = [], []
        for _ in range(repeats):
            spent.clear()
            sizes.clear()
            dist.barrier()
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
            exchanges.append(sum(spent))
        told[what] = (statistics.median(times), statistics.median(exchanges), sum(sizes))
    if rank == 0:
        whole, exchange, sent = told["placed"]
        print(
            f"{name}, {tokens} tokens a rank, {ranks} ranks: alone {told['alone'][0] * 1e3:.0f} ms, "
            f"placed {whole * 1e3:.0f} ms, of which exchange {exchange * 1e3:.1f} ms of {sent / 1e6:.0f} MB"
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--shape", choices=LAYERS, default="qwen3-30b-a3b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--paper", action="store_true", help="compute instead of measuring")
    args = parser.parse_args()
    if args.paper:
        print(paper())
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(dir=Path.cwd() / "build") as directory:
        rest = (args.ranks, args.shape, args.tokens, args.repeats, directory)
        multiprocessing.spawn(process, args=rest, nprocs=args.ranks)


if __name__ == "__main__":
    main()
