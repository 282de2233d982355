"""scatter_lora_backward: dX and dA/dB, from one dy·B where no gates stand between them."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..calls import ScatterLoraBackward, ScatterLoraDab, ScatterLoraDx, derive
from .dab import dy_times_b, lora_gradient
from .dx import input_gradient
from .route import routing


def scatter_lora_backward(call: ScatterLoraBackward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dX takes dy·B before the gates, dA after them, each rounded once: with gates these are two products."""
    checks.scatter_lora_backward(call)
    route = routing(call)
    dx = derive(ScatterLoraDx, call, x=call.x if call.with_dgates else None)
    dab = derive(ScatterLoraDab, call)
    dyb = dy_times_b(dab, route) if call.gates is None and route.rows else None
    return *input_gradient(dx, route, dyb), *lora_gradient(dab, route, dyb)
