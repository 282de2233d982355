"""Which experts classes the installed transformers has, and how the operators serve each of them.

Classes are found by introspection and judged by building a small module of each: the support matrix of
docs/models.md and the tests that compare every class with transformers' own experts come from here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations import moe

from moelora.errors import MoeloraError
from moelora.experts import Binding, bind, projections

# Sizes that all differ, under every name that configurations have for them.
EXPERTS, HIDDEN, INNER = 5, 24, 20
_SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INNER),
}


class Row(NamedTuple):
    """One experts class in the support matrix."""

    name: str
    model: str  # the folder in transformers/models
    weights: str
    activation: str
    path: str


def classes() -> list[type[nn.Module]]:
    """Every experts class of the installed transformers that follows its experts interface, by name."""
    found = []
    for path in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        if moe.use_experts_implementation.__name__ in path.read_text(encoding="utf-8"):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            found += [cls for cls in vars(module).values() if _decorated(cls, module.__name__)]
    return sorted(found, key=lambda cls: cls.__name__)


def _decorated(cls: Any, module: str) -> bool:
    """Whether `cls` is defined in `module` and its forward is the interface's dispatching one."""
    if not inspect.isclass(cls) or cls.__module__ != module or not issubclass(cls, nn.Module):
        return False
    code = getattr(cls.forward, "__code__", None)
    return code is not None and code.co_filename == moe.__file__


def build(cls: type[nn.Module]) -> nn.Module:
    """A small module of an experts class, on transformers' eager path; its weights are uninitialised.

    Raises: MoeloraError if none of the configurations beside the class can build it.
    """
    problem: Exception | None = None
    # A class with experts of several sizes is told which.
    arguments = {"intermediate_size": INNER} if _takes_size(cls) else {}
    for config in _configurations(cls):
        try:
            module = cls(config, **arguments)
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # another part's configuration
            problem = problem or error
            continue
        config._experts_implementation_internal = "eager"
        return module
    raise MoeloraError(f"no configuration of {cls.__module__} builds {cls.__name__}: {problem}")


def _takes_size(cls: type[nn.Module]) -> bool:
    return "intermediate_size" in inspect.signature(cls.__init__.__wrapped__).parameters


def _configurations(cls: type[nn.Module]) -> Iterator[PreTrainedConfig]:
    """Small configurations of the class's modelling file, the text model's first."""
    there = vars(importlib.import_module(cls.__module__)).values()
    kinds = [kind for kind in there if inspect.isclass(kind) and issubclass(kind, PreTrainedConfig)]
    for kind in sorted(kinds, key=lambda kind: ("Text" not in kind.__name__, kind.__name__)):
        config = kind()
        for name in _SIZES.keys() & vars(config).keys():
            # A list has one size for each modality; the first is the text's.
            value = [_SIZES[name]] * len(old) if isinstance(old := vars(config)[name], list) else _SIZES[name]
            setattr(config, name, value)
        yield config.get_text_config()


def matrix() -> list[Row]:
    """The support matrix, a row for each class."""
    rows = []
    for cls in classes():
        module = build(cls)
        binding = bind(module)
        rows.append(
            Row(
                cls.__name__,
                cls.__module__.split(".")[-2],
                weights(module),
                activation(module, binding),
                "transformers: " + binding.reason if binding.reason else "operators",
            )
        )
    return rows


def weights(module: nn.Module) -> str:
    """The layout of the projections, in words."""
    order = "[E, in, out]" if module.is_transposed else "[E, out, in]"
    first = projections(module)[0]
    return f"{first} {order}" + (", biases" if module.has_bias else "")


def activation(module: nn.Module, binding: Binding) -> str:
    """What happens between the projections, in words."""
    found = binding.activation
    words = []
    if not module.has_gate:
        words.append(f"{type(module.act_fn).__name__}, no gate")
    elif "activation" in found:
        words.append("the module's own gate")
    elif found:
        names = {"silu": "SwiGLU", "gelu": "GEGLU", "gelu_tanh": "GEGLU (tanh)"}
        words.append(names[found["act"]])
        words += [f"slope {found['alpha']:.4g}"] if found["alpha"] != 1 else []
        words += [f"clamp {found['limit']:g}"] if found["limit"] is not None else []
        words += [f"up + {found['up_shift']:g}"] if found["up_shift"] else []
        words += ["interleaved"] if found["interleaved"] else []
    words += ["a norm after each expert"] if getattr(module, "has_post_expert_norm", False) else []
    return ", ".join(words)
