"""kt-kernel's AMXBF16_SFT_MOE and MXFP4_SFT_MOE, in a process of their own: they may need an environment of
their own (benchmarks/README.md), print a lot, and have their own threads.

Its adapters keep gate and up apart: both get the same A, so that their gradients add up to the fused one's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from torch_moelora.formats import PackedWeight, e8m0_values

from .. import memory
from ..layer import SCALING, Batch, Case, Layer
from .base import Contestant, Results, Runner
from .packings import Packings

LORA = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")
IMPORT_SECONDS = 120
MULTIPLE = 32  # sizes that are not multiples of this give wrong results, unchecked


def _lora(layer: Layer) -> list[Tensor]:
    """In the order of LORA."""
    a, b = layer.lora["gate_up_lora_a"], layer.lora["gate_up_lora_b"]
    inner = layer.shape.inner
    parts = [a, b[:, :inner], a, b[:, inner:], layer.lora["down_lora_a"], layer.lora["down_lora_b"]]
    return [part.detach().clone(memory_format=torch.contiguous_format) for part in parts]


def _make_wrapper(layer: Layer, threads: int, **method):
    from kt_kernel.sft.amx import AMXSFTMoEWrapper

    shape, rank = layer.shape, layer.case.rank
    longest = max(layer.case.tokens, layer.case.for_check().tokens)
    wrapper = AMXSFTMoEWrapper(
        layer_idx=0,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.inner,
        num_gpu_experts=0,
        cpuinfer_threads=threads,
        threadpool_count=1,
        weight_path="",
        chunked_prefill_size=longest,
        lora_rank=rank,
        lora_alpha=SCALING * rank,
        **method,
    )
    return wrapper


def _dense(layer: Layer, threads: int):
    wrapper, inner = _make_wrapper(layer, threads, method="AMXBF16_SFT"), layer.shape.inner
    gate_up = layer.weights["gate_up"]
    wrapper.load_weights_from_tensors(gate_up[:, :inner], gate_up[:, inner:], layer.weights["down"], None)
    return wrapper


def _mxfp4(layer: Layer, packed: dict[str, PackedWeight], threads: int):
    """The gate's clamp, which it must have, is out of reach."""
    inner = layer.shape.inner
    method = {"method": "MXFP4_SFT", "group_size": 32, "zero_point": False, "swiglu_limit": 1e30}
    wrapper = _make_wrapper(layer, threads, **method)
    named = {}
    for part, weight, rows in (
        ("gate", packed["gate_up"], slice(0, inner)),
        ("up", packed["gate_up"], slice(inner, None)),
        ("down", packed["down"], slice(None)),
    ):
        scales = e8m0_values(weight.scale).bfloat16()  # powers of two: exact
        named[part] = [codes[rows].contiguous() for codes in weight.codes]
        named[f"{part}_scale"] = [scale[rows].contiguous() for scale in scales]
    wrapper.load_mxfp4_weights(named, None)
    return wrapper


class _Local(Runner):
    """In the process that has kt-kernel."""

    def __init__(self, layer: Layer, wrapper) -> None:
        self.wrapper = wrapper
        lora = _lora(layer)
        self.grads = [torch.zeros_like(part) for part in lora]
        self.wrapper.init_lora_weights(*lora, *self.grads)

    def _step(self, batch: Batch) -> tuple[tuple[float, float], Tensor, Tensor, Tensor]:
        start = time.perf_counter()
        with torch.no_grad():
            y = self.wrapper.forward(batch.x, batch.expert_idxs, batch.gates)
            middle = time.perf_counter()
            dx, dgates = self.wrapper.backward(batch.dy)
        return (middle - start, time.perf_counter() - middle), y, dx, dgates

    def time(self, batch: Batch) -> tuple[float, float]:
        return self._step(batch)[0]

    def results(self, batch: Batch) -> Results:
        _, y, dx, dgates = self._step(batch)
        gate_a, gate_b, up_a, up_b, down_a, down_b = (grad.clone() for grad in self.grads)
        return {
            "y": y,
            "dx": dx,
            "dgates": dgates,
            "dgate_up_lora_a": gate_a.float() + up_a.float(),
            "dgate_up_lora_b": torch.cat((gate_b, up_b), dim=1),
            "ddown_lora_a": down_a,
            "ddown_lora_b": down_b,
        }


def find_python() -> str:
    """The interpreter that has kt-kernel: $MOELORA_KT_PYTHON, .venv-kt in the checkout, or this one."""
    own = Path(__file__).parents[2] / ".venv-kt" / "bin" / "python"
    return os.environ.get("MOELORA_KT_PYTHON") or (str(own) if own.exists() else sys.executable)


@lru_cache
def _import_error(python: str) -> str | None:
    """The last line of what importing it there says."""
    command = [python, "-c", "import kt_kernel.sft.amx"]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except OSError as error:
        return str(error)
    except subprocess.TimeoutExpired:
        return f"its import was stopped after {IMPORT_SECONDS} s"
    if tried.returncode == 0:
        return None
    return (tried.stderr.strip() or f"its import ended with status {tried.returncode}").splitlines()[-1]


class KtKernel(Contestant):
    name = "kt-kernel"
    devices = ("cpu",)

    @property
    def python(self) -> str:
        return find_python()

    def missing(self, case: Case) -> str | None:
        shape = case.shape
        if (case.dtype, case.lora_dtype) != ("bf16", "bf16"):
            return "bf16 only"
        if shape.bias or shape.transposed or shape.glu.get("act", "silu") != "silu":
            return "no biases, transposed weights or activations other than silu"
        if shape.hidden % MULTIPLE or shape.inner % MULTIPLE:
            return f"sizes must be multiples of {MULTIPLE}"
        return _import_error(self.python)

    def missing_here(self, case: Case) -> str | None:
        try:
            import kt_kernel.sft.amx  # noqa: F401
        except ImportError as error:
            return str(error)
        return None

    def version(self) -> str:
        code = "import importlib.metadata as m; print(m.version('kt-kernel'))"
        found = subprocess.run([self.python, "-c", code], capture_output=True, text=True)
        return f"kt-kernel {found.stdout.strip()}"

    def load_here(self, layer: Layer) -> Runner:
        return _Local(layer, _dense(layer, torch.get_num_threads()))

    def load(self, layer: Layer, threads: int, limit: float | None = None) -> Runner:
        from ..remote import Remote, RemoteRunner

        remote = Remote(self.python, threads, limit)
        try:
            case = layer.case.to_json()
            kept = memory.keeps_freed()
            remote.ask("load", contestant=self.name, case=case, threads=threads, keep_freed=kept)
        except RuntimeError:
            remote.close()
            raise
        return RemoteRunner(remote)


class KtMxfp4(KtKernel):
    """On codes and scales as torch_moelora.formats has them."""

    name = "kt-kernel-mxfp4"
    format = "mxfp4"

    def numbers(self, layer: Layer) -> dict[str, Tensor]:
        return Packings.of(layer, self.format).numbers()

    def weight_bytes(self, layer: Layer) -> int:
        return Packings.of(layer, self.format).nbytes

    def load_here(self, layer: Layer) -> Runner:
        packed = Packings.of(layer, self.format)
        return _Local(layer, _mxfp4(layer, packed.weights, torch.get_num_threads()))


CONTESTANTS = {contestant.name: contestant for contestant in (KtKernel(), KtMxfp4())}
