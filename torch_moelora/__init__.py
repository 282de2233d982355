"""LoRA on mixture-of-experts weights as PyTorch operators: `torch.ops.moelora.*` on CPU and CUDA.

`torch_moelora.functional` is the public API, `torch_moelora.nn.LoRAExperts` a module on top, `info()` says
what this machine can run. `python -m torch_moelora` prints it.
"""

import torch as _torch

from . import autocast as _autocast
from . import autograd as _autograd
from . import backends as _backends
from . import fake as _fake
from .schemas import NAMESPACE as _NAMESPACE
from .schemas import SCHEMAS as _SCHEMAS
from .switches import SWITCHES as _SWITCHES

# Kept for the life of the process: the registrations go away with it.
_LIBRARY = _torch.library.Library(_NAMESPACE, "DEF")
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
_backends.register(_LIBRARY)
_fake.register(_LIBRARY)
_autograd.register(_LIBRARY)
_autocast.register(_LIBRARY)

from . import formats, functional, nn  # noqa: E402
from .batch_invariance import is_batch_invariant, set_batch_invariant  # noqa: E402
from .functional import flatten_sort_count, glu, moe_mlp, scatter_lora  # noqa: E402
from .report import info, version  # noqa: E402

if _SWITCHES.batch_invariant:
    set_batch_invariant(True)

__version__ = version()
__all__ = [
    "flatten_sort_count",
    "formats",
    "functional",
    "glu",
    "info",
    "is_batch_invariant",
    "moe_mlp",
    "nn",
    "scatter_lora",
    "set_batch_invariant",
]
