"""Formats of other libraries, by those libraries' own functions, to the bit: bitsandbytes (which rounds,
too), compressed-tensors, transformers.
"""

import importlib.util

import packings
import pytest
import torch
from packings import BF16, FP16, FP32, U8, Packing

from torch_moelora import formats
from torch_moelora.formats import PackedWeight

SHAPES = ((1, 1, 64), (3, 37, 256), (2, 64, 1024), (5, 13, 320))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def bnb():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes import functional
    from bitsandbytes.backends.default import ops

    return functional, ops


def test_bitsandbytes_tables(bnb):
    functional, _ = bnb
    assert torch.equal(formats.nested_values(), functional.create_dynamic_map())
    for name in ("nf4", "fp4"):
        codes = torch.tensor(formats.FORMATS[name].codes)
        assert torch.equal(codes, functional.get_4bit_type(name, device="cpu"))


def weights(shape: tuple, dtype: torch.dtype):
    """Gaussian, of very different sizes, with a row of zeros, and with ties of the rounding."""
    gen = generator()
    w = torch.randn(shape, generator=gen)
    yield w.to(dtype)
    rough = w * torch.exp(2 * torch.randn((*shape[:2], 1), generator=gen))
    rough[0, 0] = 0
    yield rough.to(dtype)
    yield (torch.randint(-8, 9, shape, generator=gen) / 8).to(dtype)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("group", [32, 64, 256])
def test_bitsandbytes_packs_the_same(bnb, name, dtype, group):
    functional, _ = bnb
    for shape in SHAPES:
        if shape[2] % group:
            continue
        for w in weights(shape, dtype):
            packed = formats.quantize(w, name, group_size=group)
            codes, state = functional.quantize_4bit(w, blocksize=group, quant_type=name)
            assert torch.equal(packed.codes.flatten(), codes.flatten())
            assert torch.equal(packed.scale.flatten(), state.absmax)
            assert torch.equal(packed.dequantize(dtype), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_bitsandbytes_packs_the_same_nested(bnb, name, dtype, bnb_blockwise):
    functional, _ = bnb
    for shape in SHAPES:
        for w in weights(shape, dtype):
            packed = formats.quantize(w, name, nested=True)
            codes, state = functional.quantize_4bit(w, quant_type=name)
            offset = state.absmax.mean()
            scale, absmax2 = bnb_blockwise(state.absmax - offset, functional.create_dynamic_map(), 256)
            assert torch.equal(packed.codes.flatten(), codes.flatten())
            assert torch.equal(packed.scale.flatten(), scale)
            assert torch.equal(packed.scale2[:, 0], absmax2)
            assert (packed.scale2[:, 1] == offset).all()


@pytest.fixture
def bnb_blockwise(bnb, monkeypatch):
    """bitsandbytes' quantize_blockwise in torch's own functions: on CPU its compiled library, which rounds
    some ties the other way, stands before it.
    """
    import bitsandbytes._ops

    kernels = {}
    monkeypatch.setattr(
        bitsandbytes._ops, "register_kernel", lambda name, key: lambda f: kernels.setdefault(name, f)
    )
    name = "bitsandbytes.backends.default.ops_again"
    spec = importlib.util.spec_from_file_location(name, bnb[1].__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return kernels["bitsandbytes::quantize_blockwise"]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_bitsandbytes_unpacks_the_same_nested(bnb, name, dtype):
    """What its own packing gives, taken as it is."""
    functional, _ = bnb
    for shape in SHAPES:
        w = torch.randn(shape, generator=generator()).to(dtype)
        codes, state = functional.quantize_4bit(w, quant_type=name, compress_statistics=True)
        e, n, k = shape
        absmax2 = state.state2.absmax
        packed = PackedWeight(
            codes.view(e, n, k // 2), state.absmax.view(e, n, k // 64),
            torch.stack((absmax2, state.offset.expand_as(absmax2)), 1), None, name,
        )  # fmt: skip
        assert torch.equal(packed.dequantize(dtype), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("scale_dtype", [BF16, FP32])
def test_compressed_tensors_int4(scale_dtype, zero):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed = packings.build(Packing("int4", 32, scale_dtype, zero=zero), 3, 40, 128, generator())
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=not zero)
    for e in range(3):
        codes = unpack_from_int32(packed.codes[e].view(torch.int32), 4, torch.Size((40, 128)))
        zeros = packed.zero[e].to(torch.int8) - 8 if zero else None
        theirs = dequantize(codes, packed.scale[e], zeros, args, dtype=scale_dtype)
        assert torch.equal(packed.dequantize(scale_dtype)[e], theirs)


def test_transformers_mxfp4():
    module = pytest.importorskip("transformers.integrations.mxfp4", reason="transformers is not installed")
    packed = packings.build(Packing("mxfp4", 32, U8), 3, 48, 128, generator())
    blocks = packed.codes.view(3, 48, 4, 16)
    theirs = module.convert_moe_packed_tensors(blocks, packed.scale, dtype=BF16)
    assert torch.equal(packed.dequantize(BF16).transpose(1, 2), theirs)


@pytest.mark.parametrize("scale_dtype", [FP32, BF16])
@pytest.mark.parametrize("group", [0, 128])
def test_transformers_fp8(group, scale_dtype):
    module = pytest.importorskip(
        "transformers.integrations.finegrained_fp8", reason="transformers is not installed"
    )
    packing = Packing("fp8", group, scale_dtype, rows="block" if group else "one")
    packed = packings.build(packing, 3, 256, 384, generator())
    for e in range(3):
        theirs = module.Fp8Dequantize(None)._dequantize_one(packed.codes[e], packed.scale[e], BF16)
        assert torch.equal(packed.dequantize(BF16)[e], theirs)
