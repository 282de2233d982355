"""The loss's share of a step on CPUs: log-probabilities of targets under a frozen head.

TRL computes the logits once for the loss and again for its gradient. With a frozen head the gradient's
direction is known as soon as the logits are, so that here they are computed once: two products, not three,
over pieces of the vocabulary with a running maximum, as in FlashAttention (arXiv 2205.14135, algorithm 1)
with the head as keys and values.
"""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from moelora.linears import slow_in_torch

PIECE, ROWS = 4096, 1024  # columns and rows of a tile of logits
# Beside the most likely column's 1. Products of subnormal numbers would take ten times as long and more.
NOTHING = 1e-30
# What some configurations do to logits: TRL's own loss knows all of them.
TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


class Scores(NamedTuple):
    """Of each target, [N]."""

    log_probs: Tensor
    entropy: Tensor  # of the distribution that it is drawn from
    is_top1: Tensor  # no other is as likely, or only later ones are


def scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Scores:
    """What a frozen head says of targets; only log_probs have a gradient, and only for `hidden`.

    The products are in the wider dtype of `hidden` and the weight, or in float32 where torch's are slow in 16
    bits; what they are summed to is in float32 (float64 for such a weight).

    Args:
        hidden: [N, H].
        weight: [V, H], bias: [V] or None; neither is trained.
        targets: [N], int64, each in 0 … V − 1.
    """
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    return Scores(*_Scores.apply(hidden, weight.detach(), bias, targets, wanted))


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, wanted: bool
    ) -> tuple[Tensor, ...]:
        wider = torch.promote_types(hidden.dtype, weight.dtype)
        computed = torch.float32 if slow_in_torch(weight.new_empty(0, dtype=wider)) else wider
        running = _Running(hidden.detach().to(computed), targets, len(weight), wanted)
        for start in range(0, len(weight), PIECE):
            piece = slice(start, start + PIECE)
            columns = weight[piece].to(computed)
            own = None if bias is None else bias[piece].to(computed)
            for first in range(0, len(targets), ROWS):
                running.fold(slice(first, first + ROWS), columns, own, start)
            del columns  # before the next ones are converted
        result, towards = running.result(weight)
        ctx.save_for_backward(towards)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(result.entropy, result.is_top1)
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (towards,) = ctx.saved_tensors
        found = torch.empty_like(towards, dtype=ctx.dtype)
        for first in range(0, len(found), ROWS):
            rows = slice(first, first + ROWS)
            found[rows] = grad[rows, None] * towards[rows]
        return found, None, None, None, None


class _Running:
    """Sums over the columns seen so far, each relative to the highest logit among them, and without the
    target's column: so the gradient of a target that is nearly certain is no difference of equal numbers.
    """

    def __init__(self, hidden: Tensor, targets: Tensor, vocabulary: int, wanted: bool) -> None:
        n, width = hidden.shape
        self.hidden, self.targets = hidden, targets
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        zeros = functools.partial(torch.zeros, dtype=self.dtype)
        self.highest = torch.full((n,), torch.finfo(self.dtype).min, dtype=self.dtype)
        self.target = zeros(n)  # its logit
        self.beaten = torch.zeros(n, dtype=torch.bool)  # by a column before the target's
        self.others = zeros(n)  # Σ exp(z)
        self.mean = zeros(n)  # Σ exp(z) z
        self.pull = zeros(n, width) if wanted else None  # Σ exp(z) W
        tile = (min(n, ROWS), min(vocabulary, PIECE))
        self._logits = torch.empty(tile, dtype=hidden.dtype)
        self._apart, self._shares = (torch.empty(tile, dtype=self.dtype) for _ in range(2))

    def fold(self, rows: slice, columns: Tensor, bias: Tensor | None, start: int) -> None:
        """Adds columns [P, H] of the vocabulary from `start` on, for some of the rows."""
        hidden, targets = self.hidden[rows], self.targets[rows] - start
        logits, apart, shares = (
            t[: len(hidden), : len(columns)] for t in (self._logits, self._apart, self._shares)
        )
        torch.mm(hidden, columns.t(), out=logits)
        if bias is not None:
            logits += bias
        before, others = self.highest[rows], self.others[rows]
        highest = torch.maximum(before, logits.amax(-1))
        apart.copy_(logits).sub_(highest[:, None])  # in one step torch would need one more tile
        functional.threshold_(torch.exp(apart, out=shares), NOTHING, 0.0)
        here = ((targets >= 0) & (targets < len(columns))).nonzero().squeeze(1)
        self._look(rows, here, targets[here], logits, before)
        shares[here, targets[here]] = 0
        kept, down = torch.exp(before - highest), before - highest
        self.mean[rows] = kept * (self.mean[rows] + down * others) + apart.mul_(shares).sum(-1)
        self.others[rows] = kept * others + shares.sum(-1)
        self.highest[rows] = highest
        if self.pull is not None:
            pull = self.pull[rows].mul_(kept[:, None])
            if shares.dtype == columns.dtype:
                pull.addmm_(shares, columns)
            else:
                pull += torch.mm(logits.copy_(shares), columns)

    def _look(self, rows: slice, here: Tensor, column: Tensor, logits: Tensor, before: Tensor) -> None:
        """At the targets that are among these columns: the rows `here` of the tile."""
        own = logits[here]
        target = own.gather(1, column[:, None])
        earlier = torch.arange(own.shape[1]) < column[:, None]
        beaten = ((own >= target) & earlier).any(-1) | (before[here] >= target.squeeze(1))
        self.target[rows][here] = target.squeeze(1).to(self.dtype)
        self.beaten[rows][here] = beaten

    def result(self, weight: Tensor) -> tuple[Scores, Tensor | None]:
        """And the gradient of each log-probability towards its row of `hidden`, [N, H]."""
        down = self.target - self.highest
        own = torch.exp(down)
        total = self.others + own
        spread = total.log()
        entropy = spread - (self.mean + own * down) / total
        top = (self.target >= self.highest) & ~self.beaten
        towards = None
        if self.pull is not None:
            # W_t − Σ p W = (1 − p_t) W_t − Σ over the others
            towards = self.pull.neg_()
            for first in range(0, len(towards), ROWS):
                rows = slice(first, first + ROWS)
                towards[rows] += self.others[rows, None] * weight[self.targets[rows]].to(self.dtype)
            towards /= total[:, None]
        return Scores(down - spread, entropy, top), towards


