"""What commands share that make a checkpoint from a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moelora import packed_layout
from moelora.checkpoint_reader import Source, natural
from moelora.checkpoint_writer import Item
from moelora.errors import MoeloraError
from moelora.packed_layout import Layout
from moelora.packing import Copied
from moelora.shards import Stored


def items(source: Source, made: dict[str, Item], other: Callable[[str, Stored], Item] = Copied) -> list[Item]:
    """All tensors of the checkpoint to write: the weights in `made`, the other weights as they are in the
    source, and what `other` makes of the other tensors.
    """
    found: list[tuple[str, Item]] = [(disk, other(disk, tensor)) for disk, tensor in source.others.items()]
    for name, weight in source.weights.items():
        if name in made:
            found.append((name, made[name]))
        else:
            found += [(name, Copied(disk, tensor)) for disk, tensor in weight.by_disk_name().items()]
    return [item for _, item in sorted(found, key=lambda pair: natural(pair[0]))]


def check_beside(source: Source) -> None:
    """Raises: MoeloraError naming a file beside the weights that could not be copied later."""
    for path in source.beside():
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_dir():
                continue
            if not file.is_file():
                what = "a pipe or a device" if file.exists() else "a link to nothing"
                raise MoeloraError(f"cannot read {file}: it is {what}")
            try:
                file.open("rb").close()
            except OSError as error:
                raise MoeloraError(f"cannot read {file}: {error.strerror}") from None


def write_config(source: Source, layout: Layout | None, dtype: str | None, directory: Path) -> None:
    """The configuration of what was written, and the other files of the checkpoint it was made from."""
    config = source.raw_config()
    config.pop(packed_layout.SECTION, None)
    if layout is not None:
        config[packed_layout.SECTION] = layout.section()
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in source.beside():
        if path.is_dir():
            shutil.copytree(path, directory / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, directory / path.name)


def rendered(shown: Table) -> str:
    """A table as text."""
    console = Console(file=StringIO(), width=240, color_system=None)
    console.print(shown)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
