"""Files with a matrix for each expert, stacked once into files that are mapped from then on.

One file for each experts module, in our own layout: `MODULE.safetensors` with `MODULE.gate_up_proj.codes` and
so on, in a directory whose name is a digest of the checkpoint's files: names, sizes, times, headers and some
of what they hold, for archives that are built reproducibly give all files one time. A file is written expert
by expert under another name and renamed when it is complete: what is there is whole, whoever else writes it
or was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from torch import Tensor
from tqdm import tqdm  # not transformers', which commands silence: this may take minutes

from moelora.errors import MoeloraError, writing
from moelora.layouts import Files, Layout, Source
from moelora.matrices import checked
from moelora.packed_layout import PARTS
from moelora.stacking import Stack, matrix
from torch_moelora.formats import NESTED_RUN, PackedWeight

VERSION = 1  # of what is written here
ALIGNMENT = 64
STALE = 24 * 3600  # seconds after which an unfinished file is nobody's
_DTYPES = {
    torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.float32: "F32",
}  # fmt: skip
_SAMPLES, _SAMPLE = 16, 4096  # how many pieces of a file's content tell it from another, and their bytes
FORMAT = "moelora"  # in a file's metadata: the formats of its weights


def default_directory() -> Path:
    """Beside transformers' own cache."""
    return Path(HF_HOME) / "moelora"


def stacked(
    stacks: list[Stack], files: Files, layout: Layout, settings: dict, directory: Path | None
) -> dict[str, PackedWeight]:
    """The weights of all `stacks` by their names, mapped from the cache; what is not there yet is written.

    Raises: MoeloraError if a file cannot be written, or a source is not what it should be.
    """
    home = Path(directory or default_directory()) / _digest(files, settings)
    by_module: dict[str, list[Stack]] = {}
    for stack in stacks:
        by_module.setdefault(stack.module, []).append(stack)
    missing = {name: several for name, several in by_module.items() if not _path(home, name).is_file()}
    if missing:
        _write_all(home, missing, files, layout, settings)
    found = {}
    for name, several in by_module.items():
        found |= _read(_path(home, name), several)
    return found


def _path(home: Path, module: str) -> Path:
    return home / f"{module}.safetensors"


