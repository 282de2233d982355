"""What tests/test_placement.py checks in each of several processes: a placed model against a single one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import moelora
import pytest
import torch
import torch.distributed as dist
from model_tiny import CONFIGS, adapt, build, difference, fill, tokens
from moelora.errors import MoeloraError
from moelora.placement.ranks import Ranks
from packed_files import LAYOUTS, write
from peft import PeftModel
from placed_failures import (  # noqa: F401  (checks, too)
    failing,
    failing_backward,
    keeps_nothing,
    killed,
    memory,
    raises_in_attention,
    raises_in_dataloader,
    raises_in_optimizer,
)
from placed_fsdp import accelerated  # noqa: F401  (a check, too)
from placed_trainers import sft_trainer, trainer, trainer_elsewhere, trainer_sharded  # noqa: F401  (checks)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral_gelu")
PACKED = ("ours nf4 nested", "gpt-oss mxfp4", "bitsandbytes fp4")
LIMIT = 4e-6
# Values are larger: with gpt-oss's, one process that takes the batch in two parts is 3.6e-6 away on AVX2.
LIMIT_PACKED = 1e-5


def prepare(directory: Path) -> None:
    """Files that all processes read."""
    for name in PACKED:
        write(LAYOUTS[name], directory / name)
        moelora.from_pretrained(directory / name, cache_dir=directory / "cache")  # is stacked once
    for kind in FAMILIES:
        build(kind).save_pretrained(directory / kind)
    single = adapted("qwen3_moe")
    single.save_pretrained(directory / "adapter")


def prepare_large(directory: Path) -> None:
    """Some 60 MB of experts, dense in float32 and packed."""
    torch.manual_seed(0)
    sizes = {"num_experts": 16, "hidden_size": 256, "moe_intermediate_size": 1024, "num_hidden_layers": 1}
    config = CONFIGS["qwen3_moe"]()
    config.update(sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory / "large")
    more = {"num_experts": 64, "moe_intermediate_size": 1024}
    write(replace(LAYOUTS["ours nf4 nested"], matrix=drawn), directory / "large packed", **more)


def drawn(
    rows: int, columns: int, gen: torch.Generator, experts: int = 1
) -> tuple[dict[str, Tensor], Tensor]:
    """NF4 in our own layout, of random bytes: quickly made."""
    codes = torch.randint(0, 256, (experts, rows, columns // 2), generator=gen, dtype=torch.uint8)
    scale = torch.rand(experts, rows, columns // 64, generator=gen) * 0.01
    return {".codes": codes, ".scale": scale}, torch.empty(0)


def adapted(kind: str, dtype: torch.dtype = torch.float32, **keywords: Any) -> PeftModel:
    """LoRA on experts and attention."""
    torch.manual_seed(4)
    model = adapt(build(kind, dtype), targets=["o_proj"], **keywords)
    moelora.enable(model)
    return model


def packed(directory: Path, name: str) -> PeftModel:
    """In float32, so that sums in another order are all that differs."""
    base = moelora.from_pretrained(directory / name, cache_dir=directory / "cache", dtype=torch.float32)
    torch.manual_seed(4)
    model = adapt(base, targets=["o_proj"])
    moelora.enable(model)
    return model


def owners(here: Any) -> list[Any]:
    """Spread, all on one, and a map by which rank 1 has no expert, and others not their neighbours."""
    last = here.world - 1
    return ["spread", "rank0", [last, 0, last, 0, 0] if last > 1 else [1, 0, 1, 0, 0]]


def mine(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Of a tensor like the parameter `name` of a single process, what this rank of a placed model has."""
    layer = model.get_submodule(name.rpartition(".")[0])
    part = getattr(layer, "_moelora_part", None)
    return tensor if part is None else part.own(tensor)


