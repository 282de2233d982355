"""The tables of Triton configurations, the search that extends them, and rules for the kernels' sources."""

import ast
import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from torch_moelora import switches
from torch_moelora.triton import configs
from torch_moelora.triton.configs import ANY, GEMM, OUTER, Found, Gemm, Key

SOURCES = sorted(Path(configs.__file__).parent.glob("*.py"))
ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "interpreter")
DTYPES = ("half", "tf32", "fp32", "fp64")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch):
    """Lookups as on a Hopper GPU, with the search allowed and its finds in memory only."""
    machine = configs.Machine("sm_90", 132, "a Hopper GPU")
    found = Found(Path("/nonexistent/configs.json"), {"gemm": Gemm, "outer": configs.Outer})
    monkeypatch.setattr(found, "save", lambda: None)
    monkeypatch.setattr(configs, "machine", lambda device: machine)
    monkeypatch.setattr(Found, "of", staticmethod(lambda machine: found))
    monkeypatch.setattr(switches, "SWITCHES", switches.Switches(None, True, False))
    return found


@pytest.mark.parametrize("wanted", ["tf32", "ieee"])
@pytest.mark.parametrize(
    "switch",
    [
        "torch.backends.fp32_precision = {0!r}",
        "torch.backends.cuda.matmul.fp32_precision = {0!r}",
        "torch.backends.cuda.matmul.allow_tf32 = {0!r} == 'tf32'",
        "torch.set_float32_matmul_precision({{'tf32': 'high', 'ieee': 'highest'}}[{0!r}])",
    ],
)
def test_every_switch_for_tf32_is_obeyed(switch, wanted):
    code = f"import torch\n{switch.format(wanted)}\nfrom torch_moelora.triton import configs\n"
    code += "print([configs.precision(dtype) for dtype in (torch.float32, torch.float16)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str([wanted, "ieee"]), done.stderr


