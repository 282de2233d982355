"""The output directory of a run: one run at a time, every file whole or absent, nobody else's touched.

What a run writes is recorded in a manifest, in a directory of its own in the output directory, before it
appears under its name. Only what stands there, with the content that was written, is removed or replaced.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from moelora.commands import fingerprints
from moelora.disk import sync
from moelora.errors import MoeloraError, writing

PRIVATE = ".moelora"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
FINISHED = "summary.json"  # written last
RESULTS = ("adapter", "loss.png", "config.yaml", FINISHED, "trace.json", "profile.txt")
RUNNING = {"jsonl": "log.jsonl", "tensorboard": "runs"}  # written while training, where they are wanted
_GROWING = -1  # the size of what such a name stands for
_MANIFEST, _LOCK, _STAGING, _REMOVED, _WRITER = "manifest.json", "lock", "staging", "removed", "writer.json"
_VERSION = 1
_NOTHING = "nothing to resume in {}: expected a checkpoint of an unfinished run"


class Entry(NamedTuple):
    """A file that was written: if size and time are the same it is, else its digest decides."""

    size: int
    modified: int  # ns
    digest: str


class Found(NamedTuple):
    """What an earlier run left in an output directory."""

    finished: bool
    checkpoint: Path | None  # the last complete one


# ---- one run at a time


@contextmanager
def held(
    out: Path, overwrite: bool = False, resume: bool = False, names: Iterable[str] = RESULTS
) -> Iterator[Found]:
    """Holds `out` for this run, made if it is absent, and says what an earlier one left there.

    If nothing has been written into it by the end, `out` is left as it was. `names` are what this run may
    write, beside checkpoints.

    Raises: MoeloraError if another run has it, if something in it is not a run's where this one would write,
        or if an earlier run is there that neither `resume` nor `overwrite` speaks of.
    """
    if resume and overwrite:
        raise MoeloraError(
            "--resume goes on with what is there and --overwrite removes it: expected one of them, got both"
        )
    if os.path.lexists(out) and not out.exists():
        raise MoeloraError(f"--output {out} is a link to nothing, expected a directory")
    if out.exists() and not out.is_dir():
        raise MoeloraError(f"--output {out} is a file, expected a directory")
    existed = out.is_dir()
    if not os.path.lexists(out / PRIVATE):
        _examine(out, {}, names)  # before anything is made
        if resume:
            raise MoeloraError(_NOTHING.format(out))
    with writing(out):
        (out / PRIVATE).mkdir(parents=True, exist_ok=True)
    try:
        with _locked(out):
            try:
                _tidy(out)
                yield _judge(out, overwrite, resume, names)
            finally:
                _leave(out)
    finally:
        if not existed:
            with suppress(OSError):
                out.rmdir()  # only if nothing came into it


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    lock = FileLock(out / PRIVATE / _LOCK, timeout=0)
    writer = out / PRIVATE / _WRITER
    try:
        lock.acquire()
    except Timeout:  # an OSError, too
        try:
            who = json.loads(writer.read_text(encoding="utf-8"))
            told = f" (process {who['process']} on {who['host']})"
        except (OSError, ValueError, KeyError, TypeError):
            told = ""
        raise MoeloraError(
            f"another run{told} is writing into {out}: wait for it, or choose another --output"
        ) from None
    except OSError as error:
        raise MoeloraError(f"cannot lock {out}: {error.strerror or error}") from None
    try:
        with writing(out):
            writer.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}), "utf-8")
        yield
    finally:
        with suppress(OSError):
            writer.unlink()
        lock.release()


def _tidy(out: Path) -> None:
    """Removes what an interrupted run was about to write or to remove."""
    for name in (_STAGING, _REMOVED):
        shutil.rmtree(out / PRIVATE / name, ignore_errors=True)


def _leave(out: Path) -> None:
    """Removes the private directory again where no file was written."""
    _tidy(out)
    with suppress(MoeloraError, OSError):
        if not any(os.path.lexists(out / name) for name in _read(out)):
            for name in (_MANIFEST, _WRITER, _LOCK):
                (out / PRIVATE / name).unlink(missing_ok=True)
            (out / PRIVATE).rmdir()


def _judge(out: Path, overwrite: bool, resume: bool, names: Iterable[str]) -> Found:
    _examine(out, _read(out), names)
    found = look(out)
    if resume:
        if found.checkpoint is None and not found.finished:
            raise MoeloraError(_NOTHING.format(out))
    elif not overwrite and found.finished:
        raise MoeloraError(f"{out} holds a finished run: --overwrite replaces it, another --output keeps it")
    elif not overwrite and found.checkpoint is not None:
        raise MoeloraError(
            f"{out} holds an unfinished run ({found.checkpoint.name}): --resume goes on with it, --overwrite "
            "starts anew"
        )
    return found


def look(out: Path) -> Found:
    """What an earlier run left in `out`."""
    try:
        names = {name.partition("/")[0] for name in _read(out)}
    except MoeloraError:
        return Found(False, None)
    checkpoints = [name for name in names if CHECKPOINT.fullmatch(name) and (out / name).is_dir()]
    newest = max(checkpoints, key=lambda name: int(CHECKPOINT.fullmatch(name)[1]), default=None)
    return Found(FINISHED in names and (out / FINISHED).is_file(), out / newest if newest else None)


# ---- whose a file is


def _examine(out: Path, manifest: dict[str, Entry], names: Iterable[str]) -> None:
    """Complains about the first path that a run would have to replace and that no run wrote."""
    if not out.is_dir():
        return
    taken = [path for path in sorted(out.iterdir()) if path.name in names or CHECKPOINT.fullmatch(path.name)]
    for path in taken:
        if stranger := _stranger(out, path, manifest):
            raise MoeloraError(
                f"{stranger}, and this run would have to replace it: move it away or choose another --output"
            )


def _stranger(out: Path, path: Path, manifest: dict[str, Entry]) -> str | None:
    """The first thing at `path` that is not what a run wrote there, in words, or None."""
    if _grows(path.name, manifest) and path.parent == out and not path.is_symlink():
        return None
    if path.is_dir() and not path.is_symlink():
        name = path.relative_to(out).as_posix()
        if not any(key.startswith(f"{name}/") for key in manifest):
            return f"{path} was not written by a run"
        return next(filter(None, (_stranger(out, p, manifest) for p in sorted(path.iterdir()))), None)
    entry = manifest.get(path.relative_to(out).as_posix())
    if entry is None or path.is_symlink() or not path.is_file():
        return f"{path} was not written by a run"
    if CHECKPOINT.fullmatch(path.relative_to(out).parts[0]):
        return None  # damage, which resuming tells; nobody edits an optimizer's state
    return None if _same(path, entry) else f"{path} was changed since a run wrote it"


def _grows(name: str, manifest: dict[str, Entry]) -> bool:
    return name in manifest and manifest[name].size == _GROWING


def _same(path: Path, entry: Entry) -> bool:
    status = path.stat()
    if status.st_size != entry.size:
        return False
    return status.st_mtime_ns == entry.modified or fingerprints.file(path) == entry.digest


def entries(root: Path, name: str) -> dict[str, Entry]:
    """The files at `root/name`, a file or a directory, by their paths from `root`."""
    top = root / name
    paths = [path for path in sorted(top.rglob("*")) if path.is_file()] if top.is_dir() else [top]
    digests = fingerprints.files(paths)
    return {
        path.relative_to(root).as_posix(): Entry(
            path.stat().st_size, path.stat().st_mtime_ns, digests[str(path)]
        )
        for path in paths
    }


# ---- writing and removing


def publish(out: Path, name: str, write: Callable[[Path], Any]) -> Path:
    """Lets `write` make the file or directory `out/name` elsewhere, and renames it when it is complete.

    Raises: MoeloraError if it cannot be written, or if something is there that no run wrote.
    """
    final, staging = out / name, out / PRIVATE / _STAGING
    with writing(final):
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            write(staging / name)
            written = entries(staging, name)
            for path in written:
                sync(staging / path)
            manifest = _read(out)
            old = {key: value for key, value in manifest.items() if _within(key, name)}
            if os.path.lexists(final) and (stranger := _stranger(out, final, old)):
                raise MoeloraError(f"cannot write {final}: {stranger}. Move it away, then --resume")
            remove(out, name)
            _write(out, {**{k: v for k, v in _read(out).items() if not _within(k, name)}, **written})
            os.replace(staging / name, final)
            sync(out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return final


def claim(out: Path, name: str) -> Path:
    """Makes `out/name` this run's, a file or a directory that others write while it goes on.

    Raises: MoeloraError if something is there that no run wrote.
    """
    manifest = _read(out)
    if os.path.lexists(out / name) and (stranger := _stranger(out, out / name, manifest)):
        raise MoeloraError(f"{stranger}: move it away or choose another --output")
    with writing(out):
        _write(out, {**manifest, name: Entry(_GROWING, 0, "")})
    return out / name


def remove(out: Path, *names: str) -> None:
    """Removes what runs wrote at `out/name` for each of `names`; all that runs wrote, if there are none."""
    manifest = _read(out)
    gone = [key for key in manifest if not names or any(_within(key, name) for name in names)]
    with writing(out):
        tops = {key.partition("/")[0] for key in gone}
        removed = out / PRIVATE / _REMOVED
        for top in sorted(tops, key=lambda top: top != FINISHED):
            if (out / top).is_dir() and not (out / top).is_symlink():
                # Renamed first, so that an interrupted removal leaves nothing that looks like a checkpoint.
                removed.mkdir(parents=True, exist_ok=True)
                keys = [key for key in gone if _within(key, top)]
                _empty(out, top, _events(out, top) if _grows(top, manifest) else keys, removed)
            elif (out / top).is_file() and (_grows(top, manifest) or _same(out / top, manifest[top])):
                (out / top).unlink()
        _write(out, {key: value for key, value in manifest.items() if key not in gone})


def remove_checkpoints(out: Path, keep: int = 0, but: tuple[str, ...] = ()) -> None:
    """Removes the checkpoints that runs wrote, except the `keep` newest and those named in `but`."""
    names = {name.partition("/")[0] for name in _read(out)}
    names = sorted(filter(CHECKPOINT.fullmatch, names), key=lambda name: int(CHECKPOINT.fullmatch(name)[1]))
    old = [name for name in names[: len(names) - keep] if name not in but]
    if old:
        remove(out, *old)


def _empty(out: Path, top: str, keys: list[str], removed: Path) -> None:
    """Removes the files `keys` of the directory `out/top`, and it, if nothing else is in it."""
    others = {p.relative_to(out).as_posix() for p in (out / top).rglob("*") if not p.is_dir()} - set(keys)
    root = out
    if not others:
        shutil.rmtree(removed / top, ignore_errors=True)
        os.replace(out / top, removed / top)
        root = removed
    for key in keys:
        (root / key).unlink(missing_ok=True)
    folders = [p for p in (root / top).rglob("*") if p.is_dir() and not p.is_symlink()]
    for folder in [*sorted(folders, reverse=True), root / top]:
        with suppress(OSError):
            folder.rmdir()


def _events(out: Path, top: str) -> list[str]:
    """What TensorBoard writes, in a directory that is its."""
    return [path.relative_to(out).as_posix() for path in (out / top).rglob("events.out.tfevents.*")]


def _within(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}/")


# ---- the manifest


def _read(out: Path) -> dict[str, Entry]:
    path = out / PRIVATE / _MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: Entry(*entry) for name, entry in content["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MoeloraError(
            f"{path} is damaged, and nothing else tells what runs wrote into {out} ({type(error).__name__}): "
            "choose another --output"
        ) from None


def _write(out: Path, manifest: dict[str, Entry]) -> None:
    path = out / PRIVATE / _MANIFEST
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"version": _VERSION, "files": manifest}, indent=1), encoding="utf-8")
    sync(new)
    os.replace(new, path)
