"""What a benchmark says of the machine: ceilings, torch's own products, and the names of result files."""

import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import torch_moelora
from torch_moelora import _C

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed

from benchmarks import chart, full_size, machine, markdown, options, products, remote, results
from benchmarks.peers import MODULES

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("bf16", "reason"), [(17e9, None), (15e9, "15 GF/s in bf16"), (0.0, "0 GF/s in bf16")]
)
def test_when_products_are_hopeless(bf16, reason):
    said = products.why_not("bf16", {"bf16": bf16, "fp32": 160e9})
    assert said is None if reason is None else reason in said


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's switch for x86")
def test_products_in_bf16_are_hopeless_without_avx512(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    rates = remote.product_rates(("bf16", "fp32"), 120)
    assert products.why_not("bf16", rates) is not None, rates


@pytest.mark.parametrize(
    ("name", "isa", "arguments", "stem"),
    [
        ("AMD EPYC (Zen 3)", "avx2", [], "amd-epyc-zen-3-2-cores_avx2_bf16_qwen3-30b-a3b_all"),
        (
            "AMD EPYC (Zen 5)",
            "avx512_bf16",
            ["--layer"],
            "amd-epyc-zen-5-2-cores_avx512-bf16_bf16_qwen3-30b-a3b_layer",
        ),
        (
            "Intel(R) Xeon(R) Processor",
            "amx_bf16",
            ["--operators", "--shape", "qwen3.5-35b-a3b", "--threads", "1"],
            "intel-xeon-processor-2-cores_amx-bf16_bf16_qwen3.5-35b-a3b_operators_1-threads",
        ),
    ],
)
def test_names_of_result_files(name, isa, arguments, stem):
    where = machine.Machine(name, 2, 25, 17, isa, None)
    assert results.stem(options.parse(["--threads", "2", *arguments]), where) == stem


@pytest.mark.parametrize(
    ("family", "model", "name"),
    [(25, 1, " (Zen 3)"), (25, 17, " (Zen 4)"), (25, 160, " (Zen 4)"), (26, 2, " (Zen 5)"), (23, 49, "")],
)
def test_processors_of_one_name_are_told_apart(monkeypatch, family, model, name):
    found = {"vendor_id": "AuthenticAMD", "model name": "AMD EPYC", "cpu family": family, "model": model}
    monkeypatch.setattr(machine, "_cpuinfo", lambda: {key: str(value) for key, value in found.items()})
    assert machine.find("cpu", "bf16").name == f"AMD EPYC{name}"


def test_result_files_are_named_after_what_they_hold():
    """Those in the repository."""
    files = {path: json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")}
    assert files
    for path, found in files.items():
        name, cores = found["machine"].removesuffix(" cores").split(", ")
        where = machine.Machine(name, int(cores), None, None, found["instruction_set"], None)
        module, *arguments = shlex.split(found["command"].partition("benchmarks.")[2])
        if module == "full_size":
            expected = full_size.stem(full_size.parse(arguments), where)
        else:
            parsed = options.parse([*arguments, "--threads", str(found["options"]["threads"])])
            expected = results.stem(parsed, where)
        assert path.stem == expected
        assert path.with_suffix(".png").exists()


def test_replacing_a_result_is_said(tmp_path):
    found = {"machine": "AMD EPYC, 2 cores", "date": "2026-11-21", "rows": []}
    first, second = (results.save(found, tmp_path, "name") for _ in range(2))
    assert first == [f"wrote {tmp_path / 'name.json'}"]
    assert second == [f"{first[0]} in place of AMD EPYC, 2 cores's of 2026-11-21"]


@pytest.mark.parametrize("isa", torch_moelora.info()["cpu"]["usable"])
def test_every_instruction_set_has_a_ceiling(isa):
    """In a process that loads nothing but the extension: MOELORA_ISA is read once."""
    code = f"""if True:
        import importlib.util as util
        spec = util.spec_from_file_location("_C", {_C.__file__!r})
        native = util.module_from_spec(spec)
        spec.loader.exec_module(native)
        assert native.isa_report()["override"] == {isa!r}
        print(*(native.measure_peak_rate(dtype, 1, 0.005) for dtype in ("bf16", "fp16", "fp32", "fp64")))
    """
    environment = {**os.environ, "MOELORA_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert min(map(float, done.stdout.split())) > 1e8


def test_every_contestant_has_a_colour_and_a_heading():
    assert set(chart.COLOURS) == set(MODULES)
    by_version = {"kt-kernel", "kt-kernel-mxfp4", "scattermoe"}
    assert set(MODULES) - set(markdown.HEADINGS) == by_version


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_no_tile_is_faster_than_the_arithmetic_ceiling(dtype):
    """The best of short windows, in turn; others on the machine only lower a rate: then more, up to 10 s."""
    peak = tile = 0.0
    start = time.monotonic()
    for count in itertools.count(1):
        peak = max(peak, _C.measure_peak_rate(dtype, 1, 0.002))
        tile = max(tile, _C.measure_dot_rate(dtype, 1, 0.002))
        if count >= 50 and (peak >= 0.9 * tile or time.monotonic() - start > 10):
            break
    assert peak >= 0.9 * tile > 0
