"""A checkpoint as a stream of weights: some experts at a time, as [E, N, K], whatever its files look like.

It is dense, with a matrix for each expert or all of a layer in one tensor, or packed: in our own layout, or
in MXFP4 as gpt-oss is published.
"""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora import packed_layout, shards, stored
from moelora.checkpoints import listed
from moelora.errors import MoeloraError, one_line
from moelora.matrices import checked, need
from moelora.model_names import Names, configuration, oriented, outline
from moelora.packed_layout import Choice, Layout
from moelora.shards import Stored
from torch_moelora.formats import FORMATS, NESTED_RUN, PackedWeight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GPT_OSS = "mxfp4"  # the "quant_method" of its own checkpoints
ERRORS = "quantization_errors.json"  # of each tensor, beside what was packed


class DenseWeight(NamedTuple):
    """A weight of the model that is on disk as it is, or converted from several tensors."""

    name: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    names: Names
    sources: dict[str | None, list[Stored]]  # by the pattern of the conversion
    disk: tuple[str, ...]  # their names, in that order
    transposed: bool
    matrix: bool  # a linear layer's

    def by_disk_name(self) -> dict[str, Stored]:
        """The tensors that it is made from."""
        tensors = (one for tensors in self.sources.values() for one in tensors)
        return dict(zip(self.disk, tensors, strict=True))

    def read(self, start: int, stop: int) -> Tensor:
        """[stop - start, N, K], those experts."""
        if self.matrix:
            return self.sources[None][0].read().unsqueeze(0)
        if None in self.sources:
            found = self.sources[None][0].read(start, stop)
        else:
            parts = {
                pattern: [one.read() for one in tensors[start:stop]]
                if "*" in pattern
                else [tensors[0].read(start, stop)]
                for pattern, tensors in self.sources.items()
            }
            found = self.names.convert(self.name, parts)
        return found.transpose(1, 2).contiguous() if self.transposed else found


