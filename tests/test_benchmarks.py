"""The benchmark, end to end at sizes where it takes no time; what it measures is not looked at."""

import ast
import json
import signal
import subprocess
import sys
from dataclasses import replace
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import torch_moelora

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed


from benchmarks import correctness, markdown, operators, options, remote, run
from benchmarks.layer import Case, make_batch, make_layer
from benchmarks.peers import find_contestant
from benchmarks.peers.base import AutogradRunner
from benchmarks.registry import GPT_OSS_GLU, SHAPES, Shape, shape_from_config
from benchmarks.routing import ROUTINGS, route
from benchmarks.timing import interleave

ROOT = Path(__file__).parents[1]
TINY = Shape("tiny", 6, 64, 32, 2)
TINY_GPT_OSS = Shape("tiny-gpt-oss", 5, 32, 48, 2, bias=True, transposed=True, glu=GPT_OSS_GLU)
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "num_experts": TINY.experts,
    "hidden_size": TINY.hidden,
    "intermediate_size": 999,  # that of dense layers
    "moe_intermediate_size": TINY.inner,
    "num_experts_per_tok": TINY.top_k,
    "hidden_act": "silu",
}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only wait for one another at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model_directory(tmp_path) -> Path:
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(QWEN3_MOE))
    return directory


@pytest.fixture
def quick(monkeypatch):
    """No processes to try contestants out in: those have tests of their own."""
    monkeypatch.setattr(remote, "try_out", lambda *_: 1000)
    monkeypatch.setattr(remote, "product_rates", lambda dtypes, _: dict.fromkeys(dtypes, 1e9))


def _case(shape: Shape = TINY, dtype: str = "bf16", **fields) -> Case:
    return Case(shape, 24, 8, **{"dtype": dtype, "lora_dtype": dtype, **fields})


def _arguments(directory: Path, output: Path, *more: str) -> list[str]:
    fixed = ["--tokens", "20", "--rank", "8", "--repeats", "2", "--warmups", "1", "--threads", "1"]
    given = ["--rate", "100", "--bandwidth", "10", "--output", str(output), "--fresh-memory"]
    return ["--shape", str(directory), *fixed, *given, *more]


