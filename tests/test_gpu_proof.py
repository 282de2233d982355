"""The one command for a GPU, where there is none: its steps' ends, what it writes, what it says."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_proof, options
from benchmarks.gpu_proof import Step
from benchmarks.peers import MODULES
from benchmarks.registry import SHAPES


def python(code: str, limit: float = 30, **fields) -> Step:
    return Step("a step", (sys.executable, "-c", code), limit, **fields)


@pytest.mark.parametrize(
    ("step", "left", "state"),
    [
        (python("print('hello')"), 60, "passed"),
        (python("raise SystemExit(3)"), 60, "failed"),
        (python("import time; time.sleep(60)", limit=0.5), 60, "out of time"),
        (python("raise SystemExit(3)"), 1, "out of time"),
        (python("raise SystemExit(3)", why_not="no such tool"), 60, "not here"),
        (python("import os; raise SystemExit(os.environ['A'] != 'b')", environ=(("A", "b"),)), 60, "passed"),
    ],
    ids=["passed", "failed", "too slow", "not begun", "not here", "environment"],
)
def test_states(step, left, state, tmp_path):
    outcome = gpu_proof.execute(step, tmp_path, left)
    assert outcome.state == state
    if state == "passed" and "hello" in step.command[-1]:
        assert (tmp_path / "a_step.log").read_text() == "hello\n"


def test_nothing_begins_after_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_proof, "save", lambda folder, outcomes: None)
    steps = [python("import time; time.sleep(2)"), python("pass"), python("pass")]
    outcomes = gpu_proof.run(iter(steps), tmp_path, gpu_proof.LEAST + 1)
    assert [outcome.state for outcome in outcomes] == ["passed", "out of time", "out of time"]


def test_steps(tmp_path):
    """Commands that the benchmark understands; every shape, sizes as advertised, every contestant."""
    parser = options.make_parser()
    shapes, contestants, tested = set(), set(), {}
    for step in gpu_proof.make_steps(tmp_path):
        if "benchmarks.run" in step.command:
            parsed = parser.parse_args(step.command[3:])
            shapes |= {shape.name for shape in parsed.shape}
            contestants |= set(parsed.contestants)
            if step.name.startswith("layer"):
                assert parsed.rank == [16, 64] and parsed.tokens is None
        elif "benchmarks.beside" not in step.command:
            tested[step.name] = {argument for argument in step.command if argument.startswith("tests/")}
    every = {*gpu_proof.TESTS, *gpu_proof.ALONE}
    assert tested.pop("sanitizer") == every == set().union(*tested.values())
    assert every == {f"tests/{path.name}" for path in Path(__file__).parent.glob("test_cuda*.py")}
    assert shapes == set(SHAPES)
    assert contestants == {"ours", "peft", "grouped-mm", "scattermoe"} <= set(MODULES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(capsys):
    assert gpu_proof.main([]) == 2
    assert "torch sees no CUDA device here: nothing was run" in capsys.readouterr().err