class PackedSource(NamedTuple):
    """A weight of a packed checkpoint."""

    name: str
    shape: tuple[int, int, int]
    dtype: torch.dtype  # what it is unpacked to
    choice: Choice
    parts: dict[str, Stored]  # by suffix

    def by_disk_name(self) -> dict[str, Stored]:
        """The tensors that it is made from."""
        return {f"{self.name}.{part}": tensor for part, tensor in self.parts.items()}

    def read(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start, N, K], those experts."""
        if not self.choice.nested:
            parts = {part: one.read(start, stop) for part, one in self.parts.items()}
            return packed_layout.packed(self.choice, parts).dequantize(torch.float32)
        codes = self.parts["codes"].read(start, stop)
        each = math.prod(self.parts["scale"].spec.shape[1:])
        if start * each % NESTED_RUN:  # a run began in the expert before
            scales = (self.parts[part].read() for part in ("scale", "scale2"))
            scale = unnested(self.choice, self.parts["codes"].spec.shape, *scales)[start:stop]
        else:
            runs = self.parts["scale2"].read(start * each // NESTED_RUN, -(-stop * each // NESTED_RUN))
            scale = unnested(self.choice, codes.shape, self.parts["scale"].read(start, stop), runs)
        return PackedWeight(codes, scale, format=self.choice.format).dequantize(torch.float32)


def unnested(choice: Choice, codes: tuple[int, ...], scale: Tensor, scale2: Tensor) -> Tensor:
    """The float32 scales of a nested weight whose codes have a shape."""
    shell = torch.empty(codes, dtype=torch.uint8, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is what is wanted here
        return PackedWeight(shell, scale, scale2, None, choice.format).unnested("read").scale


class Source:
    """A local checkpoint.

    plain: its configuration, as of a dense checkpoint.
    layout: of what is packed in it, None for a dense one.
    weights: the experts' weights and those of linear layers by their names in the model.
    others: the other tensors by their names on disk.

    Raises: MoeloraError if it is no checkpoint of a model with experts, lacks tensors, or is packed in a way
        that is not ours.
    """

    def __init__(self, directory: Path):
        if not directory.is_dir():
            raise MoeloraError(f"{directory} is not a directory, expected a local transformers checkpoint")
        self.directory = directory
        self.config = configuration(directory)
        self.layout = self._layout()
        plain = copy.deepcopy(self.config)
        if hasattr(plain, packed_layout.SECTION):
            delattr(plain, packed_layout.SECTION)
        self.plain = plain
        self.names = Names(outline(plain))
        self.files = stored.required(directory)
        tensors = {name: one for path in self.files for name, one in shards.stored(path).items()}
        if self.layout is not None and not packed_layout.is_ours(self._section()):
            tensors = dict(_of_gpt_oss(name, tensor) for name, tensor in tensors.items())
        self.experts = self.names.experts()
        self.linears = set(self.names.linears())
        self.weights: dict[str, DenseWeight | PackedSource] = {}
        self.others: dict[str, Stored] = {}
        self._sort(tensors)

    def _section(self) -> dict[str, Any] | None:
        section = getattr(self.config, packed_layout.SECTION, None)
        return section if section is None or isinstance(section, dict) else section.to_dict()

    def _layout(self) -> Layout | None:
        section = self._section()
        if section is None:
            return None
        if packed_layout.is_ours(section):
            return packed_layout.read(section)
        method = getattr(section.get("quant_method"), "value", section.get("quant_method"))
        if method == GPT_OSS:
            return Layout(Choice.of("mxfp4"))
        raise MoeloraError(
            f"{self.directory} is quantised by {method}, expected a dense checkpoint, one of ours or "
            f"gpt-oss's own: moelora.from_pretrained(DIR).save_pretrained(OUT) writes one of ours, "
            "with the same codes"
        )

    def _sort(self, tensors: dict[str, Stored]) -> None:
        own = self.names.own()
        found: set[str] = set()
        dense: dict[str, dict[str | None, dict[str, Stored]]] = {}
        packed: dict[str, dict[str, Stored]] = {}
        for disk in sorted(tensors, key=natural):
            if self.layout is not None and (split := packed_layout.split(disk)):
                # transformers, which saves a model, may rename what is around the experts.
                name = split[0] if split[0] in own else self.names.model_name(split[0])[0]
                if name in own:
                    packed.setdefault(name, {})[split[1]] = tensors[disk]
                    found.add(name)
                    continue
            name, pattern = self.names.model_name(disk)
            found.add(name)
            if name in self.experts or (name in self.linears and pattern is None):
                dense.setdefault(name, {}).setdefault(pattern, {})[disk] = tensors[disk]
            else:
                self.others[disk] = tensors[disk]
        if missing := sorted(set(own) - found, key=natural):
            raise MoeloraError(f"{self.directory} lacks weights of its model: {listed(missing)}")
        for name, sources in dense.items():
            self.weights[name] = self._dense(name, sources, own[name])
        for name, parts in packed.items():
            self.weights[name] = self._packed(name, parts, own[name])

    def _dense(self, name: str, found: dict[str | None, dict[str, Stored]], own: Tensor) -> DenseWeight:
        sources = {pattern: list(tensors.values()) for pattern, tensors in found.items()}
        disk = tuple(one for tensors in found.values() for one in tensors)
        dtypes = {one.spec.dtype for tensors in sources.values() for one in tensors}
        if len(dtypes) != 1 or not dtypes <= set(DTYPES):
            told = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise MoeloraError(f"{name} in {self.directory} is {told}, expected bfloat16, float16 or float32")
        module = self.experts.get(name)
        metas = {
            pattern: [torch.empty(one.spec.shape, device="meta") for one in tensors]
            for pattern, tensors in sources.items()
        }
        try:
            whole = metas[None][0] if None in metas else self.names.convert(name, metas)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            where = f"{name} in {self.directory}"
            raise MoeloraError(f"the tensors of {where} do not fit: {one_line(error)}") from None
        if whole.shape != own.shape:
            raise MoeloraError(
                f"{name} in {self.directory} is {list(whole.shape)}, expected {list(own.shape)} by its "
                "configuration"
            )
        shape = (1, *whole.shape) if module is None else tuple(oriented(module, whole).shape)
        turned = module is not None and module.is_transposed
        return DenseWeight(name, shape, dtypes.pop(), self.names, sources, disk, turned, module is None)

    def _packed(self, name: str, parts: dict[str, Stored], own: Tensor) -> PackedSource:
        module = self.experts.get(name)
        choice = self.layout.choice(name, module is not None)
        shape = (1, *own.shape) if module is None else tuple(oriented(module, own).shape)
        if choice is None:
            raise MoeloraError(f"{name} in {self.directory} is packed, its configuration does not say how")
        where = f"{name} in {self.directory}"
        need(where, parts, "codes", "scale")
        metas = {
            part: torch.empty(one.spec.shape, dtype=one.spec.dtype, device="meta")
            for part, one in parts.items()
        }
        found = checked(where, packed_layout.packed(choice, metas))
        multipliers = 1 if choice.nested or found.scale2 is None else found.scale2.shape[1]
        expected = packed_layout.specs(choice, shape, multipliers)
        # A grid of scales may be another one, as of other projects' files: that it is one has been checked.
        free = {"zero"} | ({"scale"} if FORMATS[choice.format].groups.kind == "grid" else set())
        for part in sorted({*expected, *parts} - free):
            wanted = list(expected[part][1]) if part in expected else "nothing"
            came = list(parts[part].spec.shape) if part in parts else "nothing"
            if came != wanted:
                raise MoeloraError(f"{name}.{part} in {self.directory}: expected {wanted}, got {came}")
        return PackedSource(name, shape, own.dtype, choice, parts)

    @property
    def main_dtype(self) -> torch.dtype:
        """That of most of the tensors that are no packed weights', by bytes."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.others.values():
            sizes[tensor.spec.dtype] += tensor.spec.nbytes
        return sizes.most_common(1)[0][0]

    def matrix(self, name: str) -> bool:
        """Whether the model's matrix `name` is among `weights`, where it is moved to from the others."""
        for disk, tensor in self.others.items():
            if len(tensor.spec.shape) == 2 and self.names.model_name(disk) == (name, None):
                own = self.names.state[name]
                self.weights[name] = self._dense(name, {None: {disk: self.others.pop(disk)}}, own)
                break
        return name in self.weights

    def find(self, name: str) -> Stored | None:
        """The tensor on disk that is the model's `name` as it is, or None. What is tied is there once."""
        tied = self.names.model.all_tied_weights_keys
        also = [tied.get(name), *sorted(one for one, other in tied.items() if other == name)]
        return next((found for one in (name, *also) if (found := self._stored(one)) is not None), None)

    def _stored(self, name: str | None) -> Stored | None:
        weight = self.weights.get(name)
        if isinstance(weight, DenseWeight) and None in weight.sources:
            return weight.sources[None][0]
        found = (t for disk, t in self.others.items() if self.names.model_name(disk) == (name, None))
        return next(found, None)

    def fingerprint(self) -> list[Any]:
        """Of the files: names, sizes and times."""
        paths = [self.directory / "config.json", *self.files]
        return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in paths]

    def raw_config(self) -> dict[str, Any]:
        """config.json, as it stands there."""
        return json.loads((self.directory / "config.json").read_text(encoding="utf-8"))

    def beside(self) -> Iterator[Path]:
        """The other files of the checkpoint: tokenizer, chat template, generation configuration, code."""
        weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
        ours = ("config.json", ERRORS)
        for path in sorted(self.directory.iterdir()):
            index = path.name.endswith(".index.json")
            if path.is_dir() and path.name == "additional_chat_templates":
                yield path
            elif path.is_dir() or path.name.startswith(".") or path.suffix in weights or index:
                continue
            elif path.name not in ours:
                yield path


def _of_gpt_oss(name: str, tensor: Stored) -> tuple[str, Stored]:
    """A tensor of gpt-oss's own MXFP4 as it is called in our layout: the same bytes, in another shape."""
    if name.endswith("_blocks") and len(tensor.spec.shape) == 4:  # uint8 [E, N, K/32, 16]
        experts, n, blocks, size = tensor.spec.shape
        spec = tensor.spec._replace(shape=(experts, n, blocks * size))
        return name.removesuffix("_blocks") + ".codes", tensor._replace(spec=spec)
    return (name.removesuffix("_scales") + ".scale", tensor) if name.endswith("_scales") else (name, tensor)


def natural(name: str) -> list[tuple[int, Any]]:
    """For sorting: layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def kind(name: str) -> str:
    """Names that differ only in the number of their layer are of a kind."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)
