"""info(), `python -m torch_moelora`, and the switches."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_moelora
from torch_moelora import backends, report, switches

ISAS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "portable")


def test_info_says_what_can_run():
    info = torch_moelora.info()
    cpu = info["cpu"]
    for name in ("built", "detected", "permitted", "usable"):
        assert set(cpu[name]) <= set(ISAS), name
    assert "portable" in cpu["usable"]
    assert set(cpu["usable"]) <= set(cpu["built"]) & set(cpu["detected"]) & set(cpu["permitted"])
    assert set(cpu["chosen"]) == {"bf16", "fp16", "fp32", "fp64"}
    assert set(cpu["chosen"].values()) <= set(cpu["usable"])
    assert cpu["chosen"]["fp64"] == "portable"
    assert info["threads"] == torch.get_num_threads()
    assert info["versions"]["torch"] == torch.__version__


def test_every_unusable_set_has_a_reason():
    cpu = torch_moelora.info()["cpu"]
    for isa in ISAS:
        assert (isa in cpu["usable"]) != bool(cpu["reasons"].get(isa)), isa


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_unavailable_means_a_reason(name):
    part = torch_moelora.info()[name]
    assert part["available"] == (part["reason"] is None)


def run(*args: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=os.environ | environ, timeout=120
    )


def test_command_line():
    done = run("-m", "torch_moelora")
    assert done.returncode == 0, done.stderr
    for name, _ in report.rows(torch_moelora.info()):
        assert name in done.stdout


def test_command_line_json():
    done = run("-m", "torch_moelora", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cpu"]["usable"] == torch_moelora.info()["cpu"]["usable"]


def test_import_does_not_import_triton():
    done = run("-c", "import sys, torch_moelora; sys.exit('triton' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_import_without_the_compiled_operators_says_what_to_do(tmp_path):
    source = Path(torch_moelora.__file__).parent
    shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch_moelora"
    done = run("-c", code)
    assert done.returncode != 0
    assert "ImportError: the compiled operators are missing" in done.stderr and "make setup" in done.stderr


def test_cuda_without_triton_says_why():
    reason = backends.triton_unavailable()
    if reason is None:
        pytest.skip("the Triton kernels are there")
    kernel = backends._on_first_call("glu")
    with pytest.raises(NotImplementedError, match=reason):
        kernel(torch.zeros(1, 2))


@pytest.mark.skipif(backends.triton_unavailable() is not None, reason="triton is not installed")
def test_interpreter_refuses_bf16():
    """As it comes: it would multiply the bit patterns. In these tests it has bf16 (triton_interpreter.py)."""
    code = (
        "import torch, torch_moelora as m; h = torch.tensor([[1.0, 2.0]])\n"
        "for dtype in (torch.float16, torch.bfloat16): print(m.glu(h.to(dtype)))"
    )
    done = run("-c", code, MOELORA_BACKEND="triton", TRITON_INTERPRET="1")
    assert "1.4619" in done.stdout and "bfloat16" not in done.stdout, done.stderr
    message = (
        "RuntimeError: glu: h must have dtype torch.float16 or torch.float32 in Triton's interpreter, "
        "which has no bf16 arithmetic, got torch.bfloat16"
    )
    assert message in done.stderr


def test_isa_override():
    code = "import torch_moelora as m; print(m.info()['cpu']['chosen']['bf16'], m.info()['cpu']['override'])"
    assert run("-c", code, MOELORA_ISA="portable").stdout.split() == ["portable", "portable"]


@pytest.mark.parametrize("isa", ["sse9", *ISAS])
def test_isa_that_cannot_run_is_an_import_error(isa):
    if isa in torch_moelora.info()["cpu"]["detected"]:
        pytest.skip("this machine has it")
    done = run("-c", "import torch_moelora", MOELORA_ISA=isa)
    assert done.returncode != 0
    assert "ImportError" in done.stderr and "MOELORA_ISA" in done.stderr and isa in done.stderr


def test_switches_read():
    assert switches.read({}) == switches.Switches(None, False, False)
    on = switches.read({"MOELORA_BACKEND": "triton", "TRITON_INTERPRET": "1", "MOELORA_AUTOTUNE": "1"})
    assert on == switches.Switches("triton", True, True)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"MOELORA_BACKEND": "cuda"}, "MOELORA_BACKEND must be triton or unset, got cuda"),
        ({"MOELORA_BACKEND": "triton"}, "MOELORA_BACKEND=triton must come with TRITON_INTERPRET=1"),
        ({"MOELORA_AUTOTUNE": "yes"}, "MOELORA_AUTOTUNE must be 0, 1 or unset, got yes"),
    ],
    ids=lambda v: str(v),
)
def test_switches_that_mean_nothing(environ, message):
    with pytest.raises(ImportError, match=message):
        switches.read(environ)
