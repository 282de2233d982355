"""The options of a run as a YAML file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from moelora.commands import options
from moelora.errors import MoeloraError, one_line

_NOT_WRITTEN = {"config", "dry_run", "output", "overwrite", "resume"}  # they are about one call
_PATHS = ("model", "data", "eval_data", "chat_template", "cache_dir")


def parse(argv: list[str] | None) -> dict[str, Any]:
    """The options that were given, those of `--config` among them, by name; `command` is one.

    Raises: MoeloraError if the file cannot be read or has something else in it. SystemExit as argparse does.
    """
    explicit = vars(options.parser().parse_args(argv))
    options.check_places(explicit)
    path = explicit.pop("config", None)
    if path is not None:
        listed = options.parser().parse_args([explicit["command"], *_arguments(Path(path))])
        explicit = {**vars(listed), **explicit}
    return explicit


def _arguments(path: Path) -> list[str]:
    """The file as a command line, so that it is checked as one."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise MoeloraError(f"cannot read --config {path}: {one_line(error)}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise MoeloraError(f"--config {path}{line} is not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, dict):
        raise MoeloraError(
            f"--config {path}: expected options with their values, got {type(content).__name__}"
        )
    arguments = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in options.DEFAULTS or name == "config":
            raise MoeloraError(f"--config {path}: {key} is no option")
        flag = "--" + name.replace("_", "-")
        switch = isinstance(options.DEFAULTS[name], bool)
        if switch and not isinstance(value, bool):
            raise MoeloraError(f"--config {path}: {key} is {value!r}, expected true or false")
        if switch:
            arguments += [flag] if value else []
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)] if value else []
        elif value is not None:
            arguments.append(f"{flag}={value}")
    return arguments


def written(chosen: dict[str, Any]) -> str:
    """The options of a run as such a file, for the same run elsewhere."""
    kept = {name: value for name, value in chosen.items() if name not in _NOT_WRITTEN and value is not None}
    for name in _PATHS:
        if isinstance(kept.get(name), list):
            kept[name] = [os.path.abspath(path) for path in kept[name]]
        elif name in kept:
            kept[name] = os.path.abspath(kept[name])
    return yaml.safe_dump(kept, sort_keys=True, allow_unicode=True)
