"""A checkpoint written file by file in bounded memory: it appears when complete, and a run that was
interrupted goes on.

Until then it lies beside its place, in a directory whose name ends in `.unfinished`, with a record of what it
is made from and of each file that is finished. A record is believed only if the file's content is the
recorded one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import xxhash
from filelock import FileLock, Timeout
from tqdm import tqdm

from moelora.disk import sync
from moelora.errors import MoeloraError, one_line, writing
from moelora.shards import ShardFile, Spec, divided
from moelora.stored import INDEX

SUFFIX = ".unfinished"
LARGEST = 2 * 10**9  # bytes of a file, unless a single weight has more
_RECORD, _LOCK = ".run.json", ".lock"  # no file of a checkpoint that is copied has such a name
_NEW = ".new"
_PIECE = 1 << 24


class Item(Protocol):
    """Tensors of a checkpoint that are made together, in one file."""

    specs: dict[str, Spec]

    def write(self, file: ShardFile, pool: Executor) -> Any:
        """Writes all of them, and returns what is to be told of them, as JSON has it; None for nothing."""


class Written(NamedTuple):
    """told: what the items returned, in order. resumed: files that were there already."""

    told: list[Any]
    files: int
    resumed: int
    nbytes: int


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_free(out: Path) -> None:
    """Raises: MoeloraError if something is at `out` already, or its parent is no directory to write into."""
    if not str(out).strip() or out.name in ("", ".."):
        raise MoeloraError(f"OUT is {str(out)!r}, expected the path of a directory to make")
    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        raise MoeloraError(f"{out} is there already, and nothing is overwritten: choose another OUT")
    if os.path.ismount(out):
        raise MoeloraError(f"{out} is a mount point, which no finished directory can take: choose one in it")
    if out.parent.exists() and not out.parent.is_dir():
        raise MoeloraError(f"{out.parent} is a file, expected a directory to make {out.name} in")


def write(
    out: Path,
    items: list[Item],
    source: dict[str, Any],
    beside: Callable[[Path, Written], None],
    threads: int,
    title: str,
) -> Written:
    """Makes the checkpoint directory `out` of the tensors of `items`, or goes on making it.

    Args:
        source: what the content depends on, as JSON has it. An unfinished run of another source is refused.
        beside: writes the other files into the directory that it is given.
        threads: of the pool that items get.
        title: of the progress bar.

    Raises: MoeloraError if `out` is there, another process writes it, an unfinished run of something else is
        there, or the disk is full.
    """
    check_free(out)
    partial = out.with_name(out.name + SUFFIX)
    parts = divided([item.specs for item in items], LARGEST)
    names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    with writing(out), _held(partial), _pool(threads) as pool, ThreadPoolExecutor(1) as finisher:
        record = _begin(partial, source)
        told: list[Any] = [None] * len(items)
        total = sum(spec.nbytes for item in items for spec in item.specs.values())
        _check_space(partial, total, names)
        resumed, closing = 0, []
        with tqdm(total=total, desc=title, unit="B", unit_scale=True, dynamic_ncols=True) as progress:
            for name, numbers in zip(names, parts, strict=True):
                known = record["files"].get(name)
                if known is not None and _intact(partial / name, known):
                    for number, value in zip(numbers, known["told"], strict=True):
                        told[number] = value
                    progress.update(sum(s.nbytes for n in numbers for s in items[n].specs.values()))
                    resumed += 1
                    continue
                specs = {key: spec for n in numbers for key, spec in items[n].specs.items()}
                with ShardFile(partial / name, specs) as file, _drained(pool):
                    for number in numbers:
                        told[number] = items[number].write(file, pool)
                        progress.update(sum(spec.nbytes for spec in items[number].specs.values()))
                _settle(closing, 1)
                closing.append(finisher.submit(_finish, partial, record, name, [told[n] for n in numbers]))
            _settle(closing, 0)
        _write_index(partial, names, parts, items, total)
        written = Written(told, len(names), resumed, total)
        beside(partial, written)
        _publish(partial, out)
    return written


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that compute one operation each; what waits is dropped where the block is left early."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


@contextmanager
def _drained(pool: Executor) -> Iterator[None]:
    """Where the block fails, pieces that are being written are waited for, while their file is still open."""
    try:
        yield
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _settle(closing: list[Future], most: int) -> None:
    """Waits until at most so many files are being finished."""
    while len(closing) > most:
        closing.pop(0).result()


@contextmanager
def _held(partial: Path) -> Iterator[None]:
    """The directory of an unfinished run, made if it is absent, for this process alone."""
    existed = partial.is_dir()
    partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise MoeloraError(
            f"another process is writing {partial}: wait for it, or choose another OUT"
        ) from None
    try:
        yield
    finally:
        if not existed and partial.is_dir() and not _finished(partial):
            shutil.rmtree(partial, ignore_errors=True)
        lock.release()


def _finished(partial: Path) -> bool:
    """Whether there is a file to go on from."""
    try:
        return bool(json.loads((partial / _RECORD).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _begin(partial: Path, source: dict[str, Any]) -> dict[str, Any]:
    """The record of the run that is there, or a new one."""
    path = partial / _RECORD
    source = json.loads(json.dumps(source))
    if not path.exists():
        own = (_LOCK, path.name + _NEW)
        if strangers := sorted(p.name for p in partial.iterdir() if p.name not in own):
            raise MoeloraError(f"{partial} has {strangers[0]} in it, which no run wrote: move it away")
        record = {"source": source, "files": {}}
        _save(path, record)
        return record
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before, _ = record["source"], record["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MoeloraError(f"{path} is damaged ({one_line(error)}): remove {partial} to start anew") from None
    if changed := sorted(key for key in {*before, *source} if before.get(key) != source.get(key)):
        raise MoeloraError(
            f"{partial} is an unfinished run with another {' and '.join(changed)}: remove it to start anew, "
            "or repeat the command that it is of to go on"
        )
    return record


def _check_space(partial: Path, total: int, names: Iterable[str]) -> None:
    there = sum((partial / name).stat().st_blocks * 512 for name in names if (partial / name).exists())
    free = shutil.disk_usage(partial).free
    if total - there > free:
        raise MoeloraError(
            f"{partial.parent} has {free / 1e9:.1f} GB free, expected the {(total - there) / 1e9:.1f} GB "
            "that are to be written"
        )


def digest(path: Path) -> str:
    """Of a file's content."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def _intact(path: Path, known: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == known["size"] and digest(path) == known["digest"]


def _finish(partial: Path, record: dict[str, Any], name: str, told: list[Any]) -> None:
    """To the disk, and then into the record: in a thread of its own, while the next file is made."""
    path = partial / name
    sync(path)
    record["files"][name] = {"size": path.stat().st_size, "digest": digest(path), "told": told}
    _save(partial / _RECORD, record)


def _write_index(
    partial: Path, names: list[str], parts: list[list[int]], items: list[Item], total: int
) -> None:
    where = {
        key: name
        for name, numbers in zip(names, parts, strict=True)
        for number in numbers
        for key in items[number].specs
    }
    _save(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def _publish(partial: Path, out: Path) -> None:
    """The directory under its name, then without what was only for the run."""
    for path in partial.iterdir():
        sync(path)
    with suppress(OSError):
        out.rmdir()  # an empty one
    os.rename(partial, out)
    sync(out.parent)
    for name in (_RECORD, _LOCK):
        (out / name).unlink(missing_ok=True)


def _save(path: Path, content: Any) -> None:
    new = path.with_name(path.name + _NEW)
    new.write_text(json.dumps(content, indent=1), encoding="utf-8")
    sync(new)
    os.replace(new, path)
