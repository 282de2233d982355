"""The gate before any timing: a contestant's results beside torch_moelora.reference."""

from __future__ import annotations

import torch

from .layer import SCALING, Batch, Layer
from .peers.base import Results

# Relative error of each result in the Frobenius norm. Contestants round to their dtype several times on the
# way, and PEFT rounds W + s·B·A; a wrong gradient is off by about 1.
TOLERANCE = {"bf16": 3e-2, "fp16": 4e-3, "fp32": 2e-5}


@torch.no_grad()
def expected(layer: Layer, batch: Batch) -> Results:
    """The whole layer, from the reference operators: in fp64 for fp32 layers, else in fp32."""
    from torch_moelora import reference as ref

    dtype = torch.float64 if batch.x.dtype == torch.float32 else torch.float32
    shape, lora, glu = layer.shape, layer.lora, layer.shape.glu
    route = (*ref.flatten_sort_count(batch.expert_idxs, shape.experts), shape.top_k)
    up, down = (
        {"lora_a": lora[f"{name}_lora_a"], "lora_b": lora[f"{name}_lora_b"], "scaling": SCALING}
        for name in ("gate_up", "down")
    )
    w, bias, gates = layer.weights, layer.biases, batch.gates
    x_g = {"x_grouped": True, "gates": gates, "dtype": dtype}
    y_g = {"y_grouped": True, "dtype": dtype}
    h = ref.scatter_lora(batch.x, w["gate_up"], *route, **up, bias=bias["gate_up"], **y_g)
    inner = ref.glu(h, **glu, dtype=dtype)
    y = ref.scatter_lora(inner, w["down"], *route, **down, bias=bias["down"], **x_g)
    dinner, dgates = ref.scatter_lora_dx(
        batch.dy, w["down"], *route, **down, bias=bias["down"], x=inner, **x_g
    )
    ddown = ref.scatter_lora_dab(batch.dy, inner, *route, **down, **x_g)
    dh = ref.glu_backward(dinner, h, **glu, dtype=dtype)
    dx, _ = ref.scatter_lora_dx(dh, w["gate_up"], *route, **up, **y_g)
    dup = ref.scatter_lora_dab(dh, batch.x, *route, **up, **y_g)
    grads = ("dgate_up_lora_a", "dgate_up_lora_b", "ddown_lora_a", "ddown_lora_b")
    return {"y": y, "dx": dx, "dgates": dgates, **dict(zip(grads, (*dup, *ddown), strict=True))}


@torch.no_grad()
def errors(got: Results, want: Results) -> dict[str, float]:
    """‖got - want‖ / ‖want‖ of each result; infinite where a value is not finite or a shape is wrong."""
    out = {}
    for name, value in want.items():
        if got[name].shape != value.shape or not bool(torch.isfinite(got[name]).all()):
            out[name] = float("inf")
            continue
        exact = value.double()
        difference = got[name].to(value.device).double() - exact
        out[name] = float(difference.norm() / exact.norm())
    return out
