"""Data files as people have them: recognised and read as what they are, or refused by name."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from datasets import Dataset
from moelora import MoeloraError
from moelora.commands import formats

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TURNS = [USER, BOT]


def _lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _read(path: Path | list[Path], **options: object) -> formats.Rows:
    paths = path if isinstance(path, list) else [path]
    given = {"wanted": None, "text_field": None, "template": True} | options
    return formats.read([str(p) for p in paths], **given)


def _write(directory: Path, name: str, content: bytes) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


BOM = b"\xef\xbb\xbf"
PAIR = {"prompt": "2+2=", "completion": "4"}
ASKED = {
    "prompt": [{"role": "user", "content": "add\n\n1 2"}],
    "completion": [{"role": "assistant", "content": "3"}],
}


@pytest.mark.parametrize(
    ("name", "content", "format", "rows"),
    [
        ("a.jsonl", _lines({"text": "x", "n": 1}, {"text": "y"}), "text", [{"text": "x"}, {"text": "y"}]),
        ("a.jsonl", BOM + b'{"text": "x"}\r\n\r\n{"text": "y"}\r\n', "text", [{"text": "x"}, {"text": "y"}]),
        ("a.jsonl.gz", _lines({"text": "x"}), "text", [{"text": "x"}]),
        ("a.json", b'[{"text": "x"},\n {"text": "y"}]', "text", [{"text": "x"}, {"text": "y"}]),
        ("a.json", BOM + b'[{"text": "x"}]', "text", [{"text": "x"}]),
        ("a.json", b'{"text": "\\ud83d\\ude00"}\n', "text", [{"text": "😀"}]),
        ("a.csv", BOM + b'text,n\r\n"a, ""b""\r\nc",1\r\n', "text", [{"text": 'a, "b"\r\nc'}]),
        ("a.csv", b"text\nNA\n007\n", "text", [{"text": "NA"}, {"text": "007"}]),
        ("a.tsv.gz", b"text\tn\na,b\t1\n", "text", [{"text": "a,b"}]),
        ("a.txt", BOM + b"one\r\ntwo\r\n", "text", [{"text": "one\ntwo\n"}]),
        ("a", b"no name to go by", "text", [{"text": "no name to go by"}]),
        ("a.txt", b"{this is no JSON}", "text", [{"text": "{this is no JSON}"}]),
        ("a.jsonl", _lines({"messages": TURNS}), "chat", [{"messages": TURNS}]),
        (
            "a.jsonl",
            _lines({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
            "chat",
            [{"messages": TURNS}],
        ),
        (
            "a.csv",
            b'messages\n"' + json.dumps(TURNS).replace('"', '""').encode() + b'"\n',
            "chat",
            [{"messages": TURNS}],
        ),
        ("a.jsonl", _lines(PAIR), "prompt-completion", [PAIR]),
        ("a.jsonl", _lines({"prompt": [USER], "completion": [BOT]}), "prompt-completion", None),
        ("a.csv", b"instruction,input,output\nadd,1 2,3\n", "instruction", [ASKED]),
    ],
)
def test_formats_are_recognised(tmp_path, name, content, format, rows):
    found = _read(_write(tmp_path, name, content))
    assert found.format == format
    assert not found.dropped
    assert rows is None or list(found.rows) == rows


def test_parquet(tmp_path):
    Dataset.from_list([{"messages": TURNS, "id": 1}]).to_parquet(tmp_path / "a.parquet")
    assert list(_read(tmp_path / "a.parquet").rows) == [{"messages": TURNS}]


def test_a_document_in_a_cell(tmp_path):
    long = "long " * 40_000
    assert list(_read(_write(tmp_path, "a.csv", f"text\n{long}\n".encode())).rows) == [{"text": long}]


def test_parquet_within_gz(tmp_path):
    Dataset.from_list([{"text": "x"}]).to_parquet(tmp_path / "a.parquet")
    packed = _write(tmp_path, "b.parquet.gz", (tmp_path / "a.parquet").read_bytes())
    assert list(_read(packed).rows) == [{"text": "x"}]


def test_instructions_without_a_template_become_text(tmp_path):
    path = _write(tmp_path, "a.jsonl", _lines({"instruction": "add", "input": None, "output": "3"}))
    (row,) = _read(path, template=False).rows
    assert row["prompt"].endswith("### Instruction:\nadd\n\n### Response:\n") and row["completion"] == "3"


def test_messages_keep_only_what_they_have(tmp_path):
    """Readers make all messages alike, with nulls, which templates would take for calls of tools."""
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    path = _write(tmp_path, "a.jsonl", _lines({"messages": TURNS}, {"messages": [USER, called]}))
    assert list(_read(path).rows) == [{"messages": TURNS}, {"messages": [USER, called]}]


def test_what_has_nothing_to_learn_is_counted(tmp_path):
    rows = [{"text": "x"}, {"text": None}, {"text": " \n"}, {"text": None}]
    found = _read(_write(tmp_path, "a.jsonl", _lines(*rows)))
    assert len(found.rows) == 1
    assert found.dropped == {
        'rows with nothing in "text" (null)': 2,
        'rows with nothing in "text" (blank)': 1,
    }
    assert '2 rows with nothing in "text" (null)' in found.told()
    chats = [{"messages": TURNS}, {"messages": [USER]}, {"messages": []}, {"messages": None}]
    found = _read(_write(tmp_path, "b.jsonl", _lines(*chats)))
    assert len(found.rows) == 1 and sum(found.dropped.values()) == 3


def test_directories_and_several_files(tmp_path):
    _write(tmp_path, "d/b.csv", b"text\nb\n")
    _write(tmp_path, "d/a/a.jsonl.gz", _lines({"text": "a"}))
    _write(tmp_path, "d/README.html", b"<html>")
    _write(tmp_path, "d/.git/config.txt", b"hidden")
    _write(tmp_path, "c.txt", b"c")
    found = _read([tmp_path / "d", tmp_path / "c.txt"])
    assert sorted(found.rows["text"]) == ["a", "b", "c"]
    assert found.dropped == {"other files in the directories": 1}
    (tmp_path / "empty").mkdir()
    with pytest.raises(MoeloraError, match="has no data files in it"):
        _read(tmp_path / "empty")


@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "a?.jsonl", "a*.jsonl", "zip::a.jsonl", "[2024] a/a.jsonl", "a#b.jsonl"]
)
def test_names_that_look_like_patterns(tmp_path, name):
    """`datasets` would look for others by them."""
    for other in ("a1.jsonl", "2 a/a.jsonl"):
        _write(tmp_path, other, _lines({"text": "other"}))
    for suffix in ("", ".gz"):
        assert _read(_write(tmp_path, name + suffix, _lines({"text": "x"}))).rows["text"][:] == ["x"]


def test_what_runs_wrote_is_no_data(tmp_path):
    _write(tmp_path, "a.jsonl", _lines({"text": "a"}))
    _write(tmp_path, "out/.moelora/manifest.json", b"{}")
    _write(tmp_path, "out/log.jsonl", _lines({"text": "step"}))
    found = _read(tmp_path)
    assert found.rows["text"][:] == ["a"] and found.dropped == {"other files in the directories": 1}


def test_a_directory_that_cannot_be_read(tmp_path, monkeypatch):
    _write(tmp_path, "a.jsonl", _lines({"text": "a"}))
    _write(tmp_path, "closed/b.jsonl", _lines({"text": "b"}))
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(MoeloraError, match=r"cannot read .*closed: Permission denied"):
        _read(tmp_path)


def test_links_in_directories(tmp_path):
    _write(tmp_path, "elsewhere/a.jsonl", _lines({"text": "a"}))
    _write(tmp_path, "d/b.jsonl", _lines({"text": "b"}))
    (tmp_path / "d" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "d")
    assert sorted(_read(tmp_path / "d").rows["text"]) == ["a", "b"]
    (tmp_path / "d" / ".#b.jsonl").symlink_to("editor@machine")  # hidden, as an editor's lock
    assert sorted(_read(tmp_path / "d").rows["text"]) == ["a", "b"]
    (tmp_path / "d" / "gone.jsonl").symlink_to("/no/such")
    with pytest.raises(MoeloraError, match=r"gone\.jsonl: it is a link to nothing"):
        _read(tmp_path / "d")


def test_a_pipe_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(MoeloraError, match=r"pipe\.jsonl: it is a pipe or a device"):
        _read(tmp_path / "pipe.jsonl")


def test_files_whose_messages_differ_come_together(tmp_path):
    called = {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}
    paths = [
        _write(tmp_path, f"{i}.jsonl", _lines({"messages": [USER, m]})) for i, m in enumerate((BOT, called))
    ]
    assert [row["messages"][1]["content"] for row in _read(paths).rows] == ["a", "a"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{oops}\n', {}, "a.jsonl line 2 is not JSON"),
        ("a.json", b'[{"text": "x"},\n{"text": oops}]', {}, "a.json line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud800"}\n', {}, "a.jsonl line 2: half of a surrogate pair"),
        ("a.json", b'[{"text": "x"},\n{"text": "\\udc00"}]', {}, "a.json line 2: half of a surrogate pair"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', {}, 'a.jsonl row 2: expected text in "text", got int'),
        ("a.jsonl", b'{"text": "\xff"}\n', {}, "a.jsonl is not UTF-8 text"),
        ("a.txt", "é".encode("latin-1"), {}, "a.txt is not UTF-8 text"),
        ("a.txt", "ab".encode("utf-16"), {}, "a.txt is not UTF-8 text"),
        ("a.txt", b' {"text": "x"}\n{"text": "y"}\n', {}, "a.txt is JSON under a name for plain text"),
        ("a.txt", b'[{"text":\n"x"}]', {}, "a.txt is JSON under a name for plain text"),
        (
            "a.txt",
            b"id,text\n1,x\n",
            {},
            "begins with the columns id, text under a name for plain text: call it .csv",
        ),
        (
            "a.md",
            b"\nPrompt\tCompletion\nx\ty\n",
            {},
            "begins with the columns prompt, completion under a name for plain text",
        ),
        ("a.docx", b"PK", {}, "a.docx is of no known kind: expected a name in .jsonl"),
        ("a.csv", b"a,b\n1,2\n", {}, "a.csv is of no known format, it has the fields a, b"),
        ("a.csv", b"text,b\n1,2,3\n", {}, "a.csv line 2 has 3 fields, expected the 2 of its first line"),
        ("a.csv", b"text,b\n1,2\n1,2,3\n", {}, "a.csv is not comma- or tab-separated: Error tokenizing data"),
        ("a.csv", b'text\nx\n"open\n', {}, "a.csv line 3: a cell that begins with a quote"),
        ("a.tsv", b'text\tn\n"a" b\t1\n', {}, "a.tsv line 2: a cell that begins with a quote"),
        ("a.csv", b"text,text\nx,y\n", {}, "a.csv has two columns of the name 'text'"),
        ("a.csv", b"text,n\n", {}, "a.csv is empty"),
        ("a.jsonl", b"{}\n{}\n", {}, "a.jsonl is empty"),
        ("a.json", b"[]", {}, "a.json is empty"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "x", "text": "y"}\n',
            {},
            "a.jsonl line 2 has the field 'text' twice",
        ),
        ("a.txt", b'{oops}\n{"text": "x"}\n', {}, "a.txt is JSON under a name for plain text"),
        ("a.parquet", b"PAR1", {}, "a.parquet is not Parquet"),
        ("a.jsonl.gz", b"", {}, "a.jsonl.gz is empty"),
        ("a.jsonl", b"", {}, "a.jsonl is empty"),
        ("a.txt", b" \n", {}, "a.txt is empty"),
        (
            "a.jsonl",
            _lines({"text": "x", "messages": TURNS}),
            {},
            "has the fields of text and of chat: say which with",
        ),
        (
            "a.jsonl",
            _lines({"text": "x"}),
            {"wanted": "chat"},
            'expected rows with "messages" or "conversations"',
        ),
        (
            "a.jsonl",
            _lines({"text": "x"}),
            {"text_field": "body"},
            'expected rows with "body", got the fields text',
        ),
        ("a.txt", b"prose", {"wanted": "chat"}, "a.txt is plain text, expected rows of format chat"),
        ("a.jsonl", _lines({"messages": "hi"}), {}, 'row 1: "messages" is not JSON'),
        (
            "a.jsonl",
            _lines({"messages": [{"content": "x"}]}),
            {},
            'row 1: expected a "role" in every message',
        ),
        ("a.jsonl", _lines({"text": None}), {}, "nothing to train on"),
    ],
)
def test_what_is_not_recognised_is_refused(tmp_path, name, content, options, message):
    with pytest.raises(MoeloraError) as error:
        _read(_write(tmp_path, name, content), **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_gz_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(_lines({"text": "x" * 1000}))[:-12])
    with pytest.raises(MoeloraError, match=r"a\.jsonl\.gz"):
        _read(path)


def test_files_of_two_formats_are_refused(tmp_path):
    paths = [_write(tmp_path, "a.txt", b"x"), _write(tmp_path, "b.jsonl", _lines(PAIR))]
    with pytest.raises(
        MoeloraError, match=r"files of one format, got several: .*a.txt is text, .*b.jsonl is prompt"
    ):
        _read(paths)


def test_named_formats_and_fields(tmp_path):
    path = _write(tmp_path, "a.jsonl", _lines({"text": "x", "body": "y", "messages": TURNS}))
    assert _read(path, wanted="chat").format == "chat"
    assert list(_read(path, text_field="body").rows) == [{"text": "y"}]
    page = _write(tmp_path, "a.html", b'{"text": "as it is"}')
    assert list(_read(page, wanted="text").rows) == [{"text": '{"text": "as it is"}'}]


def test_prose_is_no_table(tmp_path):
    """Commas and known words at its head, and a table that is said to be text."""
    for content in (b"Text, messages and more\nfollow here, as ever\n", b"text,output\n", b"a,b\n1,2\n"):
        assert _read(_write(tmp_path, "a.txt", content)).format == "text"
    path = _write(tmp_path, "b.txt", b"id,text\n1,x\n")
    assert _read(path, wanted="text").format == "text"
