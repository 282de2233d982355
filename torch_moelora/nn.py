"""The experts of a mixture-of-experts layer with LoRA, as a plain module."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import functional

PROJECTIONS = ("gate_up", "down")


def _checked_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"LoRAExperts: {name} must be an integer of at least 1, got {size!r}")


class LoRAExperts(nn.Module):
    """E experts, each down(activation(gate_up(x))), with frozen weights and trainable LoRA on either
    projection or both.

    The weights and biases do not require gradients; `requires_grad_` on them makes them trainable, with their
    true gradients. LoRA's A starts uniform in ±1/√in_features (the kaiming-uniform of nn.Linear) and B at
    zero, so that a fresh adapter changes nothing.

    Args:
        num_experts, hidden_size, intermediate_size: E, H, I.
        rank: R ≥ 1.
        alpha: the LoRA term is scaled by alpha / rank, or alpha / √rank if `use_rslora`.
        target: which projections carry LoRA: "gate_up", "down" or both.
        gated, act, act_alpha, limit, up_shift, interleaved, activation: the activation, as in
            `functional.moe_mlp`.
        bias: whether the projections have biases.
        dtype, device: those of weights and biases. lora_dtype: that of A and B; float32 unless the weights
            are float64.

    Raises:
        ValueError: a size that is not a positive integer, an alpha that is not finite, an unknown target.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        use_rslora: bool = False,
        target: tuple[str, ...] = PROJECTIONS,
        gated: bool = True,
        act: str = "silu",
        act_alpha: float = 1.0,
        limit: float | None = None,
        up_shift: float = 0.0,
        interleaved: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checked_sizes(
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            rank=rank,
        )
        target = (target,) if isinstance(target, str) else tuple(target)
        if not target or any(name not in PROJECTIONS for name in target):
            raise ValueError(f"LoRAExperts: target must name some of {PROJECTIONS}, got {target}")
        if not math.isfinite(alpha):
            raise ValueError(f"LoRAExperts: alpha must be finite, got {alpha}")
        self.num_experts, self.hidden_size, self.intermediate_size = (
            num_experts,
            hidden_size,
            intermediate_size,
        )
        self.rank, self.alpha, self.use_rslora, self.target = rank, alpha, use_rslora, target
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.options = {
            "gated": gated,
            "act": act,
            "alpha": act_alpha,
            "limit": limit,
            "up_shift": up_shift,
            "interleaved": interleaved,
            "activation": activation,
        }
        up = intermediate_size * (2 if gated else 1)
        for name, shape in (
            ("gate_up", (num_experts, up, hidden_size)),
            ("down", (num_experts, hidden_size, intermediate_size)),
        ):
            self._add_projection(name, shape, bias, device, dtype, lora_dtype)
        self.reset_parameters()

    def _add_projection(self, name, shape, bias, device, dtype, lora_dtype) -> None:
        """Registers {name}_weight, _bias, _lora_a and _lora_b; None where absent."""
        experts, n, k = shape
        weight = torch.empty(shape, device=device, dtype=dtype)
        self.register_parameter(f"{name}_weight", nn.Parameter(weight, requires_grad=False))
        b = nn.Parameter(weight.new_empty(experts, n), requires_grad=False) if bias else None
        self.register_parameter(f"{name}_bias", b)
        if lora_dtype is None:
            lora_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        present = name in self.target
        for suffix, lora_shape in (("lora_a", (experts, self.rank, k)), ("lora_b", (experts, n, self.rank))):
            lora = nn.Parameter(weight.new_empty(lora_shape, dtype=lora_dtype)) if present else None
            self.register_parameter(f"{name}_{suffix}", lora)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform ±1/√in_features for weights, biases and A; zeros for B."""
        for name in PROJECTIONS:
            weight = getattr(self, f"{name}_weight")
            bound = 1 / math.sqrt(weight.shape[2])
            for suffix in ("weight", "bias", "lora_a"):
                parameter = getattr(self, f"{name}_{suffix}")
                if parameter is not None:
                    parameter.uniform_(-bound, bound)
        self.reset_lora_b()

    @torch.no_grad()
    def reset_lora_b(self) -> None:
        """B back to zero: the adapter changes nothing."""
        for name in self.target:
            getattr(self, f"{name}_lora_b").zero_()

    def forward(self, x: Tensor, expert_idxs: Tensor, gates: Tensor) -> Tensor:
        """x [T, H], expert_idxs [T, top_k] int32/int64, gates [T, top_k] → [T, H]. Errors:
        `functional.moe_mlp`.
        """
        return functional.moe_mlp(
            x,
            expert_idxs,
            gates,
            self.gate_up_weight,
            self.down_weight,
            gate_up_lora_a=self.gate_up_lora_a,
            gate_up_lora_b=self.gate_up_lora_b,
            gate_up_scaling=self.scaling,
            down_lora_a=self.down_lora_a,
            down_lora_b=self.down_lora_b,
            down_scaling=self.scaling,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            **self.options,
        )

    @torch.no_grad()
    def merged_weights(self) -> tuple[Tensor, Tensor]:
        """New (gate_up [E, 2I, H], down [E, H, I]) with scaling·B·A added, in the weights' dtype; one
        rounding.

        Works expert by expert: beyond the results it needs memory for one expert.
        """
        merged = []
        for name in PROJECTIONS:
            weight = getattr(self, f"{name}_weight").clone()
            a, b = getattr(self, f"{name}_lora_a"), getattr(self, f"{name}_lora_b")
            if a is not None:
                wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
                for e in range(self.num_experts):
                    delta = self.scaling * (b[e].to(wide) @ a[e].to(wide))
                    weight[e] = weight[e].to(wide) + delta
            merged.append(weight)
        return tuple(merged)

    def extra_repr(self) -> str:
        act = self.options["activation"] or self.options["act"]
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, rank={self.rank}, alpha={self.alpha:g}, "
            f"target={self.target}, gated={self.options['gated']}, act={act}, "
            f"dtype={self.gate_up_weight.dtype}"
        )