def compare(
    model: nn.Module, single: nn.Module, of: Callable[[Tensor], Tensor], limit: float = LIMIT
) -> None:
    """`of` every trained parameter, this rank's part of it."""
    theirs = dict(single.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected, found = mine(model, name, of(theirs[name])), of(parameter)
            found = found.full_tensor() if isinstance(found, DTensor) else found
            assert found.shape == expected.shape, name
            apart = difference(found, expected) if expected.numel() else 0.0
            assert apart < limit, f"{name}: {apart}"


def gradient(parameter: Tensor) -> Tensor:
    return parameter.grad


def mean(value: Tensor, here: Any) -> Tensor:
    """Over ranks."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / here.world


def step(model: nn.Module, rows: Tensor) -> Tensor:
    """Forward and backward; the loss."""
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    return loss


def same_files(one: Path, other: Path) -> None:
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def like_one_process(
    here: Any, make: Callable[[], PeftModel], several: list[Any], name: str, limit: float = LIMIT
) -> None:
    """Losses and all gradients under DDP, their norm, and the saved file, for each of several owners."""
    rows = tokens(2 * here.world)
    single, one = make(), here.directory / f"{name}{here.world}.one"
    expected = step(single, rows)
    norm = torch.nn.utils.clip_grad_norm_(single.parameters(), 1e9)
    if here.rank == 0:
        single.save_pretrained(one)
    for number, whose in enumerate(several):
        model = make()
        report = moelora.place(model, whose)
        assert all(layer.places and layer.path == "operators" for layer in report.layers)
        loss = step(DistributedDataParallel(model), rows.chunk(here.world)[here.rank])
        assert mean(loss, here).item() == pytest.approx(expected.item(), rel=1e-6)
        compare(model, single, gradient, limit)
        found = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        assert found.item() == pytest.approx(norm.item(), rel=1e-5)
        saved = here.directory / f"{name}{number}{here.world}"
        model.save_pretrained(saved)
        if here.rank == 0:
            same_files(saved, one)


def families(here: Any) -> None:
    for kind in FAMILIES:
        like_one_process(here, lambda kind=kind: adapted(kind), owners(here), kind)


def packed_families(here: Any) -> None:
    """Four experts each."""
    several = ["spread", "rank0", [0, here.world - 1, 0, here.world - 1]]
    for name in PACKED:
        like_one_process(here, lambda name=name: packed(here.directory, name), several, name, LIMIT_PACKED)


def as_near_as(single: nn.Module, model: nn.Module, exact: nn.Module) -> None:
    """The placed model's gradients in 16 bits differ from the exact ones as a single process's do."""
    theirs, ones = dict(exact.named_parameters()), dict(single.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad and p.numel():
            expected, one = (mine(model, name, m[name].grad) for m in (theirs, ones))
            assert difference(p.grad, expected) < max(2 * difference(one, expected), 2e-2), name


def half(here: Any) -> None:
    """bfloat16: as far from float32 as one process is, with LoRA in float32 or in bfloat16."""
    rows = tokens(2 * here.world)
    for fp32 in (True, False):
        exact = adapted("qwen3_moe")
        for p, q in zip(
            exact.parameters(), adapted("qwen3_moe", torch.bfloat16, fp32=fp32).parameters(), strict=True
        ):
            p.data.copy_(q.data)
        single = adapted("qwen3_moe", torch.bfloat16, fp32=fp32)
        model = adapted("qwen3_moe", torch.bfloat16, fp32=fp32)
        moelora.place(model)
        step(exact, rows), step(single, rows)
        loss = step(DistributedDataParallel(model), rows.chunk(here.world)[here.rank])
        assert loss.isfinite()
        as_near_as(single, model, exact)


def unequal(here: Any) -> None:
    """A token-weighted loss over batches of different sizes; the last rank's counts nothing."""
    rows = tokens(here.world * (here.world + 1) // 2, 8)
    sizes = [here.world - rank for rank in range(here.world)]
    count = rows[: -sizes[-1], 1:].numel()

    def loss(model: nn.Module, part: Tensor) -> Tensor:
        logits = model(input_ids=part).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum") / count

    for whose in ("spread", "rank0"):
        single, model = adapted("qwen3_moe"), adapted("qwen3_moe")
        moelora.place(model, whose)
        loss(single, rows[: -sizes[-1]]).backward()
        weight = 0 if here.rank == here.world - 1 else here.world
        ddp = DistributedDataParallel(model)
        (loss(ddp, rows.split(sizes)[here.rank]) * weight).backward()
        compare(model, single, gradient)


def without_tokens(here: Any) -> None:
    """A layer by itself, in which the first rank has no token, and ids of no expert are left out."""
    generator = torch.Generator().manual_seed(7)
    sizes = [5 * rank for rank in range(here.world)]
    x, dy = (torch.randn(sum(sizes), 24, generator=generator) for _ in range(2))
    ids = torch.randint(-1, 6, (sum(sizes), 2), generator=generator)
    gates = torch.rand(sum(sizes), 2, generator=generator)

    def run(model: nn.Module, several: list[Tensor]) -> list[Tensor]:
        x, ids, gates, dy = (t.clone() for t in several)
        layer = model.get_base_model().model.layers[1].mlp.experts
        y = layer(x.requires_grad_(), ids, gates.requires_grad_())
        y.backward(dy)
        return [y, x.grad, gates.grad]

    for whose in owners(here):
        single, model = adapted("qwen3_moe"), adapted("qwen3_moe")
        moelora.place(model, whose)
        expected = run(single, [x, ids, gates, dy])
        found = run(model, [t.split(sizes)[here.rank] for t in (x, ids, gates, dy)])
        for one, other in zip(found, expected, strict=True):
            other = other.split(sizes)[here.rank]
            assert one.shape == other.shape and (not other.numel() or difference(one, other) < LIMIT)
        theirs = dict(single.named_parameters())
        for name, parameter in model.named_parameters():
            if theirs[name].grad is not None:
                want = mine(model, name, theirs[name].grad) / here.world
                assert parameter.grad.shape == want.shape, name
                assert not want.numel() or difference(parameter.grad, want) < LIMIT, name


def accumulated_and_clipped(here: Any) -> None:
    """Two steps of two micro-batches each, clipped to a tenth of their norm."""
    rows = tokens(4 * here.world)
    single, model = adapted("qwen3_moe"), adapted("qwen3_moe")
    moelora.place(model)
    ddp = DistributedDataParallel(model)
    for whole, batches in (
        (single, rows.chunk(2)),
        (ddp, [r.chunk(here.world)[here.rank] for r in rows.chunk(2)]),
    ):
        optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            for number, batch in enumerate(batches):
                with ddp.no_sync() if whole is ddp and number == 0 else nullcontext():
                    (whole(input_ids=batch, labels=batch).loss / 2).backward()
            norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
            assert norm > 1
            optimizer.step()
    compare(model, single, lambda p: p.detach(), 1e-4)


def sharded(here: Any) -> None:
    """FSDP2 leaves alone what it is told to; clipping sees the one and the other."""
    rows = tokens(2 * here.world)
    single, model, wrong = (adapted("qwen3_moe") for _ in range(3))
    moelora.place(model)
    own = moelora.local_parameters(model)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, ignored_params=own)
    fully_shard(model, ignored_params=own)
    step(single, rows)
    step(model, rows.chunk(here.world)[here.rank])
    norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5) for m in (single, model)]
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-5)
    compare(model, single, gradient)
    moelora.place(wrong, "rank0")
    with pytest.raises(NotImplementedError, match="FSDP does not support"):
        fully_shard(wrong)