def _saved(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def _imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, within functions too: `peers.loop` for peers/loop.py."""
    package = path.relative_to(ROOT / "benchmarks").with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            stem = [part for part in base if part]
            found.add(".".join(stem))
            found |= {".".join([*stem, alias.name]) for alias in node.names}
    return found


def test_no_two_modules_import_each_other():
    files = {p.relative_to(ROOT / "benchmarks"): p for p in (ROOT / "benchmarks").rglob("*.py")}
    names = {".".join(p.with_suffix("").parts).removesuffix(".__init__"): path for p, path in files.items()}
    graph = {name: _imported(path) & set(names) - {name} for name, path in names.items()}
    assert "peers.base" in graph["peers.loop"] and "memory" in graph["run"]
    TopologicalSorter(graph).prepare()  # raises where there is a circle


# Numbers that the kernels' targets are stated in.
@pytest.mark.parametrize(
    ("name", "tokens", "gigaflops"), [("qwen3-30b-a3b", 2048, 309.2), ("mixtral-8x7b", 512, 721.6)]
)
def test_base_flops_of_registered_shapes(name, tokens, gigaflops):
    assert SHAPES[name].base_flops(tokens) / 1e9 == pytest.approx(gigaflops, rel=1e-3)


def test_shape_from_a_config_directory(model_directory):
    assert shape_from_config(model_directory) == replace(TINY, glu={"act": "silu"})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # A multimodal model keeps its language model's numbers one level down.
        ({"model_type": "outer", "text_config": QWEN3_MOE}, replace(TINY, glu={"act": "silu"})),
        (
            {
                "model_type": "gpt_oss",
                "num_local_experts": TINY.experts,
                "hidden_size": TINY.hidden,
                "intermediate_size": TINY.inner,
                "num_experts_per_tok": TINY.top_k,
            },
            replace(TINY, bias=True, transposed=True, glu=GPT_OSS_GLU),
        ),
    ],
)
def test_shape_from_other_configs(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_from_config(tmp_path) == replace(expected, name=tmp_path.name)


@pytest.mark.parametrize("kind", ROUTINGS)
def test_routing_gives_each_token_distinct_experts(kind):
    idxs = route(kind, 64, 16, 4, torch.Generator().manual_seed(0))
    assert idxs.shape == (64, 4)
    assert all(len(set(row)) == 4 for row in idxs.tolist())
    counts = torch.bincount(idxs.flatten(), minlength=16)
    if kind == "balanced":
        assert counts.max() - counts.min() <= 1
    if kind == "hot":
        assert counts.max() == 64
    if kind == "zipf":
        assert counts.max() > 2 * counts.float().mean()


def test_layers_are_the_same_in_every_process():
    first, second = make_layer(_case()), make_layer(_case())
    assert torch.equal(first.weights["down"], second.weights["down"])
    assert not torch.equal(first.weights["down"][0], first.weights["down"][1])
    assert Case.from_json(json.loads(json.dumps(_case(TINY_GPT_OSS).to_json()))) == _case(TINY_GPT_OSS)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", [TINY, TINY_GPT_OSS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", ["ours", "loop", "peft", "grouped-mm"])
def test_contestants_pass_the_gate(name, shape, dtype):
    case = _case(shape, dtype)
    contestant = find_contestant(name)
    reason = contestant.missing(case)
    if reason:
        pytest.skip(reason)
    layer, batch = make_layer(case), make_batch(case.for_check())
    errors = correctness.errors(contestant.load(layer, 1).results(batch), correctness.expected(layer, batch))
    assert max(errors.values()) <= correctness.TOLERANCE[dtype], errors


@pytest.mark.parametrize("shape", [TINY, TINY_GPT_OSS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", ["ours", "loop"])
def test_single_operators_pass_the_gate(name, shape):
    layer = make_layer(_case(shape))
    found = find_contestant(name).operators()
    for part, call in operators.make_calls(layer, make_batch(_case(shape))).items():
        if call.operator in found:
            got = operators.outputs(call, found[call.operator])
            errors = correctness.errors(got, operators.expected(call, layer))
            assert max(errors.values()) <= correctness.TOLERANCE["bf16"], (part, errors)


def test_run_writes_what_it_found(model_directory, tmp_path, capsys, quick):
    arguments = _arguments(
        model_directory, tmp_path, "--contestants", "ours,loop", "--no-memory", "--routing", "balanced,hot"
    )
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "× balanced" in printed
    isa = torch_moelora.info()["cpu"]["chosen"]["bf16"]
    assert f"instruction set for bf16: {isa}" in printed
    assert (next(tmp_path.glob("*.png"))).stat().st_size > 10_000
    found = _saved(tmp_path)
    switches, program, _ = found["command"].partition("python -m benchmarks.run --shape")
    assert found["instruction_set"] == isa and program and all("=" in word for word in switches.split())
    layer = [row for row in found["rows"] if row["part"] == "layer"]
    keys = {(row["contestant"], row["routing"]) for row in layer}
    assert keys == {(c, r) for c in ("ours", "loop") for r in ("balanced", "hot")}
    for row in found["rows"]:
        assert row["seconds"]["minimum"] <= row["seconds"]["median"] and row["seconds"]["repeats"] == 2
        assert row["floor_seconds"] > 0
    assert {row["part"].split()[0] for row in found["rows"]} - {"layer"} == {
        "flatten_sort_count", "scatter_lora", "scatter_lora_dx", "scatter_lora_dab",
        "scatter_lora_backward", "glu", "glu_backward",
    }  # fmt: skip
    assert found["checks"] and all(check["passed"] for check in found["checks"])


def test_json_on_stdout_and_memory_from_a_process_of_its_own(model_directory, tmp_path, capsys):
    arguments = _arguments(model_directory, tmp_path, "--contestants", "ours", "--layer", "--json")
    assert run.main([*arguments, "--no-save"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert 0 < row["peak_memory_beyond_weights_bytes"] < 1e9
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_kept_memory_is_not_faulted_in_again():
    """In processes of its own: what mallopt is told stays."""
    code = """if True:
        import resource, sys, torch
        from benchmarks import memory
        if sys.argv[1] == "keep":
            memory.keep_freed(512 << 20)
            assert memory.keeps_freed()
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        fill = lambda: torch.zeros(40 << 20, dtype=torch.uint8).fill_(1)
        fill()
        before = faults()
        for _ in range(10):
            fill()
        print(faults() - before)
    """

    def faults(how: str) -> int:
        out = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, cwd=ROOT)
        assert out.returncode == 0, out.stderr
        return int(out.stdout)

    assert 5 * faults("keep") < faults("leave")


def test_a_wrong_contestant_is_not_timed(model_directory, tmp_path, monkeypatch, quick):
    contestant = find_contestant("loop")
    right = contestant.load_here

    def load_wrong(layer):
        runner = right(layer)
        runner.views = lambda grads: [grads[0] * 1.5, *grads[1:]]
        return runner

    monkeypatch.setattr(contestant, "load_here", load_wrong)
    arguments = _arguments(model_directory, tmp_path, "--contestants", "ours,loop", "--layer", "--no-memory")
    assert run.main(arguments) == 1
    found = _saved(tmp_path)
    assert {row["contestant"] for row in found["rows"]} == {"ours"}
    assert {check["contestant"] for check in found["checks"] if not check["passed"]} == {"loop"}


def test_a_contestant_that_raises_does_not_end_the_run(model_directory, tmp_path, monkeypatch, quick):
    def load_broken(layer):
        raise RuntimeError("no")

    monkeypatch.setattr(find_contestant("loop"), "load_here", load_broken)
    arguments = _arguments(model_directory, tmp_path, "--contestants", "ours,loop", "--layer", "--no-memory")
    assert run.main(arguments) == 1
    found = _saved(tmp_path)
    assert found["broken"] == [{"shape": "tiny", "contestant": "loop", "reason": "RuntimeError: no"}]
    assert {row["contestant"] for row in found["rows"]} == {"ours"}


def test_what_cannot_run_is_left_out_with_the_reason(model_directory, tmp_path):
    arguments = _arguments(model_directory, tmp_path, "--contestants", "scattermoe")
    assert run.main([*arguments, "--no-memory"]) == 2
    assert not list(tmp_path.glob("*.json"))


def test_a_contestant_in_another_process():
    case = _case()
    with remote.Remote() as process:
        process.ask("load", contestant="loop", case=case.to_json(), threads=1)
        runner = remote.RemoteRunner(process)
        layer, batch = make_layer(case), make_batch(case.for_check())
        errors = correctness.errors(runner.results(batch), correctness.expected(layer, batch))
        assert max(errors.values()) <= correctness.TOLERANCE["bf16"]
        forward, backward = runner.time(make_batch(case))
        assert forward > 0 and backward > 0
        with pytest.raises(RuntimeError, match="KeyError"):
            runner._ask("load", contestant="nobody", case=case.to_json(), threads=1)


@pytest.mark.parametrize("name", ["loop-fp32", "peft-fp32", "grouped-mm-fp32"])
@pytest.mark.parametrize("shape", [TINY, TINY_GPT_OSS], ids=lambda shape: shape.name)
def test_stand_ins_compute_in_fp32(name, shape):
    """From the same bf16 layer and batch, without a rounding to bf16 on the way."""
    case, contestant = _case(shape), find_contestant(name)
    if reason := contestant.missing(case):
        pytest.skip(reason)
    layer, batch = make_layer(case), make_batch(case.for_check())
    runner, other = contestant.load(layer, 1), find_contestant("loop-fp32").load(layer, 1)
    assert runner.weights is other.weights  # twice the layer's memory, once for all
    errors = correctness.errors(runner.results(batch), correctness.expected(layer, batch))
    assert max(errors.values()) <= correctness.TOLERANCE["fp32"], errors
    assert min(runner.time(batch)) > 0
    assert "in fp32" in contestant.missing(_case(shape, "fp32"))


def test_a_hopeless_dtype_gets_stand_ins(model_directory, tmp_path, monkeypatch, capsys, quick):
    monkeypatch.setattr(remote, "product_rates", lambda *_: {"bf16": 0.9e9, "fp32": 160e9})
    arguments = _arguments(model_directory, tmp_path, "--contestants", "loop,ours,loop-fp32", "--layer")
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "loop-fp32 in place of loop: torch.mm of 64 rows does 0.9 GF/s in bf16" in printed
    found = _saved(tmp_path)
    assert [row["contestant"] for row in found["rows"]] == ["loop-fp32", "ours"]
    assert [(note["contestant"], note["by"]) for note in found["replaced"]] == [("loop", "loop-fp32")]
    (path,) = tmp_path.glob("*.json")
    assert "loop **in fp32**" in markdown.render([str(path)])


def test_a_process_that_takes_too_long_is_ended():
    """It cannot even import torch in that time."""
    with remote.Remote(limit=0.01) as process:
        with pytest.raises(remote.Stopped, match=r"stopped after 0.01 s"):
            process.ask("product_rate", dtype="fp32")
        assert process.process.wait(30) == -signal.SIGKILL
    assert remote.product_rates(("fp32",), 0.01) == {"fp32": 0.0}


def test_who_takes_too_long_has_a_row_that_says_so(model_directory, tmp_path, monkeypatch, capsys, quick):
    def try_out(name, case, *_):
        if (name, case.tokens) == ("loop", 20):
            raise remote.Stopped(7)
        return 1000

    monkeypatch.setattr(remote, "try_out", try_out)
    arguments = _arguments(model_directory, tmp_path, "--contestants", "ours,loop", "--layer", "--no-memory")
    assert run.main([*arguments, "--tokens", "20,8"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "stopped" in line)
    assert "20" in line and "loop" in line and "stopped after 7 s" in line
    found = _saved(tmp_path)
    timed = {(row["contestant"], row["tokens"]) for row in found["rows"]}
    assert timed == {("ours", 20), ("ours", 8), ("loop", 8)}
    (row,) = found["stopped"]
    assert (row["contestant"], row["tokens"], row["after_seconds"]) == ("loop", 20, 7)
    (path,) = tmp_path.glob("*.json")
    assert "| stopped after 7 s |" in markdown.render([str(path)])


def test_a_step_that_hangs_after_all_ends_the_run():
    code = """if True:
        import argparse, time
        from benchmarks.suite import Suite
        suite = Suite(argparse.Namespace(device="cpu", limit=0.1), None, None, print)
        suite._watched(lambda: time.sleep(60))()
    """
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "Timeout" in ended.stderr


def test_batch_invariance_is_switched_on_for_its_contestant_alone(
    model_directory, tmp_path, monkeypatch, quick
):
    state, seen = [False], set()
    switch = getattr(torch_moelora, "set_batch_invariant", lambda on: None)

    def recorded(on: bool) -> None:
        state[0] = on
        switch(on)

    original = AutogradRunner._step

    def step(self, *args):
        seen.add((type(self).__name__, state[0]))
        return original(self, *args)

    monkeypatch.setattr(torch_moelora, "set_batch_invariant", recorded, raising=False)
    monkeypatch.setattr(AutogradRunner, "_step", step)
    arguments = _arguments(model_directory, tmp_path, "--contestants", "ours", "--batch-invariant")
    assert run.main([*arguments, "--layer"]) == 0
    assert {row["contestant"] for row in _saved(tmp_path)["rows"]} == {"ours", "ours-batch-invariant"}
    assert seen == {("AutogradRunner", False), ("_InvariantRunner", True)} and state == [False]


def test_an_entry_that_fails_has_no_further_turns():
    turns, lost = [], []

    def fail() -> tuple[float]:
        turns.append("b")
        raise RuntimeError("no")

    entries = {"a": lambda: turns.append("a") or (1.0,), "b": fail}
    times = interleave(entries, 2, 0, lost=lambda key, error: lost.append((key, str(error))))
    assert turns == ["a", "b", "a"] and lost == [("b", "no")] and set(times) == {"a"}


def test_turns_are_interleaved():
    turns = []
    entries = {name: lambda name=name: turns.append(name) or (1.0, 2.0) for name in "ab"}
    times = interleave(entries, repeats=2, warmups=1)
    assert turns == ["a", "b"] * 3
    assert times["a"].median == 3.0 and times["a"].phases == [1.0, 2.0] and times["a"].repeats == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "qwen9"], "unknown shape 'qwen9': one of qwen3-30b-a3b"),
        (["--shape", "."], "config.json"),
        (["--dtype", "fp8"], "unknown 'fp8': one of bf16, fp16, fp32"),
        (["--tokens", "0"], "'0' is not a whole number of at least 1"),
        (["--rank", "a"], "'a' is not a whole number of at least 1"),
        (["--routing", "balanced,lucky"], "unknown 'lucky': one of balanced, random, zipf, hot"),
        (["--contestants", "ours,theirs"], "unknown 'theirs': one of ours"),
        (["--contestants", ","], "at least one value is needed"),
        (["--rate", "-1"], "'-1' is not a number greater than 0"),
        (["--limit", "0"], "'0' is not a number greater than 0"),
        (["--layer", "--operators"], "not allowed with argument"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_mistakes_end_with_status_2_and_a_clear_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        options.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
