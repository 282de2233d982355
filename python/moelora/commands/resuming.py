"""What a checkpoint of a run must hold for the run to go on as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from moelora.commands import directory
from moelora.errors import MoeloraError

OPTIONS = "options.json"
COMPLETE = "complete.json"  # written last: what else is in the checkpoint, and what the run was made from
NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", OPTIONS)
_VERSION = 1


def complete(checkpoint: Path, options: dict[str, Any], facts: dict[str, Any]) -> None:
    """Marks the directory `checkpoint`, which has all its other files, as complete.

    Args:
        options: the run's, settled.
        facts: JSON for `facts` to give back: the step, whether the training is over, fingerprints.
    """
    (checkpoint / OPTIONS).write_text(json.dumps(options, indent=2), encoding="utf-8")
    files = {
        Path(name).relative_to(checkpoint.name).as_posix(): [entry.size, entry.digest]
        for name, entry in directory.entries(checkpoint.parent, checkpoint.name).items()
    }
    body = {"version": _VERSION, "facts": facts, "files": files}
    body["digest"] = _digest(body)
    (checkpoint / COMPLETE).write_text(json.dumps(body, indent=1), encoding="utf-8")


def verify(checkpoint: Path) -> dict[str, Any]:
    """The facts of a checkpoint that is whole: every file there, with the bytes that were written.

    Raises: MoeloraError naming the file that is missing or damaged.
    """
    try:
        body = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        digest = body.pop("digest")
        sound = body["version"] == _VERSION and digest == _digest(body)
    except FileNotFoundError:
        raise _cannot(checkpoint, f"{COMPLETE} is missing, so it was not written to its end") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise _cannot(checkpoint, f"{COMPLETE} is damaged")
    for name in (*NEEDED, *body["files"]):
        if name not in body["files"]:
            raise _cannot(checkpoint, f"it was written without {name}")
        if not (checkpoint / name).is_file():
            raise _cannot(checkpoint, f"{name} is missing")
    found = directory.entries(checkpoint.parent, checkpoint.name)
    for name, (size, digest) in body["files"].items():
        entry = found[f"{checkpoint.name}/{name}"]
        if entry.size != size:
            raise _cannot(checkpoint, f"{name} is damaged: {entry.size} bytes, expected {size}")
        if entry.digest != digest:
            raise _cannot(checkpoint, f"{name} is damaged: its {size} bytes are not those that were written")
    return body["facts"]


def options(checkpoint: Path) -> dict[str, Any]:
    """The options of a verified checkpoint's run."""
    return json.loads((checkpoint / OPTIONS).read_text(encoding="utf-8"))


def _cannot(checkpoint: Path, why: str) -> MoeloraError:
    return MoeloraError(f"{checkpoint} cannot be resumed: {why}. --overwrite starts anew")


def _digest(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()
