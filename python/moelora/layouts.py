"""The table of packed checkpoints: how each is recognised, and what its tensors are called.

A weight `NAME` of a checkpoint exists as several tensors, `NAME` and an ending each. `weights` finds them by
their names alone; `Layout.matrix` makes a PackedWeight of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moelora import matrices, packed_layout
from moelora.errors import MoeloraError, one_line
from moelora.matrices import Parts, checked, need
from moelora.packed_layout import METHOD, PARTS
from torch_moelora.formats import PackedWeight


def _ours(name: str, parts: Parts, settings: dict) -> PackedWeight:
    layout = packed_layout.read(settings)
    # Experts have the parameter's own name, linear layers `.weight`.
    choice = layout.choice(name, not name.endswith(".weight"))
    if choice is None:
        raise MoeloraError(
            f"{name} is packed, and config.json has no format for it in {packed_layout.SECTION}"
        )
    need(name, parts, "codes", "scale")
    return checked(name, packed_layout.packed(choice, parts))


@dataclass(frozen=True)
class Layout:
    """One way to store packed weights.

    endings: what follows a weight's name, and the part that it is, as `matrix` knows it.
    stacked: the file has all experts of a layer in one weight, named as the module's parameter.
    weight: what ends the dense weight's name where the packed one has no such name of its own.
    plain: the part that dense weights have, too. With no other part and of floats it is a dense one.
    """

    name: str
    endings: dict[str, str]
    matrix: Callable[[str, Parts, dict], PackedWeight]
    stacked: bool = False
    weight: str = ""
    plain: str | None = None


def _beside(*parts: str) -> dict[str, str]:
    return {f".{part}": part for part in parts}


_BNB_STATE = "weight.quant_state.bitsandbytes__"
OURS = Layout("moelora", _beside(*PARTS), _ours, stacked=True)
LAYOUTS = {
    METHOD: OURS,
    "mxfp4": Layout(
        "gpt-oss MXFP4", {"_blocks": "_blocks", "_scales": "_scales"}, matrices.gpt_oss, stacked=True
    ),
    "fp8": Layout(
        "FP8",
        _beside(
            "weight", "weight_scale_inv", "weight_scale", "scale", "activation_scale", "input_scale",
        ),
        matrices.fp8, weight=".weight", plain="weight",
    ),
    "compressed-tensors": Layout(
        "compressed-tensors",
        _beside(
            "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
            "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale",
        ),
        matrices.compressed_tensors, weight=".weight", plain="weight",
    ),
    "modelopt": Layout(
        "ModelOpt", _beside("weight", "weight_scale", "weight_scale_2", "input_scale"), matrices.modelopt,
        weight=".weight", plain="weight",
    ),
    "bitsandbytes": Layout(
        "bitsandbytes",
        _beside(
            "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
            _BNB_STATE + "nf4", _BNB_STATE + "fp4",
        ),
        matrices.bitsandbytes, weight=".weight", plain="weight",
    ),
    "gptq": Layout("GPTQ", _beside("qweight", "qzeros", "scales", "g_idx"), matrices.gptq, weight=".weight"),
    "awq": Layout("AWQ", _beside("qweight", "qzeros", "scales"), matrices.awq, weight=".weight"),
}  # fmt: skip


def recognise(settings: dict[str, Any]) -> Layout:
    """The layout of a checkpoint whose "quantization_config" is `settings`.

    Raises: MoeloraError for one that is not read, with the way out.
    """
    method = str(settings.get("quant_method") or "").lower()
    if not method and "quant_algo" in settings:
        method = "modelopt"
    if method not in LAYOUTS:
        raise MoeloraError(
            f"the checkpoint is quantised by {method or 'an unnamed method'}, expected one of "
            f"{', '.join(LAYOUTS)}: {matrices.OTHER_WAY}"
        )
    bits = settings.get("bits", 4)
    if method in ("gptq", "awq") and bits != 4:
        raise MoeloraError(
            f"the checkpoint is {LAYOUTS[method].name} with {bits} bits, expected 4: {matrices.OTHER_WAY}"
        )
    if method == "awq" and str(settings.get("version") or "gemm").lower() != "gemm":
        raise MoeloraError(
            f"the checkpoint is AWQ in the version {settings['version']}, expected gemm: {matrices.OTHER_WAY}"
        )
    if method == "bitsandbytes" and not settings.get("load_in_4bit", settings.get("_load_in_4bit")):
        raise MoeloraError(f"the checkpoint is bitsandbytes' with 8 bits, expected 4: {matrices.OTHER_WAY}")
    return LAYOUTS[method]


class Files:
    """The tensors of safetensors files, mapped: a tensor's memory is the file's until it is written to."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        """Raises: MoeloraError for a file that cannot be read."""
        self.paths = [Path(path) for path in paths]
        self._where: dict[str, Any] = {}
        for path in self.paths:
            try:
                opened = safe_open(path, framework="pt")
                names = list(opened.keys())
            except (SafetensorError, OSError) as error:
                raise MoeloraError(f"cannot read {path}: {one_line(error)}") from None
            self._where |= dict.fromkeys(names, opened)

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)

    def part(self, name: str, index: int) -> Tensor:
        """One of a tensor's first dimension; no other is read."""
        return self._where[name].get_slice(name)[index : index + 1][0]

    def metadata(self, path: Path) -> dict[str, str]:
        """What the file says of itself."""
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}

    def dtype(self, name: str) -> str:
        """As the header names it."""
        return self._where[name].get_slice(name).get_dtype()


@dataclass(frozen=True)
class Source:
    """The tensors of one packed weight in files, by the parts that they are."""

    name: str  # the dense weight's name in the checkpoint
    tensors: dict[str, str]

    def parts(self, files: Files) -> Parts:
        return {part: files[tensor] for part, tensor in self.tensors.items()}


_FLOATS = ("F16", "BF16", "F32", "F64")


def sources(files: Files, layout: Layout) -> list[Source]:
    """Every packed weight of a checkpoint; dense ones are left out."""
    found: dict[str, dict[str, str]] = {}
    endings = sorted(layout.endings.items(), key=lambda item: -len(item[0]))
    for tensor in files.names:
        for ending, part in endings:
            if tensor.endswith(ending):
                found.setdefault(tensor.removesuffix(ending) + layout.weight, {})[part] = tensor
                break
    return [Source(name, parts) for name, parts in found.items() if not _is_dense(files, layout, parts)]


def _is_dense(files: Files, layout: Layout, parts: dict[str, str]) -> bool:
    if layout.plain is None or set(parts) != {layout.plain}:
        return False
    return files.dtype(parts[layout.plain]) in _FLOATS
