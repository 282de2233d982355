"""`make test` itself: what it counts and says, and that no process outlives it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import outcomes
import psutil
import pytest
import run
import side_by_side
from rows import Run

TESTS = Path(__file__).resolve().parent
RUN = Run("some", "some tests", (), note="on a toy")

SOME = """
import pytest
def test_passes(): pass
def test_fails(): assert False
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.skipif(True, reason="no such machine")
def test_elsewhere(n): pass
@pytest.fixture
def breaks():
    yield
    raise OSError
def test_breaks_at_the_end(breaks): pass
"""
ABSENT = "import pytest\npytest.skip('no \"such\" package', allow_module_level=True)\n"


def outcome_of(folder: Path, *arguments: str) -> outcomes.Outcome:
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return outcomes.read(RUN, report, done.returncode, 1.0)


def test_what_is_counted(tmp_path, capsys):
    (tmp_path / "test_some.py").write_text(SOME)
    (tmp_path / "test_absent.py").write_text(ABSENT)
    found = outcome_of(tmp_path)
    assert (found.passed, found.failed, found.skipped) == (1, 2, 3)
    assert found.skips == {"no such machine": 2, 'no "such" package': 1}
    absent, left = (Run("gpu", "", ()), "there is none"), Run("fuzz", "", (), long=True)
    assert outcomes.summarize([found], [absent], [left], 61.2) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("some  FAILED") and line.endswith("  on a toy") for line in lines)
    assert lines[-1] == "1 passed, 2 failed, 3 skipped in 61 s"
    assert "some      2  no such machine" in lines and "gpu   not here: there is none" in lines
    assert any("fuzz" in line and "RUNS=long" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("-k", "passes"), ""),
        (("-k", "elsewhere"), "no test ran"),
        (("-k", "nothing"), "pytest ended with status 5"),
        (("--no-such-option",), "ended with status 4 before pytest reported"),
    ],
)
def test_a_run_that_tests_nothing_has_failed(tmp_path, arguments, error):
    (tmp_path / "test_some.py").write_text(SOME)
    found = outcome_of(tmp_path, *arguments)
    assert found.error == error and found.bad == bool(error)
    assert outcomes.summarize([found], [], [], 1) == bool(error)


def test_what_the_machine_does_not_need_runs_by_name_only():
    impossible = replace(RUN, why_not=lambda: "there is none", spare=lambda: "real")
    spare = replace(RUN, spare=lambda: "real")
    assert [run.reason_against(r, []) for r in (RUN, spare, impossible)] == [None, "real", "there is none"]
    assert [run.reason_against(r, ["some"]) for r in (spare, impossible)] == [None, "there is none"]


STARTS_OTHERS = """
import functools, pathlib, signal, sys
import side_by_side
command = ["sh", "-c", "sleep 1000 & echo $!; wait"]
if {deaf}:
    command = ["sh", "-c", "trap '' TERM; echo $$; while :; do sleep 1000; done"]
logs = [pathlib.Path(sys.argv[1]) / name for name in ("one", "two", "three")]
with side_by_side.processes() as processes:
    side_by_side.in_order([functools.partial(processes.run, command, log) for log in logs], 2)
"""


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_that_was_started(tmp_path, number, deaf):
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n" + STARTS_OTHERS.format(deaf=deaf)
    if number == signal.SIGINT:  # whoever runs these tests may ignore it
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code
    caller = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    logs, deadline = [tmp_path / "one", tmp_path / "two"], time.monotonic() + 60
    while time.monotonic() < deadline and not all(log.exists() and log.read_text() for log in logs):
        time.sleep(0.05)
    started = [psutil.Process(int(log.read_text())) for log in logs]
    caller.send_signal(number)
    _, errors = caller.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive
    assert not (tmp_path / "three").exists()


def test_the_next_one_starts_when_one_is_done(tmp_path):
    with side_by_side.processes() as processes:

        def call(n: int) -> int:
            return processes.run(
                [sys.executable, "-c", f"print({n}); raise SystemExit({n})"], tmp_path / str(n)
            )

        assert side_by_side.in_order([lambda n=n: call(n) for n in range(5)], 2) == [0, 1, 2, 3, 4]
    assert [(tmp_path / str(n)).read_text() for n in range(5)] == [f"{n}\n" for n in range(5)]


def test_every_run_is_named_and_described():
    command = [sys.executable, str(TESTS / "run.py")]
    # What the caller's shell has is nothing to a run.
    environ = os.environ | {"MOELORA_ISA": "none", "MOELORA_BATCH_INVARIANT": "on"}
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, env=environ).stdout
    assert {"suite", "triton", "sanitizers", "races", "portable", "fuzz"} <= {
        line.split()[0] for line in listed.splitlines()
    }
    done = subprocess.run([*command, "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and "no such run: nothing" in done.stderr
