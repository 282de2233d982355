"""Experts in host memory beside a GPU: values, overlap, time against the slower half, memory.
tests/test_beside.py has the logic, on a device that is late on purpose.
"""

import gc

import pytest
import torch

from benchmarks import beside

REAL = torch.cuda.is_available() and torch.accelerator.current_accelerator().type == "cuda"
pytestmark = pytest.mark.skipif(not REAL, reason="torch sees no CUDA device")

HOT = list(range(16))


def bench(
    kind: str, tokens: int, sizes: tuple[int, int, int] = (64, 1024, 512), dtype: torch.dtype = torch.bfloat16
) -> beside.Bench:
    device = torch.device("cuda", torch.cuda.current_device())
    layers = [beside.build(*sizes, 16, kind, dtype, seed) for seed in range(beside.LAYERS)]
    return beside.Bench(device, layers, tokens, 8, HOT)


def results(b: beside.Bench, computes: list, device) -> list[torch.Tensor]:
    """The output, dX and the gradients of the layers' LoRA."""
    for layer in b.layers:
        for leaf in layer.leaves:
            leaf.grad = None
    out = x = b.x.detach().to(device).requires_grad_()
    for compute in computes:
        out = compute(out, b.ids.to(device), b.gates.to(device))
    out.backward(torch.ones_like(out))
    return [out.detach(), x.grad, *(leaf.grad for layer in b.layers for leaf in layer.leaves)]


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("way", ["compute", "bring"])
def test_small_values(way, kind):
    """In float32: a layer is about quadratic, so that three make seven of one rounding, more in gradients."""
    b = bench(kind, 100, dtype=torch.float32)
    expected = results(b, b.here(), "cpu")
    found = results(b, b.placed(way, HOT if way == "compute" else []), b.device)
    for a, e in zip(found, expected, strict=True):
        assert ((a.cpu() - e).norm() <= 1e-4 * e.norm()).item()


@pytest.mark.parametrize("way", ["compute", "bring"])
def test_same_bits_over_20_runs(way):
    b = bench("nf4", 300)
    computes = b.placed(way, HOT if way == "compute" else [])
    expected = results(b, computes, b.device)
    for run in range(20):
        again = results(b, computes, b.device)
        assert all(torch.equal(a, e) for a, e in zip(again, expected, strict=True)), f"run {run} differs"


@pytest.mark.parametrize("way", ["compute", "bring"])
def test_nothing_waits_for_the_device(way):
    b = bench("dense", 200)
    computes = b.placed(way, HOT if way == "compute" else [])
    step = b.step(computes, b.device)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_both_are_at_work_at_once():
    b = bench("dense", 2048, (64, 2048, 768))
    found = beside.run(b, 5, None)
    both = next(r for r in found["results"] if r["name"] == "both at work")
    assert both["overlap"] > 0.5
    assert found["against_the_slower_half"] < 1.25


@pytest.fixture
def nobody_elses():
    """Memory in which nothing of an earlier test is left that could go while this one measures."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def test_memory_of_the_device(nobody_elses):
    """Brought weights take two layers of it, however many there are; hot experts their own."""
    b = bench("dense", 64)
    layer = sum(b.layers[0].parameters[n].nbytes for n in ("gate_up_weight", "down_weight"))
    before = torch.cuda.memory_allocated()
    brought = b.measure("brought", b.placed("bring", []), b.device, 1)
    assert 2 * layer <= brought.peak_bytes - before < 2.5 * layer
    gc.collect()  # the buffers of those that were brought
    before = torch.cuda.memory_allocated()
    both = b.measure("both", b.placed("compute", HOT), b.device, 1)
    assert both.peak_bytes - before < beside.LAYERS * layer * len(HOT) / 64 + 0.5 * layer
