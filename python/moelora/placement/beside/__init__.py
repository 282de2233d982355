"""Experts in host memory beside an accelerator that has the rest of the model.

`layer` is such a layer's placement and `ways` what it does: the accelerator's experts are launched while a
`worker` computes the CPU's, each a `shares`, and the sums meet on the accelerator. `link` carries rows,
`buffers` has the page-locked memory under them, `order` whatever waits; `resident` brings whole layers over
where that is faster, which `rates` tells; `settling` finds such layers, `hot` keeps some of their experts
over there. Everything by torch.accelerator, torch.Stream and torch.Event.
"""

from moelora.placement.beside.layer import Beside
from moelora.placement.beside.rates import Rates
from moelora.placement.beside.settling import release, settle

__all__ = ["Beside", "Rates", "release", "settle"]
