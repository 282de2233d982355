"""What a training step takes, part by part, before any weight is loaded.

What autograd keeps is not computed from formulas: the first layers run once on tensors without storage, with
the adapter and the operators, and the rest follows from how it grows from layer to layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from trl.kernels import chunked_logprob

import moelora
from moelora import attention, cgroups
from moelora.commands import depth, head, lora, optimizers
from moelora.linears import slow_in_torch

PERIOD = 4  # layers of different kinds alternate with at most this period in the models that there are
HEAD_TILES = 8  # float32 tiles of logits that TRL's loss holds at its peak
# By measurements of whole runs: what malloc keeps between inputs of layers, which stay while each layer is
# recomputed, and what data and their library take beside those that are imported here.
FRAGMENTATION, DATA = 1.25, 225 * 10**6
VOCABULARY_PIECE = 32768  # columns of such a tile


@dataclass(frozen=True)
class Plan:
    """What decides the memory of a step besides the model."""

    rank: int
    which: str  # projections: both, gate_up or down
    target_modules: tuple[str, ...]
    rows: int  # sequences in a forward pass
    length: int  # tokens in each
    optimizer: str = "adamw"
    step_in_backward: bool = False
    target_rank: int | None = None
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Kept:
    """Counts and bytes that grow from layer to layer."""

    parameters: float  # LoRA's
    largest: float  # the most of a single LoRA parameter
    activations: float  # bytes
    layer_inputs: float  # bytes that checkpointing keeps
    layer: float  # bytes of activations of one layer
    fixed: float = 0  # of the parameters: those of a rank of their own


@dataclass(frozen=True)
class Memory:
    """Bytes of a step, by what they are for."""

    base: int  # memory of its own
    mapped: int  # pages of weight files, which the system can drop and read again
    lora: int
    gradients: int
    moments: int
    activations: int
    logits: int
    process: int  # Python, torch and the libraries

    @property
    def private(self) -> int:
        """What cannot be dropped and read again."""
        parts = (self.lora, self.gradients, self.moments, self.activations, self.logits, self.process)
        return self.base + sum(parts)

    @property
    def total(self) -> int:
        return self.private + self.mapped

    def told(self) -> str:
        """The parts in words."""
        parts = {
            "weights": self.base,
            "weight files": self.mapped,
            "LoRA": self.lora,
            "gradients": self.gradients,
            "optimizer": self.moments,
            "activations": self.activations,
            "logits": self.logits,
            "the process itself": self.process,
        }
        listed = ", ".join(f"{_gb(size)} {what}" for what, size in parts.items() if size)
        return f"{_gb(self.total)} at the peak: {listed}"


@dataclass(frozen=True)
class Base:
    """Bytes of the base model."""

    private: int
    mapped: int  # pages of weight files: what is used where it lies there, and what was read and copied
    if_nf4: int | None = None  # of all of it, mapped, with its experts in nested NF4, where they are dense


class Estimator:
    """The memory of steps of one model.

    Args:
        model: without storage, as `checkpoints.outline` makes it; it is changed and of no use afterwards.
    """

    def __init__(self, model: PreTrainedModel, base: Base, plan: Plan):
        self.base, self.plan = base, plan
        import_module("moelora.commands.finetune")  # with all that it takes
        self.process = psutil.Process().memory_info().rss
        self.vocabulary = model.config.get_text_config().vocab_size
        model.requires_grad_(False)
        _without_values(model)
        self.head = model.get_output_embeddings().weight.to("meta") if head.fits(model) else None
        self.kept = _kept(model, plan)

    def memory(self, plan: Plan | None = None, packed: bool = False) -> Memory:
        """Of a step by the estimator's plan, or by one with the same tokens and targets."""
        plan, kept = plan or self.plan, self.kept
        smaller = plan.rank / self.plan.rank
        parameters = kept.fixed + (kept.parameters - kept.fixed) * smaller
        held = kept.largest * smaller if plan.step_in_backward else parameters
        # The backward of a layer has gradients of its intermediate results beside these.
        activations = kept.activations + kept.layer
        if plan.checkpointing:
            activations = FRAGMENTATION * kept.layer_inputs + 3 * kept.layer
        return Memory(
            base=0 if packed else self.base.private,
            mapped=self.base.if_nf4 if packed else self.base.mapped,
            lora=int(4 * parameters),
            gradients=int(4 * held),
            moments=int(optimizers.MOMENTS[plan.optimizer] * parameters),
            activations=int(activations),
            logits=self._logits(plan.tokens),
            process=self.process + DATA,
        )

    def _logits(self, tokens: int) -> int:
        """With their gradients."""
        if self.head is not None:
            return head.memory(tokens, self.head)
        tile = min(tokens, chunked_logprob.TOKEN_CHUNK_SIZE) * min(self.vocabulary, VOCABULARY_PIECE)
        return HEAD_TILES * 4 * tile

    def advice(self, room: int) -> list[str]:
        """Whether a step fits into so many bytes, and if not, what makes it fit, in lines."""
        found = self.memory()
        if found.total <= room:
            return [f"fits into the {_gb(room)} that are free here"]
        lines = [f"DOES NOT FIT into the {_gb(room)} that are free here"]
        if found.private <= room:
            lines = [f"fits into the {_gb(room)} that are free here if each step reads weights from disk"]
        ways = [
            (self.memory(replace(self.plan, **change), not change), flag, change)
            for flag, change in self._changes()
        ]
        if single := [f"{flag} ({_gb(m.total)})" for m, flag, _ in ways if m.total <= room]:
            return [*lines, f"it fits with {' or '.join(single)}"]
        # What saves most first, but less rank last: it is another adapter.
        ways.sort(key=lambda way: ("rank" in way[2], way[0].total))
        plan, packed, flags = self.plan, False, []
        for _, flag, change in ways:
            plan, packed, flags = replace(plan, **change), packed or not change, [*flags, flag]
            together = self.memory(plan, packed)
            if together.total <= room:
                return [*lines, f"it fits with {' '.join(flags)} together ({_gb(together.total)})"]
        return [*lines, f"nor with {' '.join(flags)} together ({_gb(together.total)})"]

    def _changes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What would take less, by its flag; without a change, another format of the experts."""
        plan = self.plan
        if not plan.checkpointing:
            yield "--gradient-checkpointing", {"checkpointing": True}
        if plan.optimizer == "adamw":
            yield "--optimizer adamw_8bit", {"optimizer": "adamw_8bit"}
        if not plan.step_in_backward:
            yield "--step-in-backward", {"step_in_backward": True}
        if self.base.if_nf4 is not None:
            yield "`quantize --format nf4 --nested`", {}
        if plan.rank > 1:
            yield f"--rank {plan.rank // 2}", {"rank": plan.rank // 2}


def room() -> int:
    """Bytes that this process can have: what is free, or less where a control group allows less."""
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return min([free, *(group.limit for group in cgroups.groups())])


def _kept(model: PreTrainedModel, plan: Plan) -> Kept:
    """Of all layers, from those of the first period and of the first two."""
    layers = depth.layers(model)
    total, last = len(layers), min(len(layers), 2 * PERIOD)
    del layers[last:]
    targets = (list(plan.target_modules), plan.target_rank)
    adapted = lora.adapt(model, plan.rank, 2.0 * plan.rank, plan.which, *targets)
    slow = slow_in_torch(torch.empty(0, dtype=model.dtype))
    moelora.enable(adapted, linears=slow or None)
    first = (last + 1) // 2
    seen = {count: _run(adapted, layers, count, plan) for count in {first, last}}

    def of_all(which: int) -> float:
        each = (seen[last][which] - seen[first][which]) / max(last - first, 1)
        return seen[last][which] + each * (total - last)

    layer = (seen[last][1] - seen[first][1]) / (last - first) if last > first else seen[last][1]
    largest = max(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Kept(of_all(0), largest, of_all(1), of_all(2), layer, of_all(3))


def _run(adapted: PeftModel, layers: nn.ModuleList, count: int, plan: Plan) -> tuple[int, int, int, int]:
    """With the first `count` layers: LoRA parameters, bytes kept, bytes kept with checkpointing, and of the
    parameters those that have a rank of their own.
    """
    base = adapted.get_base_model()
    with depth.first(layers, count):
        sizes = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
        own = [f".{module}.lora_" for module in plan.target_modules if plan.target_rank is not None]
        fixed = sum(size for name, size in sizes.items() if any(part in name for part in own))
        kept = _saved(adapted, plan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it has newer names for these
            base.gradient_checkpointing_enable({"use_reentrant": False})
            inputs = _saved(adapted, plan)
            base.gradient_checkpointing_disable()
    return sum(sizes.values()), kept, inputs, fixed


def _mask_without_values(
    batch_size: int, q_length: int, kv_length: int, local_size: int | None = None, **options: Any
) -> Tensor | None:
    """transformers' mask of a batch without padding, where that cannot be asked: none for plain attention."""
    if local_size is None or kv_length < local_size:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, local_size=local_size, **options)


def _without_values(model: PreTrainedModel) -> None:
    """Its attention with the masks that it has on ordinary batches. On tensors without values transformers
    makes one for sequences that may be packed, which has attention keep copies of keys and values.
    """
    own = model.config.get_text_config()._attn_implementation
    if own in ("sdpa", attention.NAME):
        name = f"{own}_without_values"
        AttentionInterface.register(name, AttentionInterface()[own])
        AttentionMaskInterface.register(name, _mask_without_values)
        model.set_attn_implementation(name)


def _saved(adapted: PeftModel, plan: Plan) -> int:
    """Bytes that autograd keeps of a forward pass, on tensors that have no storage. Without the logits."""
    kept: dict[int, int] = {}
    with FakeTensorMode():
        given = {
            name: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad)
            for name, t in [*adapted.named_parameters(), *adapted.named_buffers()]
        }
        own = {t.untyped_storage()._cdata for t in given.values()}
        alive = []  # so that no other storage gets its address

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
                alive.append(tensor)
            return tensor

        ids = torch.zeros(plan.rows, plan.length, dtype=torch.int64)
        inputs = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            functional_call(adapted.train(), given, (), inputs)
    return sum(kept.values())


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
