"""One of two processes of tests/test_model_distributed.py: trains tiny models in parallel.

python model_distributed.py RANK DIRECTORY     DIRECTORY holds `base`, a model saved by transformers
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import moelora
import torch
import torch.distributed as dist
from model_tiny import adapt, build, tokens
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

WORLD, STEPS = 2, 3


def train(
    model: nn.Module, rows: Tensor, shared: bool = False, trained: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor | list[float]]:
    """SGD on `rows`: the mean of the processes' losses in each step, and the trained parameters, whole.

    `shared`: every process has the same rows, and gradients are whole without averaging.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and trained(name)}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if dist.is_initialized() and not shared:
            dist.all_reduce(mean)
            mean /= WORLD
        losses.append(mean.item())
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}
    return {"losses": losses, "parameters": {name: p.detach().clone() for name, p in whole.items()}}


def adapted() -> nn.Module:
    """LoRA on experts and attention."""
    torch.manual_seed(4)
    return adapt(build("qwen3_moe"), targets=["o_proj"])


def _router(name: str) -> bool:
    return name.endswith(("mlp.gate.weight", "experts.down_proj"))


def one_process(base: Path) -> dict[str, dict]:
    """What the parallel runs are compared with: the whole batch here, on transformers' eager experts."""
    expert_parallel = AutoModelForCausalLM.from_pretrained(base, experts_implementation="eager")
    return {
        "data": train(adapted(), tokens(4)),
        "experts": train(expert_parallel, tokens(4), trained=_router),
    }


def data_parallel(rank: int) -> dict[str, dict]:
    """DDP, and FSDP2 and FSDP1 with a group for each layer: each process has half of the rows."""
    rows = tokens(4).chunk(WORLD)[rank]
    ddp = adapted()
    moelora.enable(ddp)
    sharded = adapted()
    moelora.enable(sharded)
    for layer in sharded.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    found = {"ddp": train(DistributedDataParallel(ddp), rows), "fsdp": train(sharded, rows)}
    found["fsdp1"] = _fsdp1(adapted(), rows)
    assert not moelora.report(ddp).untrained and not moelora.report(sharded).untrained
    return found


def _fsdp1(model: nn.Module, rows: Tensor) -> dict[str, Tensor | list[float]]:
    """In a forward every parameter is a view of a flat one and no leaf; between, a part of it."""
    moelora.enable(model)
    wrap = {"use_orig_params": True, "device_id": torch.device("cpu")}
    layers = model.get_base_model().model.layers
    for index, layer in enumerate(layers):
        layers[index] = FullyShardedDataParallel(layer, **wrap)
    whole = FullyShardedDataParallel(model, **wrap)
    found = train(whole, rows)
    whole.zero_grad()
    report = moelora.report(whole)
    assert not report.untrained and {layer.path for layer in report.layers} == {"operators"}
    assert all(a.gradient and a.path == "operators" for layer in report.layers for a in layer.adapters)
    assert [(layer.name, layer.experts) for layer in report.layers] == [
        (f"model.layers.{index}.mlp.experts", 5) for index in range(2)
    ]
    with FullyShardedDataParallel.summon_full_params(whole):
        found["parameters"] = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }
    names = {name: name.replace("_fsdp_wrapped_module.", "") for name in found["parameters"]}
    found["parameters"] = {names[name]: p for name, p in found["parameters"].items()}
    return found


def expert_parallel(rank: int, base: Path) -> dict[str, dict]:
    """transformers' own plans: half of the experts here, by masking (sentinels) and by exchanging tokens.

    PEFT cannot hold the LoRA of experts that are spread over processes: with tensor parallelism it says so
    itself, without it the report does.
    """
    found = {}
    for name, sizes in (("all_reduce", {"tp_size": WORLD}), ("all_to_all", {"fsdp_size": WORLD})):
        config = DistributedConfig(**sizes, ep_size=WORLD, ep_implementation=name)
        model = AutoModelForCausalLM.from_pretrained(base, distributed_config=config)
        moelora.enable(model)
        shared = name == "all_reduce"
        rows = tokens(4) if shared else tokens(4).chunk(WORLD)[rank]
        found[name] = train(model, rows, shared, _router)
    report = moelora.enable(adapt(model))
    assert all("spread over processes" in a.reason for layer in report.layers for a in layer.adapters)
    return found


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    dist.init_process_group("gloo", init_method=f"file://{directory / 'store'}", rank=rank, world_size=WORLD)
    found = data_parallel(rank) | expert_parallel(rank, directory / "base")
    torch.save(found, directory / f"found{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
