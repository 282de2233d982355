"""The memory that Linux's control groups leave to this process, versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# Version 1 has no word for "no limit": it says the largest number of whole pages, whose size differs.
UNLIMITED = 1 << 60
_FILES = {  # by the kind of file system: a group's limit, and what it uses
    "cgroup2": ("memory.max", "memory.current"),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


class Group(NamedTuple):
    """A control group with a limit on memory, in bytes."""

    limit: int
    used: int  # pages of files included


def groups(root: Path = Path("/")) -> list[Group]:
    """Those with a limit that this process is in, from its own to the outermost that can be seen; of a
    machine whose files are below `root`. None where there are no control groups.
    """
    return [group for where, files in _places(root) if (group := _group(where, files)) is not None]


def _places(root: Path) -> Iterator[tuple[Path, tuple[str, str]]]:
    """(directory, names of its files) of each group that has this process in it."""
    own = dict(_own(root))
    for kind, top, mount in _mounts(root):
        if kind not in own:
            continue
        path = own[kind]
        # Of a mount that shows a part of the tree, as containers have it. Others see all by its own name.
        inside = path[len(top) :] if top != "/" and f"{path}/".startswith(f"{top}/") else path
        where = mount.joinpath(*(part for part in inside.split("/") if part not in ("", "..")))
        for directory in (where, *where.parents):
            yield directory, _FILES[kind]
            if directory == mount:
                break


def _own(root: Path) -> Iterator[tuple[str, str]]:
    """(kind, path) of the process's group in each hierarchy with memory in it."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield "cgroup2", path
        elif "memory" in controllers.split(","):
            yield "cgroup", path


def _mounts(root: Path) -> Iterator[tuple[str, str, Path]]:
    """(kind, what of the hierarchy is its root, where it is) of each mounted hierarchy with memory in it."""
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        places, filesystem = left.split(), right.split()
        if len(places) < 5 or len(filesystem) < 3 or filesystem[0] not in _FILES:
            continue
        if filesystem[0] == "cgroup2" or "memory" in filesystem[2].split(","):
            yield filesystem[0], places[3], root / places[4].lstrip("/")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _group(where: Path, files: tuple[str, str]) -> Group | None:
    with suppress(OSError, ValueError):  # it is not to be seen here, or "max": no limit
        limit, used = (int((where / name).read_text()) for name in files)
        return Group(limit, used) if limit < UNLIMITED else None
    return None
