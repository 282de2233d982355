"""LoRA fine-tuning of mixture-of-experts models on the torch_moelora operators.

`moelora.enable(model)` puts a transformers model, with PEFT adapters or without, on the operators and
reports what it did; `moelora.disable(model)` undoes it; `moelora.report(model)` tells the present state.
`moelora.check_adapter(model, directory)` tells whether an adapter that was loaded fits the model.
`moelora.Callback()` does it in trainers that others build.
`python -m moelora` is the command line.
"""

__all__ = [
    "Callback",
    "MoeloraError",
    "Report",
    "check_adapter",
    "disable",
    "enable",
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
    "register": "moelora.experts",
    "report": "moelora.attach",
}


def __getattr__(name: str) -> object:
    # transformers and peft take seconds to import, which `python -m moelora --help` need not wait for.
    if name not in _HOMES:
        raise AttributeError(f"module 'moelora' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