def memory(tokens: int, weight: Tensor) -> int:
    """Bytes that `scores` or its backward takes at its peak beside its arguments, and without what it keeps
    for few of the rows at a time.

    tokens: N. weight: as for `scores`, or one on the meta device that stands for one of the CPU's; `hidden`
        has its dtype.
    """
    slow = slow_in_torch(torch.empty(0, dtype=weight.dtype))
    vocabulary, width = weight.shape
    columns, itemsize = min(vocabulary, PIECE), 4 if slow else weight.itemsize
    tiles = min(tokens, ROWS) * columns * (itemsize + 2 * 4)
    converted = (tokens + columns) * width * 4 if slow else 0
    return tokens * width * 4 + max(tiles + converted, tokens * width * weight.itemsize)


def fits(model: PreTrainedModel) -> bool:
    """Whether a model's head is one for `scores`: frozen, on the CPU, and what it gives are the logits."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    plain = all(getattr(config, name, None) is None for name in TRANSFORMS)
    frozen = not any(p.requires_grad for p in head.parameters())
    return plain and frozen and head.weight.device.type in ("cpu", "meta")


def use(model: PreTrainedModel) -> None:
    """Lets a model that TRL's `add_fused_lm_head` has prepared score targets by `scores`, where it `fits`.

    TRL's own way remains for calls that want the losses of routers too, or have labels that are shifted.
    """
    if not fits(model):
        return
    theirs = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        routers = kwargs.get("output_router_logits") or getattr(
            self.config.get_text_config(), "output_router_logits", False
        )
        shifted = kwargs.get("shift_labels") is not None or "labels" not in kwargs
        if not fused_lm_head or routers or shifted:
            return theirs(*args, fused_lm_head=fused_lm_head, **kwargs)
        return _scored(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def _scored(
    model: PreTrainedModel, *args: Any, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any
) -> FusedCausalLMOutput:
    """As TRL's forward with `fused_lm_head=True`, for labels that are not shifted yet."""
    head = model.get_output_embeddings()
    states = model.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state[:, :-1]
    # With parts of the model on several devices, not all end where the head is.
    states, labels = states.to(head.weight.device), labels[:, 1:].to(head.weight.device)
    mask = labels != -100
    found = scores(states[mask], head.weight, head.bias, labels[mask])
    # Scattered, a batch without a label still has a gradient: zero.
    log_probs, entropy, is_top1 = (t.new_zeros(mask.shape).masked_scatter(mask, t) for t in found)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / count,
        log_probs=log_probs,
        entropy=entropy,
        is_top1=is_top1,
        label_mask=mask,
    )
