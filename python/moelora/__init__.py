"""LoRA fine-tuning of mixture-of-experts models on the torch_moelora operators.

`moelora.enable(model)` puts a transformers model, with PEFT adapters or without, on the operators and
reports what it did; `moelora.disable(model)` undoes it; `moelora.report(model)` tells the present state.
`moelora.from_pretrained(directory)` loads a checkpoint whose experts are packed and keeps them so; importing
moelora makes our own packed layout known to transformers.
`moelora.check_adapter(model, directory)` tells whether an adapter that was loaded fits the model.
`moelora.place(model)` spreads the experts over the ranks of torch.distributed, and
`moelora.local_parameters(model)` are what each of them has of its own.
`moelora.Callback()` does it in trainers that others build.
`python -m moelora` is the command line.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

__all__ = [
    "Callback",
    "MoeloraError",
    "Report",
    "check_adapter",
    "disable",
    "enable",
    "from_pretrained",
    "local_parameters",
    "place",
    "register",
    "report",
]

_HOMES = {
    "Callback": "moelora.callback",
    "MoeloraError": "moelora.errors",
    "Report": "moelora.reporting",
    "check_adapter": "moelora.adapter_files",
    "disable": "moelora.attach",
    "enable": "moelora.attach",
    "from_pretrained": "moelora.loading",
    "local_parameters": "moelora.placement",
    "place": "moelora.placement",
    "register": "moelora.experts",
    "report": "moelora.attach",
}


def __getattr__(name: str) -> object:
    # transformers and peft take seconds to import, which `python -m moelora --help` need not wait for.
    if name not in _HOMES:
        raise AttributeError(f"module 'moelora' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


_TABLE = "transformers.quantizers.auto"  # of quantisers, ours among them once it is imported


class _Registration(MetaPathFinder):
    """Registers our quantiser when transformers' table of them is imported, and costs nothing before."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        run = spec.loader.exec_module

        def run_and_register(module: object) -> None:
            run(module)
            sys.modules.setdefault(name, module)
            import_module("moelora.quantizer")

        spec.loader.exec_module = run_and_register
        return spec


if _TABLE in sys.modules:
    import_module("moelora.quantizer")
else:
    sys.meta_path.insert(0, _Registration())
