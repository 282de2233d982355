"""The contestants, one module each. A module is imported only when its contestant is asked for."""

from __future__ import annotations

from importlib import import_module

from .base import Contestant

MODULES = {
    "ours": "ours",
    "ours-compiled": "ours",
    "ours-batch-invariant": "ours",
    "loop": "loop",
    "loop-fp32": "in_fp32",
    "peft": "transformers_peft",
    "peft-fp32": "in_fp32",
    "kt-kernel": "kt_kernel",
    "kt-kernel-mxfp4": "kt_kernel",
    "grouped-mm": "grouped_mm",
    "grouped-mm-fp32": "in_fp32",
    "scattermoe": "scattermoe_lora",
}
DEFAULT = {
    "cpu": ("ours", "loop", "peft", "kt-kernel"),
    "cuda": ("ours", "peft", "grouped-mm", "scattermoe"),
}


def find_contestant(name: str) -> Contestant:
    """One of MODULES, or one of packed weights (`quantised.contestants_of`)."""
    if name not in MODULES:
        return import_module(".quantised", __name__).find(name)
    module = import_module(f".{MODULES[name]}", __name__)
    return module.CONTESTANTS[name]