@pytest.mark.parametrize("kernel", configs.TABLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_shape_has_a_configuration(arch, dtype, kernel):
    for rows in (0, 1, 95, 96, 97, 100_000):
        config, exact = configs.shipped(Key(kernel, arch, dtype, 7, 9, 16, 16), 3, rows)
        assert config and not exact


@pytest.mark.parametrize("table", [GEMM, OUTER], ids=["gemm", "outer"])
def test_every_row_can_be_reached(table):
    """No row stands behind one that takes all that it would."""
    for i, row in enumerate(table):
        for earlier in table[:i]:
            wider = all(a is None or a == b for a, b in zip(earlier[:4], row[:4], strict=True))
            assert not (wider and earlier[4] >= row[4] and earlier[5] >= row[5]), f"{earlier} hides {row}"


def test_shipped_shapes_take_all_ranks_and_row_counts():
    """Else a search would start at some number of rows after all."""
    named = {row[:4] for row in GEMM if row[2] is not None}
    assert named
    for prefix in named:
        assert any(row[:4] == prefix and row[4:6] == (ANY, ANY) for row in GEMM), prefix


def choose(k: int, n: int, run, rows: int = 1024) -> Gemm:
    return configs.choose("gemm", CUDA, torch.bfloat16, k, n, 16, rows, run)


def test_no_search_at_a_shipped_shape(hopper):
    assert choose(2048, 1536, pytest.fail) == configs.WIDE


def test_no_search_unless_asked(hopper, monkeypatch):
    monkeypatch.setattr(switches, "SWITCHES", switches.Switches(None, False, False))
    assert choose(1000, 1000, pytest.fail) == configs.WIDE


def test_the_search_takes_the_fastest_once_a_bucket(hopper, monkeypatch):
    """Configurations that do not fit the machine drop out; the next call of the bucket searches no more."""
    best = Gemm(64, 128, 64, warps=4, stages=3, group_m=4, per_sm=2, descriptor=True)
    tried = []

    def bench(run, **_):
        run()
        config = tried[-1]
        if config.block_n == 256:
            raise OutOfResources(1 << 20, 1 << 17, "shared memory")
        return 1.0 if config == best else 2.0

    monkeypatch.setattr(configs.triton.testing, "do_bench", bench)
    assert choose(1000, 1000, tried.append) == best
    assert len(tried) > 10 and any(config.block_n == 256 for config in tried)
    count = len(tried)
    assert choose(1000, 1000, tried.append, rows=1000) == best
    assert len(tried) == count
    choose(1000, 1000, tried.append, rows=2000)
    assert len(tried) > count


def test_nothing_runs_leaves_the_table(hopper, monkeypatch):
    def bench(run, **_):
        raise OutOfResources(1 << 20, 1 << 17, "shared memory")

    monkeypatch.setattr(configs.triton.testing, "do_bench", bench)
    assert choose(1000, 1000, lambda config: None) == configs.WIDE


def test_errors_of_the_kernel_are_not_swallowed():
    def bench(run):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        configs.fastest([configs.WIDE], lambda config: None, bench)


def test_finds_survive_on_disk(tmp_path):
    path = tmp_path / "sub" / "configs.json"
    found = Found(path, KINDS)
    found.rows[NAME] = asdict(configs.FLAT)
    found.save()
    assert [p.name for p in path.parent.iterdir()] == ["configs.json"]
    assert Found(path, KINDS).get(KEY, pytest.fail) == configs.FLAT
    json.loads(path.read_text())


KINDS = {"gemm": Gemm, "outer": configs.Outer}
KEY = Key("gemm", "sm_90", "half", 1000, 1000, 16, 64)
NAME = "/".join(map(str, KEY))


@pytest.fixture
def search(monkeypatch):
    """A search that finds FLAT; its calls."""
    calls = []
    monkeypatch.setattr(configs, "fastest", lambda options, run: calls.append(1) or configs.FLAT)
    return calls


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_damaged_file_is_reported_and_ignored(text, tmp_path):
    path = tmp_path / "configs.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="ignoring the configurations in"):
        assert Found(path, {}).rows == {}


FLAT_ROW = asdict(configs.FLAT)
NO_ROWS = {
    "a field that is no more": FLAT_ROW | {"swizzle": 1},
    "a field that was not yet": {"block_m": 64},
    "not a number": FLAT_ROW | {"block_m": "64"},
    "not a row": [64, 128],
}


@pytest.mark.parametrize("row", NO_ROWS.values(), ids=NO_ROWS)
def test_an_old_row_is_searched_again_and_rewritten(row, tmp_path, search, recwarn):
    path = tmp_path / "configs.json"
    path.write_text(json.dumps({NAME: row, "other": FLAT_ROW}))
    found = Found(path, KINDS)
    assert found.get(KEY, None) == configs.FLAT
    assert found.get(KEY, None) == configs.FLAT
    assert len(search) == 1
    assert ["no Gemm of this version" in str(w.message) for w in recwarn] == [True]
    assert json.loads(path.read_text()) == {NAME: FLAT_ROW, "other": FLAT_ROW}


def refused(*args, **kwargs):
    raise PermissionError(f"not {args}")


UNWRITABLE = {
    "no folder": lambda patch: patch.setattr(Path, "mkdir", refused),
    "no file": lambda patch: patch.setattr(configs.tempfile, "NamedTemporaryFile", refused),
    "no replacement": lambda patch: patch.setattr(configs.os, "replace", refused),
}


@pytest.mark.parametrize("refuse", UNWRITABLE.values(), ids=UNWRITABLE)
def test_an_unwritable_cache_keeps_finds_for_the_process(refuse, tmp_path, search, monkeypatch, recwarn):
    found = Found(tmp_path / "configs.json", KINDS)
    refuse(monkeypatch)
    for key in (KEY, KEY._replace(rows=128), KEY):
        assert found.get(key, None) == configs.FLAT
    assert len(search) == 2
    assert ["for this process only" in str(w.message) for w in recwarn] == [True]
    assert not list(tmp_path.iterdir())


def test_cache_dir(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert switches.cache_dir({"XDG_CACHE_HOME": "/c"}) == Path("/c/torch_moelora")
    assert switches.cache_dir({}) == Path.home() / ".cache" / "torch_moelora"


def test_importing_the_package_does_not_import_triton():
    code = "import sys, torch_moelora; sys.exit(any(m.split('.')[0] == 'triton' for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


def kernels() -> list:
    """(file, function) of everything that Triton compiles."""
    return [
        pytest.param(path, node, id=f"{path.stem}.{node.name}")
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and "triton.jit" in "".join(map(ast.unparse, node.decorator_list))
    ]


@pytest.mark.parametrize(("path", "node"), kernels())
def test_kernels_say_what_they_are(path, node):
    """Those that are launched open with their grid; a batch's sizes are neither constants nor specialised."""
    assert ast.get_docstring(node)
    assert node.end_lineno - node.lineno < 120
    constants = {a.arg for a in node.args.args if a.annotation and "constexpr" in ast.unparse(a.annotation)}
    sizes = {a.arg for a in node.args.args} & {"S", "E", "bound", "rows", "chunks"}
    assert not sizes & constants
    if any(isinstance(decorator, ast.Call) for decorator in node.decorator_list):
        assert ast.get_docstring(node).startswith("Grid: (")
        unspecialised = ast.unparse(node.decorator_list[0])
        assert all(f"'{size}'" in unspecialised for size in sizes)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_synchronises(path):
    """No call waits for the device, has a result whose shape depends on data, or adds in no fixed order."""
    forbidden = {
        "item",
        "tolist",
        "cpu",
        "numpy",
        "nonzero",
        "unique",
        "bincount",
        "synchronize",
        "atomic_add",
    }
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    names = {n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", "") for n in calls}
    assert not names & forbidden
