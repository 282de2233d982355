"""scatter_lora_backward: dX and dA/dB, from one dy·B where no gates stand between them."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from .dab import dy_times_b, lora_gradient
from .dx import input_gradient
from .route import routing


def scatter_lora_backward(
    dy, x, weight, sorted_scattered_idxs, expert_offsets, top_k, lora_a, lora_b, scaling=1.0, bias=None,
    gates=None, x_grouped=False, y_grouped=False, with_dgates=True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dX takes dy·B before the gates, dA after them, each rounded once: with gates these are two products."""
    checks.scatter_lora_backward(
        dy, x, weight, sorted_scattered_idxs, expert_offsets, top_k, lora_a, lora_b, scaling, bias, gates,
        x_grouped, y_grouped,
    )  # fmt: skip
    route = routing(sorted_scattered_idxs, expert_offsets, top_k)
    lora, orders = (lora_a, lora_b, scaling), (x_grouped, y_grouped)
    dyb = None
    if gates is None and route.rows:
        dyb = dy_times_b(dy, route, lora_b, scaling, None, y_grouped)
    gated_x = x if with_dgates else None
    dx, dgates = input_gradient(dy, weight, route, *lora, bias, gates, gated_x, *orders, dyb)
    return dx, dgates, *lora_gradient(dy, x, route, *lora, gates, *orders, dyb)
