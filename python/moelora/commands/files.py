"""Data files into rows, through the readers of `datasets`."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Value, load_dataset

from moelora.commands.directory import PRIVATE
from moelora.disk import below
from moelora.errors import MoeloraError, one_line

# What a file's name ends with → the reader. Prose is one text a file.
READERS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".tex", ".py", ""), "text"),
}
PACKED = ".gz"
# Columns that rows are recognised by, so that a line of them at the head of a text makes it a table.
COLUMNS = {"text", "messages", "conversations", "prompt", "completion", "instruction", "output"}
_COLUMN = re.compile(r"[a-z_][\w-]*")
LOOKED_AT = 20  # lines of a text that begins like JSON: one of them may be damaged
_BYTE = re.compile("[\udc80-\udcff]")  # that was not decoded
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


def find(paths: list[str], anything_is_text: bool = False) -> tuple[list[tuple[Path, str]], int]:
    """The data files in `paths` with their readers, directories searched, and how many others lie in these.

    Raises: MoeloraError naming a path that is missing or of no known kind.
    """
    found: list[tuple[Path, str]] = []
    skipped = 0
    for path in map(Path, paths):
        if not path.is_dir():
            found.append((path, _reader(path, anything_is_text)))
            continue
        inside = below(path)
        texts = [p for p in inside if _suffix(p) in READERS and _suffix(p) and not _of_a_run(p, path)]
        known = [(p, READERS[_suffix(p)]) for p in texts]
        if not known:
            raise MoeloraError(f"{path} has no data files in it: expected names in {_known()}")
        skipped += len(inside) - len(known)
        found += known
    return found, skipped


def read(path: Path, reader: str, anything_is_text: bool = False) -> Dataset:
    """The rows of a file; for prose one row with the column `text`.

    Raises: MoeloraError naming the file, and the line where that can be told, if it is not what it should be.
    """
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise MoeloraError(f"cannot read {path}: {error.strerror}") from None
    if reader == "json":
        _refuse_no_characters(path)
    options = _csv_options(path) if reader == "csv" else {}
    if reader == "csv":
        _refuse_torn_cells(path)
    if reader == "text":
        options = {"sample_by": "document", "encoding": "utf-8-sig"}
    try:
        rows = _load(path, reader, options)
    except Exception as error:  # whatever pandas, pyarrow and gzip raise, and there is no list of it
        raise _explained(path, reader, error) from None
    if (
        rows is None
        or not len(rows)
        or not rows.column_names
        or (reader == "text" and not (rows[0]["text"] or "").strip())
    ):
        raise MoeloraError(f"{path} is empty, expected text")
    if reader == "text" and not anything_is_text:
        _refuse_disguised(path, rows[0]["text"])
    return rows


def _load(path: Path, reader: str, options: dict[str, Any]) -> Dataset | None:
    datasets.disable_progress_bars()
    datasets.disable_caching()  # a cache knows files by name and time, not by what is in them
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return load_dataset(
            reader,
            data_files=[_plainly_named(path, reader)],
            split="train",
            cache_dir=_scratch().name,
            **options,
        )
    except StopIteration:  # an empty file
        return None
    except Exception as error:  # as above
        if any("corresponds to no data" in str(cause) for cause in _causes(error)):
            return None  # nothing but blanks, brackets or a header
        raise


def _plainly_named(path: Path, reader: str) -> str:
    """The file under a name that `datasets` takes for no pattern and no address, unpacked where the reader
    unpacks nothing: that of Parquet seeks.
    """
    folder = Path(tempfile.mkdtemp(dir=_scratch().name))
    packed = path.name.lower().endswith(PACKED)
    if packed and reader == "parquet":
        with gzip.open(path) as source, (folder / "data").open("wb") as file:
            shutil.copyfileobj(source, file)
    else:
        (folder / "data").symlink_to(path.absolute())
    return glob.escape(str(folder / "data"))


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    """Where `datasets` keeps rows of files: mapped from disk, gone with the process."""
    return tempfile.TemporaryDirectory(prefix="moelora-data-")


def _of_a_run(path: Path, top: Path) -> bool:
    """Whether a run has written it: no data, though it may end in .json."""
    return any((folder / PRIVATE).is_dir() for folder in path.parents if top in folder.parents)


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(PACKED)
    return Path(name).suffix


def _known() -> str:
    return ", ".join(suffix for suffix in READERS if suffix) + f", each also with {PACKED}"


def _reader(path: Path, anything_is_text: bool) -> str:
    if not path.exists():
        raise MoeloraError(f"cannot read {path}: No such file or directory")
    if not path.is_file():
        raise MoeloraError(
            f"cannot read {path}: it is a pipe or a device, expected a file, which is read twice"
        )
    if anything_is_text and READERS.get(_suffix(path)) is None:
        return "text"
    if _suffix(path) not in READERS:
        raise MoeloraError(
            f"{path} is of no known kind: expected a name in {_known()}. If it is plain text, --format text"
        )
    return READERS[_suffix(path)]


def _open(path: Path):
    """The file as text, unpacked; lone bytes stay visible to whoever looks for them."""
    opener = gzip.open if path.name.lower().endswith(PACKED) else open
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")


def _csv_options(path: Path) -> dict[str, Any]:
    """Every cell is text as it stands; only an empty one is null."""
    separator = _separator(path)
    csv.field_size_limit(sys.maxsize)  # a cell may be a document
    try:
        with _open(path) as file:
            rows = csv.reader(file, delimiter=separator)
            header, first = next(rows, []), next(rows, [])
    except (OSError, EOFError, csv.Error) as error:
        raise MoeloraError(f"cannot read {path}: {one_line(error)}") from None
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise MoeloraError(f"{path} has two columns of the name {twice!r}: expected one")
    if len(first) > len(header):  # pandas would take the first column for names of rows
        raise MoeloraError(
            f"{path} line 2 has {len(first)} fields, expected the {len(header)} of its first line"
        )
    features = Features({name: Value("string") for name in header})
    return (
        {"sep": separator, "features": features, "keep_default_na": False, "na_values": [""]}
        if header
        else {}
    )


def _separator(path: Path) -> str:
    return "\t" if _suffix(path) == ".tsv" else ","


def _refuse_torn_cells(path: Path) -> None:
    """pandas closes a stray quote wherever the next one is, and makes one row of all that lies between."""
    before = 0
    try:
        with _open(path) as file:
            rows = csv.reader(file, delimiter=_separator(path), strict=True)
            for _ in rows:
                before = rows.line_num
    except csv.Error as error:
        raise MoeloraError(
            f"{path} line {before + 1}: a cell that begins with a quote goes on behind the next one or never "
            f"ends ({one_line(error)}): expected quotes within it to be doubled"
        ) from None
    except (OSError, EOFError) as error:
        raise MoeloraError(f"cannot read {path}: {one_line(error)}") from None


def _refuse_disguised(path: Path, text: str) -> None:
    """Rows of JSON are never prose, whatever their file is called, nor is a table with columns of ours."""
    _refuse_table(path, text)
    start = text.lstrip()[:1]
    if start not in ("{", "["):
        return
    for candidate in (*text.lstrip().split("\n", LOOKED_AT)[:LOOKED_AT], text):
        try:
            rows = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(rows, dict) or (isinstance(rows, list) and rows and isinstance(rows[0], dict)):
            raise MoeloraError(
                f"{path} is JSON under a name for plain text: call it .jsonl or .json, or give --format text"
            )


def _refuse_table(path: Path, text: str) -> None:
    lines = [line for line in text.split("\n", LOOKED_AT)[:LOOKED_AT] if line.strip()]
    for comma in (",", "\t"):
        columns = [name.strip().lower() for name in next(csv.reader(lines[:1], delimiter=comma), [])]
        named = len(columns) > 1 and all(map(_COLUMN.fullmatch, columns))
        if named and len(lines) > 1 and COLUMNS.intersection(columns):
            kind = "csv" if comma == "," else "tsv"
            raise MoeloraError(
                f"{path} begins with the columns {', '.join(columns[:4])} under a name for plain text: call "
                f"it .{kind}, or give --format text if it is prose"
            )


def _refuse_no_characters(path: Path) -> None:
    """Readers take bytes that are not UTF-8 as they are, or empty a field with half of a surrogate pair."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if _BYTE.search(line):
                    raise MoeloraError(f"{path} is not UTF-8 text: a byte of line {number} is none of it")
                if _SURROGATE.search(line) and _lone(line):
                    raise MoeloraError(
                        f"{path} line {number}: half of a surrogate pair, which is no character"
                    )
    except (OSError, EOFError) as error:
        raise MoeloraError(f"cannot read {path}: {one_line(error)}") from None


