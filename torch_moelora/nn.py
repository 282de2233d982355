"""The experts of a mixture-of-experts layer with LoRA, as a plain module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import functional
from .formats import PackedWeight

PROJECTIONS = ("gate_up", "down")


def _checked_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"LoRAExperts: {name} must be an integer of at least 1, got {size!r}")


class FrozenWeight(nn.Module):
    """A packed weight as a module: its tensors are buffers `codes`, `scale`, `scale2` and `zero`, those that
    it has, and in a state dict `kind` says, in bytes, the format and whether it is transposed. Moves between
    devices with its module; `.to(dtype)` and the like leave it as it is.
    """

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        packed = packed.checked("FrozenWeight")
        self.format, self.transposed = packed.format, packed.transposed
        for name in ("codes", "scale", "scale2", "zero"):
            self.register_buffer(name, getattr(packed, name))

    @property
    def packed(self) -> PackedWeight:
        """The weight, on the buffers' own memory."""
        return PackedWeight(self.codes, self.scale, self.scale2, self.zero, self.format, self.transposed)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        return self.packed.shape

    def _apply(self, fn, recurse=True):
        """Devices, not dtypes: scales in another dtype would be another weight."""
        for name, t in list(self._buffers.items()):
            if t is not None:
                moved = fn(t)
                self._buffers[name] = moved if moved.dtype == t.dtype else t.to(moved.device)
        return self

    def _kind(self) -> Tensor:
        words = self.format + (" transposed" if self.transposed else "")
        return torch.tensor(list(words.encode()), dtype=torch.uint8)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "kind"] = self._kind()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Another format of the same shapes is refused, and so is another dtype, which copying would
        round.
        """
        kind = state_dict.get(prefix + "kind")
        if kind is None:
            missing_keys.append(prefix + "kind")
        elif not torch.equal(kind.cpu(), self._kind()):
            came = bytes(kind.tolist()).decode(errors="replace")
            own = bytes(self._kind().tolist()).decode()
            error_msgs.append(f"{prefix}kind must be {own}, got {came}")
            return
        for name, own in self._buffers.items():
            t = state_dict.get(prefix + name)
            if own is not None and t is not None and t.dtype != own.dtype:
                error_msgs.append(f"{prefix}{name} must have dtype {own.dtype}, got {t.dtype}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "kind" in unexpected_keys:
            unexpected_keys.remove(prefix + "kind")

    def extra_repr(self) -> str:
        turned = ", transposed" if self.transposed else ""
        return f"{list(self.shape)}, format={self.format}{turned}, {self.packed.nbytes} bytes"


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
        gate_up_weight, down_weight: weights to take, [E, 2I, H] ([E, I, H] if not `gated`) and [E, H, I],
            instead of random ones: tensors, used as they are, or `formats.PackedWeight`s, which stay frozen
            and are then a `FrozenWeight`. A PackedWeight may also be assigned to them later.
        dtype, device: those of weights and biases. lora_dtype: that of A and B; float32 unless the weights
            are float64.

    Raises:
        ValueError: a size that is not a positive integer, an alpha that is not finite, an unknown target, a
            weight of another shape.
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
        gate_up_weight: Tensor | PackedWeight | None = None,
        down_weight: Tensor | PackedWeight | None = None,
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
        given = {"gate_up": gate_up_weight, "down": down_weight}
        for name, shape in (
            ("gate_up", (num_experts, up, hidden_size)),
            ("down", (num_experts, hidden_size, intermediate_size)),
        ):
            self._add_projection(name, shape, given[name], bias, device, dtype, lora_dtype)
        self._reset([name for name in PROJECTIONS if given[name] is None])

    def _add_projection(self, name, shape, given, bias, device, dtype, lora_dtype) -> None:
        """Registers {name}_weight, _bias, _lora_a and _lora_b; None where absent."""
        experts, n, k = shape
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"LoRAExperts: {name}_weight must have shape {shape}, got {tuple(given.shape)}")
        if given is not None and device is not None and given.device.type != torch.device(device).type:
            raise ValueError(
                f"LoRAExperts: {name}_weight is on {given.device}, expected it on device={device}"
            )
        if isinstance(given, PackedWeight):
            setattr(self, f"{name}_weight", given)
            example = torch.empty(0, device=device or given.device, dtype=dtype)
        else:
            weight = torch.empty(shape, device=device, dtype=dtype) if given is None else given
            self.register_parameter(f"{name}_weight", nn.Parameter(weight, requires_grad=False))
            example = weight
        b = nn.Parameter(example.new_empty(experts, n), requires_grad=False) if bias else None
        self.register_parameter(f"{name}_bias", b)
        if lora_dtype is None:
            lora_dtype = torch.float64 if example.dtype == torch.float64 else torch.float32
        present = name in self.target
        for suffix, lora_shape in (("lora_a", (experts, self.rank, k)), ("lora_b", (experts, n, self.rank))):
            lora = nn.Parameter(example.new_empty(lora_shape, dtype=lora_dtype)) if present else None
            self.register_parameter(f"{name}_{suffix}", lora)

    def __setattr__(self, name: str, value) -> None:
        if isinstance(value, PackedWeight):
            value = FrozenWeight(value)
            self._parameters.pop(name, None)
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Uniform ±1/√in_features for weights, biases and A; zeros for B. Packed weights stay as they are."""
        self._reset(PROJECTIONS)

    @torch.no_grad()
    def _reset(self, weights: Sequence[str]) -> None:
        """`reset_parameters`, of the weights only for those projections."""
        for name in PROJECTIONS:
            weight = getattr(self, f"{name}_weight")
            bound = 1 / math.sqrt(weight.shape[2])
            drawn = name in weights and not isinstance(weight, FrozenWeight)
            for suffix in ("weight", "bias", "lora_a") if drawn else ("bias", "lora_a"):
                parameter = getattr(self, f"{name}_{suffix}")
                if parameter is not None:
                    parameter.uniform_(-bound, bound)
        self.reset_lora_b()

    @torch.no_grad()
    def reset_lora_b(self) -> None:
        """B back to zero: the adapter changes nothing."""
        for name in self.target:
            getattr(self, f"{name}_lora_b").zero_()

    def _weight(self, name: str) -> Tensor | PackedWeight:
        weight = getattr(self, f"{name}_weight")
        return weight.packed if isinstance(weight, FrozenWeight) else weight

    def forward(self, x: Tensor, expert_idxs: Tensor, gates: Tensor) -> Tensor:
        """x [T, H], expert_idxs [T, top_k] int32/int64, gates [T, top_k] → [T, H]. Errors:
        `functional.moe_mlp`.
        """
        return functional.moe_mlp(
            x,
            expert_idxs,
            gates,
            self._weight("gate_up"),
            self._weight("down"),
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
    def merged_weights(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """New (gate_up [E, 2I, H], down [E, H, I]) with scaling·B·A added; one rounding, to `dtype`, or if
        that is None to the weight's own, of a packed one float32.

        Works expert by expert: beyond the results it needs memory for a few copies of one expert.
        """
        merged = []
        for name in PROJECTIONS:
            weight = self._weight(name)
            packed = isinstance(weight, PackedWeight)
            own = torch.float32 if packed else weight.dtype
            wide = torch.float64 if own == torch.float64 else torch.float32
            a, b = getattr(self, f"{name}_lora_a"), getattr(self, f"{name}_lora_b")
            out = torch.empty(tuple(weight.shape), dtype=dtype or own, device=weight.device)
            for e, base in enumerate(weight.each_in_float32() if packed else weight):
                base = base.to(wide)
                out[e] = base if a is None else base + self.scaling * (b[e].to(wide) @ a[e].to(wide))
            merged.append(out)
        return tuple(merged)

    def _kind(self, name: str) -> str:
        weight = self._weight(name)
        return weight.format if isinstance(weight, PackedWeight) else str(weight.dtype)

    def extra_repr(self) -> str:
        act = self.options["activation"] or self.options["act"]
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, rank={self.rank}, alpha={self.alpha:g}, "
            f"target={self.target}, gated={self.options['gated']}, act={act}, "
            f"weights={self._kind('gate_up')}, {self._kind('down')}"
        )
