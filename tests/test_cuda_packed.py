"""Packed weights on a GPU: every format against the reference, both ways round, and quantisation there."""

import problems
import pytest
import torch
from cases import BF16
from cuda_cases import DEVICE, EVERYTHING, LAYERS, NEEDS_CUDA, build, check, packing_of
from packings import NAMES

from torch_moelora import formats
from torch_moelora.formats import FORMATS

pytestmark = NEEDS_CUDA


@pytest.mark.parametrize("transposed", [False, True], ids=["as_it_is", "turned"])
@pytest.mark.parametrize("rows", [4, 256])
@pytest.mark.parametrize("name", NAMES)
def test_packed_layers(name, rows, transposed):
    packing = packing_of(name, transposed)
    check(
        LAYERS["gate_up of Qwen3-30B-A3B"].with_(
            dtype=BF16, experts=16, tokens=rows * 2, rank=16, packing=packing
        ),
        "scatter_lora",
        "scatter_lora_dx",
        "scatter_lora_backward",
    )


@pytest.mark.parametrize(
    ("name", "nested"),
    [(n, nested) for n in NAMES for nested in (False, True) if nested <= FORMATS[n].nested],
)
def test_quantised_here_as_on_the_cpu(name, nested):
    """Codes and scales are the same bits, and so is what they stand for; the mean of nested scales is summed
    in another order.
    """
    weight = torch.randn(3, 256, 384, generator=torch.Generator().manual_seed(0)).to(BF16)
    here, there = (formats.quantize(w, name, nested=nested) for w in (weight, weight.to(DEVICE)))
    if nested:
        torch.testing.assert_close(there.scale2.cpu(), here.scale2, rtol=1e-6, atol=1e-6)
        there = there._replace(scale2=here.scale2.to(DEVICE))
    for a, b in zip(here[:4], there[:4], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a.view(torch.uint8), b.cpu().view(torch.uint8))
    assert torch.equal(here.dequantize(BF16), there.dequantize(BF16).cpu())


@pytest.mark.parametrize("name", NAMES)
def test_small_packed(name):
    check(EVERYTHING.with_(k=384, n=256, packing=packing_of(name, transposed=NAMES.index(name) % 2 == 0)))


@pytest.mark.parametrize("name", NAMES)
def test_to_the_bit_of_the_dense_weight(name):
    p = build(EVERYTHING.with_(tokens=300, k=384, n=256, packing=packing_of(name)))
    for op, args in (("scatter_lora", p.forward_args()), ("scatter_lora_dx", p.dx_args())):
        out, dense = (problems.call(op, *a) for a in (args, problems.with_dense_weight(op, args)))
        pairs = zip(*(t if isinstance(t, tuple) else (t,) for t in (out, dense)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), op