def recomputed(here: Any) -> None:
    """Gradient checkpointing, of both kinds, where a rank without experts saves less than the others."""
    rows = tokens(2 * here.world)
    single = adapted("qwen3_moe").train()
    step(single, rows)
    for reentrant in (False, True):
        for whose in ("spread", "rank0"):
            model = adapted("qwen3_moe").train()
            moelora.place(model, whose)
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            step(DistributedDataParallel(model), rows.chunk(here.world)[here.rank])
            compare(model, single, gradient)


def autocast(here: Any) -> None:
    rows = tokens(2 * here.world)
    exact, single, model = (adapted("qwen3_moe") for _ in range(3))
    moelora.place(model)
    step(exact, rows)
    with torch.autocast("cpu", torch.bfloat16):
        step(single, rows)
        step(DistributedDataParallel(model), rows.chunk(here.world)[here.rank])
    as_near_as(single, model, exact)


def several_forwards(here: Any) -> None:
    """Two forwards before one backward, and one that is never differentiated between them."""
    rows = tokens(4 * here.world)
    single, model = adapted("qwen3_moe"), adapted("qwen3_moe")
    moelora.place(model)
    for whole, first, second in (
        (single, *rows.chunk(2)),
        (model, *(part.chunk(here.world)[here.rank] for part in rows.chunk(2))),
    ):
        one = whole(input_ids=first, labels=first).loss
        with torch.no_grad():
            whole(input_ids=first)
        two = whole(input_ids=second, labels=second).loss
        (one + 3 * two).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not hasattr(
            model.get_submodule(name.rpartition(".")[0]), "_moelora_part"
        ):
            parameter.grad = mean(parameter.grad, here)
    compare(model, single, gradient)


def compiled(here: Any) -> None:
    """The exchange is a graph break; with fullgraph=True the error says why."""
    rows = tokens(2 * here.world)
    single, model = adapted("qwen3_moe"), adapted("qwen3_moe")
    moelora.place(model)
    ddp = DistributedDataParallel(model)
    step(single, rows)
    with torch._dynamo.config.patch(optimize_ddp=False):
        step(torch.compile(ddp, backend="aot_eager"), rows.chunk(here.world)[here.rank])
    compare(model, single, gradient)
    with pytest.raises(Exception, match="experts are spread over ranks"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=rows)