def _digest(files: Files, settings: dict) -> str:
    """Of what the files are, so that another checkpoint, or one that was changed, has another directory."""
    digest = hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True, default=str).encode())
    for path in sorted(files.paths):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(int.from_bytes(file.read(8), "little")))
            for part in range(1, _SAMPLES + 1):
                file.seek(max(0, stat.st_size * part // _SAMPLES - _SAMPLE))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:32]


def _write_all(
    home: Path, missing: dict[str, list[Stack]], files: Files, layout: Layout, settings: dict
) -> None:
    with writing(home):
        home.mkdir(parents=True, exist_ok=True)
    for left in home.glob("*.part"):
        with suppress(FileNotFoundError):  # finished or removed by another process
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()
    for name, several in tqdm(missing.items(), "Stacking experts", unit="layer", dynamic_ncols=True):
        with writing(_path(home, name)):
            _write(_path(home, name), several, files, layout, settings)
    size = sum(path.stat().st_size for path in home.glob("*.safetensors"))
    logging.getLogger("moelora").warning(
        "the experts of %s are stacked in %s (%.2f GB), which later loads map; delete it to be rid of it",
        files.paths[0].parent, home, size / 1e9,
    )  # fmt: skip


def _write(path: Path, stacks: list[Stack], files: Files, layout: Layout, settings: dict) -> None:
    """One module's file: room for all, then expert by expert."""
    kinds = {stack.name: _all(stack, matrix(stack, 0, files, layout, settings), settings) for stack in stacks}
    tensors = {  # codes first: their sizes keep what follows aligned
        f"{name}.{part}": shape
        for part in PARTS
        for name, (_, shapes) in kinds.items()
        if (shape := shapes.get(part)) is not None
    }
    header, offsets, total = _header(tensors, {name: kind for name, (kind, _) in kinds.items()})
    handle, name = tempfile.mkstemp(".part", path.name, path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            os.posix_fallocate(
                file.fileno(), 0, len(header) + total
            )  # a full disk is an error here, not later
            file.write(header)
        mapped = np.memmap(part, np.uint8, "r+", len(header), (total,))
        room = torch.from_numpy(mapped)
        for stack in stacks:
            for expert in range(stack.size[0]):
                weight = _as(kinds[stack.name][0], matrix(stack, expert, files, layout, settings))
                _put(room, offsets, tensors, stack.name, expert, weight)
        mapped.flush()
        part.chmod(0o644)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


Shape = tuple[torch.dtype, tuple[int, ...]]


def _all(stack: Stack, one: PackedWeight, settings: dict) -> tuple[dict, dict[str, Shape]]:
    """(what is to be known of the format, dtype and shape of each tensor) of all experts, given the first."""
    if one.is_nested and one.scale.numel() % NESTED_RUN:
        one = one.unnested("load")
    kind = {"format": one.format, "nested": one.is_nested, "zero": one.zero is not None}
    shapes = {
        part: (tensor.dtype, (stack.size[0] * tensor.shape[0], *tensor.shape[1:]))
        for part, tensor in zip(PARTS, one[:4], strict=True)
        if tensor is not None
    }
    if "zero" not in shapes and one.format == "int4" and _may_have_zero(stack, settings):
        shapes["zero"] = (torch.uint8, shapes["scale"][1])
        kind["zero"] = True
    return kind, shapes


def _may_have_zero(stack: Stack, settings: dict) -> bool:
    """Whether other experts may have zeros although the first, whose are all 8, has none."""
    return not settings.get("sym") and any(
        {"qzeros", "weight_zero_point"} & source.tensors.keys() for source in stack.sources[0]
    )


def _as(kind: dict, one: PackedWeight) -> PackedWeight:
    """One expert in the way of the first."""
    if one.is_nested and not kind["nested"]:
        one = one.unnested("load")
    if kind["zero"] and one.zero is None:
        one = one._replace(zero=torch.full(one.scale.shape, 8, dtype=torch.uint8))
    return one


def _header(tensors: dict[str, Shape], kinds: dict[str, dict]) -> tuple[bytes, dict[str, int], int]:
    """(the file's beginning, where each tensor begins after it, bytes of all)."""
    entries: dict = {"__metadata__": {"format": "pt", FORMAT: json.dumps(kinds)}}
    offsets, total = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape)) * dtype.itemsize
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [total, total + size]}
        offsets[name], total = total, total + size
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offsets, total


def _put(
    room: Tensor,
    offsets: dict[str, int],
    tensors: dict[str, Shape],
    name: str,
    expert: int,
    weight: PackedWeight,
) -> None:
    for part, tensor in zip(PARTS, weight[:4], strict=True):
        key = f"{name}.{part}"
        if (tensor is not None) != (key in tensors):
            raise MoeloraError(f"{name}: expert {expert} is not packed as expert 0 is: only one has {part}")
        if tensor is None:
            continue
        dtype, shape = tensors[key]
        if tensor.dtype != dtype or tensor.shape[1:] != shape[1:]:
            raise MoeloraError(
                f"{name}: {part} of expert {expert} is {list(tensor.shape[1:])} {tensor.dtype}, expected "
                f"{list(shape[1:])} {dtype} as of expert 0"
            )
        at = offsets[key] + expert * tensor.nbytes
        room[at : at + tensor.nbytes] = tensor.contiguous().view(torch.uint8).flatten()


def _read(path: Path, stacks: list[Stack]) -> dict[str, PackedWeight]:
    files = Files([path])
    kinds = json.loads(files.metadata(path)[FORMAT])
    found = {}
    for stack in stacks:
        source = Source(stack.name, {p: key for p in PARTS if (key := f"{stack.name}.{p}") in files.names})
        parts = source.parts(files)
        weight = PackedWeight(*(parts.get(part) for part in PARTS), format=kinds[stack.name]["format"])
        found[stack.name] = stack.check(checked(stack.name, weight))
    return found
