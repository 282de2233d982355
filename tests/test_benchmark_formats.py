"""The benchmark of packed weights, at sizes where it takes no time."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from model_tiny import one_thread  # noqa: F401  (autouse)

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed

from benchmarks import correctness, markdown, run
from benchmarks.layer import DISTINCT, Case, make_batch, make_layer
from benchmarks.peers import find_contestant, quantised
from benchmarks.peers.packings import FORMATS
from benchmarks.peers.quantised import contestants_of
from benchmarks.registry import Shape

SMALL = Shape("small", DISTINCT + 3, 256, 128, 2)
OURS = [f"ours-{name}" for name in FORMATS]
BITSANDBYTES = ["bitsandbytes-nf4", "bitsandbytes-fp4-kept", "bitsandbytes-fp4-loop"]


@pytest.mark.parametrize("name", OURS + BITSANDBYTES)
@pytest.mark.parametrize("tokens", [1, 24])
def test_contestants_compute_with_their_own_numbers(name, tokens):
    """One token: some experts have no rows, and no copy."""
    case, contestant = Case(SMALL, tokens, 4), find_contestant(name)
    if reason := contestant.missing(case):
        pytest.skip(reason)
    layer, batch = make_layer(case), make_batch(case)
    got, own = contestant.load(layer, 1).results(batch), contestant.numbers(layer)
    errors = correctness.errors(got, correctness.expected(replace(layer, weights=own), batch))
    assert max(errors.values()) <= correctness.TOLERANCE["bf16"], errors
    rounding = correctness.errors(got, correctness.expected(layer, batch))["y"]
    assert 5e-3 < rounding < 0.3
    assert contestant.weight_bytes(layer) < 0.6 * find_contestant("ours").weight_bytes(layer)


@pytest.mark.parametrize(("suffix", "calls"), [("", 4), ("-kept", 2), ("-loop", 2)])
def test_when_bitsandbytes_makes_copies(suffix, calls, monkeypatch):
    """Of two weights in the forward, and of both again in the backward unless it keeps them."""
    case, contestant = Case(SMALL, 24, 4), find_contestant(f"bitsandbytes-nf4{suffix}")
    if reason := contestant.missing(case):
        pytest.skip(reason)
    made, real = [], quantised._copy
    monkeypatch.setattr(quantised, "_copy", lambda *args: made.append(1) or real(*args))
    contestant.load(make_layer(case), 1).results(make_batch(case))
    assert len(made) == calls


def test_contestants_of_a_format():
    others = [f"bitsandbytes-nf4{suffix}" for suffix in ("", "-kept", "-loop")]
    assert contestants_of(["nf4"]) == ["ours-nf4", *others]
    assert contestants_of(["nf4-nested", "int8"]) == ["ours-nf4-nested", "ours-int8"]
    assert contestants_of(["mxfp4"]) == ["ours-mxfp4", "kt-kernel-mxfp4"]


def test_rows_of_a_format_are_named_in_the_layer_of_its_sizes():
    assert "divide rows of 96" in find_contestant("ours-nf4").missing(Case(replace(SMALL, inner=96), 4, 4))


def test_run_and_table_of_formats(tmp_path, capsys):
    sizes = {"num_experts": 4, "hidden_size": 128, "moe_intermediate_size": 128, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3_moe", "hidden_act": "silu", **sizes})
    )
    out = tmp_path / "out"
    arguments = ["--shape", str(tmp_path), "--tokens", "8,3", "--rank", "4", "--repeats", "1",
                 "--warmups", "1", "--format", "nf4-nested,fp8", "--output", str(out),
                 "--no-memory"]  # fmt: skip
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "GB of" in printed and "original weights" in printed
    (path,) = out.glob("*_layer-formats*.json")
    found = json.loads(path.read_text())
    rows = {(row["contestant"], row["tokens"]): row for row in found["rows"]}
    assert set(rows) == {(c, t) for c in ("ours", "ours-nf4-nested", "ours-fp8") for t in (8, 3)}
    dense = rows["ours", 8]["weight_bytes"]
    assert dense == 4 * 3 * 128 * 128 * 2 and rows["ours-fp8", 8]["weight_bytes"] == dense // 2 + 4 * 3 * 4
    assert rows["ours-fp8", 3]["bytes"] < rows["ours", 3]["bytes"]
    table = markdown.render(["--formats", str(path)]).splitlines()
    assert table[1].startswith("| weights | bits a weight | error of y | 8 tokens | 3 tokens |")
    assert [line.split("|")[1].strip() for line in table[3:6]] == ["dense bf16", "nf4-nested", "fp8"]
    assert markdown.update("\n".join(table)) == "\n".join(table)


def test_formats_want_the_layer(capsys):
    with pytest.raises(SystemExit):
        run.main(["--format", "nf4", "--operators"])
    assert "--format" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--format", "nf5"])
    assert "unknown 'nf5'" in capsys.readouterr().err