def before_adapters(here: Any) -> None:
    """Placed first, adapted then: the same values as if the whole had been adapted; a second adapter, too."""
    rows = tokens(2 * here.world)
    for whose in ("spread", "rank0", [0] * 4 + [here.world - 1]):
        base = build("qwen3_moe")
        moelora.enable(base)
        moelora.place(base, whose)
        model = adapt(base, targets=["o_proj"])
        moelora.enable(model)
        single = adapted("qwen3_moe")
        for each in (model, single):
            torch.manual_seed(5)
            each.add_adapter("more", copy.deepcopy(each.peft_config["default"]))
            for name, parameter in each.named_parameters():
                if "lora_B.more" in name:  # whole, so far
                    nn.init.normal_(parameter, std=0.3)
            each.base_model.set_adapter(["default", "more"])
            moelora.enable(each)
        step(single, rows)
        step(DistributedDataParallel(model), rows.chunk(here.world)[here.rank])
        compare(model, single, gradient)
        assert sum(layer.experts for layer in moelora.report(model).layers) == 10
    with pytest.raises(MoeloraError, match="load the model anew"):
        moelora.disable(model)
    with pytest.raises(MoeloraError, match="cannot be placed twice"):
        moelora.place(model)
    with pytest.raises(MoeloraError, match="is spread over ranks"):
        model.merge_adapter()


def loaded(here: Any) -> None:
    """`from_pretrained` with owners, dense and packed; a file of one process, spread again."""
    rows = tokens(2)
    whole = {kind: build(kind) for kind in FAMILIES}
    whole |= {
        name: moelora.from_pretrained(here.directory / name, dtype=torch.float32) for name in PACKED[:2]
    }
    for name, single in whole.items():
        model = moelora.from_pretrained(here.directory / name, owners="spread", dtype=torch.float32)
        assert not getattr(model.config, "quantization_config", None) or name in PACKED
        with torch.no_grad():
            found, expected = (m(input_ids=rows).logits for m in (model, single))
        assert difference(found, expected) < LIMIT, name
    single = adapted("qwen3_moe")
    model = moelora.from_pretrained(here.directory / "qwen3_moe", owners="spread")
    model = PeftModel.from_pretrained(model, here.directory / "adapter", is_trainable=True)
    moelora.enable(model)
    compare(model, single, lambda p: p.detach(), 1e-12)
    moelora.check_adapter(model, here.directory / "adapter")
    fill(model, 9)
    model.load_adapter(here.directory / "adapter", "default", is_trainable=True)
    compare(model, single, lambda p: p.detach(), 1e-12)


def wrong_arguments(here: Any) -> None:
    model = adapted("qwen3_moe")
    for whose, told in (
        ("all", "owners must be"),
        ([0] * 4, "name 5 ranks"),
        ([here.world] + [0] * 4, "ranks from 0 to"),
    ):
        with pytest.raises(MoeloraError, match=told):
            moelora.place(model, whose)
    with pytest.raises(MoeloraError, match="before it is wrapped"):
        moelora.place(DistributedDataParallel(adapted("qwen3_moe")))
    with pytest.raises(MoeloraError, match="is not enabled"):
        moelora.place(build("qwen3_moe"))
    model.merge_adapter()
    with pytest.raises(MoeloraError, match="unmerge"):
        moelora.place(model)


def ordered(here: Any) -> None:
    """The same bits from run to run, and rows only to the ranks that have one of the token's experts."""
    model = adapted("qwen3_moe")
    moelora.place(model)
    rows = tokens(2)
    sent = []
    layer = next(m for m in model.modules() if type(m).__name__ == "Qwen3MoeExperts")
    ranks = layer._moelora.placements[0]
    exchange = ranks.group.exchange
    ranks.group.exchange = lambda t, out, back, where: (
        sent.append((out, where)) or exchange(t, out, back, where)
    )
    with torch.no_grad():
        logits = [model(input_ids=rows).logits for _ in range(2)]
    assert torch.equal(*logits)
    assert isinstance(ranks, Ranks)
    out = sum(sent[1][0])  # counts, then rows there, then back
    assert rows.numel() <= out <= 2 * rows.numel() and len(sent) == 3 * 2 * 2


def lonely_save(here: Any) -> None:
    """One rank alone cannot save, and says so instead of waiting for half an hour."""
    model = adapted("qwen3_moe")
    moelora.place(model)
    group = model.get_base_model().model.layers[0].mlp.experts.get_base_layer()._moelora.placements[0].group
    if here.rank == 0:
        group.timeout /= 60
        with pytest.raises(MoeloraError, match="save_pretrained must be called on all ranks, and rank"):
            model.save_pretrained(here.directory / "lonely")
    dist.barrier()