def _lone(line: str) -> bool:
    """Whether escapes in a line of JSON stand for half a character."""
    units = re.findall(r"(?:\\\\|\\u[0-9a-fA-F]{4}|\\.|[^\\])", line)
    expected = False  # the second half
    for unit in units:
        code = int(unit[2:], 16) if unit.startswith("\\u") else 0
        second = 0xDC00 <= code < 0xE000
        if second != expected:
            return True
        expected = 0xD800 <= code < 0xDC00
    return expected


def _explained(path: Path, reader: str, error: Exception) -> MoeloraError:
    """What is wrong with a file, in a line; the libraries tell neither its name nor the line."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, UnicodeDecodeError):
            return MoeloraError(f"{path} is not UTF-8 text: {cause.reason} at byte {cause.start}")
    if reader == "json":
        lines = _bad_lines(path)
        if (found := next(lines, None)) is not None:
            return found
    kind = {"json": "JSON", "csv": "comma- or tab-separated", "parquet": "Parquet"}.get(reader, "text")
    return MoeloraError(f"{path} is not {kind}: {one_line(chain[-1])}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class _Twice(Exception):
    """A field that an object has more than once."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(repr(next(name for name in names if names.count(name) > 1)))
    return found


def _bad_lines(path: Path) -> Iterator[MoeloraError]:
    with _open(path) as file:
        text = file.read()
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            yield MoeloraError(f"{path} line {error.lineno} is not JSON: {error.msg}")
        return
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line, object_pairs_hook=_once) if line.strip() else {}
        except _Twice as name:
            yield MoeloraError(f"{path} line {number} has the field {name} twice")
            continue
        except json.JSONDecodeError as error:
            yield MoeloraError(f"{path} line {number} is not JSON: {error.msg}")
            continue
        if not isinstance(row, dict):
            yield MoeloraError(f"{path} line {number}: expected an object, got {type(row).__name__}")
