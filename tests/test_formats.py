"""torch_moelora.formats: against the specification, against the libraries whose formats they are, and its own
rounding.
"""

import copy
import io
import math
import subprocess
import sys

import packings
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packings import BF16, E4M3, FP16, FP32, U8, Packing

from torch_moelora import formats, quantizers, reference
from torch_moelora.formats import FORMATS, PackedWeight

HALVES_AND_FP32 = (BF16, FP16, FP32)
NAMES = packings.NAMES
SCALES = ("usual", "subnormal", "extreme", "special")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits, but that every NaN is one."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def by_the_reference(packed: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    return reference.dense_weight(*packed, dtype)


def with_group(name: str, e: int = 2, n: int = 24, k: int = 256) -> PackedWeight:
    return formats.quantize(torch.randn(e, n, k, generator=generator()), name)


@given(packings.packings(SCALES), st.integers(1, 3), st.sampled_from(HALVES_AND_FP32), st.integers(0, 99))
def test_dequantize_is_the_specification(drawn, e, dtype, seed):
    packing, n, k = drawn
    packed = packings.build(packing, e, n, k, generator(seed))
    assert packed.shape == (e, n, k)
    assert same(packed.dequantize(dtype), by_the_reference(packed, dtype))


def test_each_element_by_itself():
    """The formula of one number, in words of bytes and indices, for a few of each format."""
    for name in NAMES:
        row = FORMATS[name]
        packing = Packing(
            name, row.groups.least, row.scale_dtypes[0], zero=bool(row.zero), rows="block", parts=1
        )
        e, n, k = 2, 130, 256
        packed = packings.build(packing, e, n, k, generator(3))
        w = packed.dequantize(FP32)
        for i, j, c in ((0, 0, 0), (1, 5, 1), (1, 129, 255), (0, 77, 130), (1, 128, 128)):
            code = packed.codes.view(U8)[i, j, c // row.per_byte].item()
            if row.per_byte == 2:
                code = code >> 4 if (c % 2 == 0) == row.high_first else code & 15
            group = row.groups.least
            at = (i, j // group if name == "fp8" else j, c // group)
            scale = packed.scale[at].float()
            if name == "mxfp4":
                scale = torch.tensor(2.0 ** (packed.scale[at].item() - 127))
            if packed.scale2 is not None:
                scale = scale * packed.scale2[i, 0]
            zero = 0 if packed.zero is None else packed.zero[at].item()
            assert w[i, j, c] == (torch.tensor(row.codes[code]) - zero) * scale, name


def test_scales_of_successive_runs_cross_experts():
    """3 experts of 5·4 scales with runs of 256: here one run; 37·8 scales an expert: the runs end inside."""
    packing = Packing("nf4", 32, U8)
    packed = packings.build(packing, 3, 37, 256, generator())
    assert packed.scale2.shape == (math.ceil(3 * 37 * 8 / 256), 2)
    code2 = formats.nested_values()
    flat = packed.scale.flatten()
    for i in (0, 255, 256, 295, 296, 511, 512, 887):
        expert, n, group = i // 296, i % 296 // 8, i % 8
        scale = code2[flat[i].item()] * packed.scale2[i // 256, 0] + packed.scale2[i // 256, 1]
        byte = packed.codes[expert, n, group * 16].item()
        assert (
            packed.dequantize(FP32)[expert, n, group * 32] == formats.FORMATS["nf4"].codes[byte >> 4] * scale
        )


def test_e4m3_keeps_its_nans_and_subnormals():
    codes = torch.arange(256).to(U8).view(1, 1, 256).view(E4M3)
    w = PackedWeight(codes, torch.ones(1, 1, 1), format="fp8").dequantize(FP32).flatten()
    assert w.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert w[1:8].tolist() == [i * 2.0**-9 for i in range(1, 8)]
    assert w[0x7E] == 448


def test_subnormal_results_are_not_flushed():
    codes = torch.full((1, 1, 16), 0x11, dtype=U8)  # 0.5
    w = PackedWeight(codes, torch.zeros(1, 1, 1, dtype=U8), format="mxfp4").dequantize(FP32)
    assert (w == 2.0**-128).all()
    assert (PackedWeight(codes, torch.zeros(1, 1, 1, dtype=U8), format="mxfp4").dequantize(BF16) != 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_turned(name):
    packed = with_group(name)
    turned = packed.turned()
    assert turned.shape == (2, 256, 24)
    assert turned.codes is packed.codes
    assert torch.equal(turned.dequantize(BF16), packed.dequantize(BF16).transpose(1, 2))
    assert turned.turned() == packed


def test_dense():
    w = torch.randn(3, 4, 5)
    packed = PackedWeight(w)
    assert packed.shape == (3, 4, 5) and packed.nbytes == 240
    assert torch.equal(packed.turned().dequantize(BF16), w.transpose(1, 2).to(BF16))
    assert torch.equal(formats.stack([packed.experts(0, 1), packed.experts(1, 3)]).codes, w)
    assert formats.quantize(w, "dense").codes is w
    packed.dequantize(FP32).zero_()  # a new tensor, in the weight's own dtype too
    assert w.any()


def test_nbytes_and_device():
    packed = formats.quantize(torch.randn(2, 8, 128), "nf4", nested=True)
    assert packed.nbytes == 2 * 8 * 64 + 2 * 8 * 2 + 8
    moved = packed.to("meta")
    assert moved.device.type == "meta" and moved.shape == packed.shape and moved.format == "nf4"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_experts_and_stack(name, nested, recwarn):
    if nested and not FORMATS[name].nested:
        pytest.skip("not nested")
    for n in (24, 64):  # 24·4 scales: no multiple of 256; 64·4: one run an expert
        packed = formats.quantize(torch.randn(4, n, 256, generator=generator()), name, nested=nested)
        recwarn.clear()
        parts = [packed.experts(0, 1), packed.experts(1, 4)]
        unnested = nested and n == 24
        assert bool(recwarn) == unnested
        assert parts[1].codes.data_ptr() == packed.codes[1:].data_ptr()
        assert torch.equal(parts[1].dequantize(BF16), packed.dequantize(BF16)[1:])
        again = formats.stack(parts)
        assert torch.equal(again.dequantize(BF16), packed.dequantize(BF16))
        assert again.is_nested == (nested and not unnested)
        if not unnested:
            assert again.codes.dtype == packed.codes.dtype
            assert all(
                torch.equal(a.view(U8), b.view(U8))
                for a, b in zip(again.tensors, packed.tensors, strict=True)
            )


def test_stack_unnests_a_part_that_is_no_run():
    parts = [formats.quantize(torch.randn(1, 3, 64), "fp4", nested=True) for _ in range(3)]
    with pytest.warns(UserWarning, match="stack: nested scales became float32"):
        joined = formats.stack(parts)
    assert not joined.is_nested and joined.scale2 is None
    assert torch.equal(joined.dequantize(FP32), torch.cat([p.dequantize(FP32) for p in parts]))


def test_e8m0_scales_count_as_bytes():
    packed = with_group("mxfp4")
    typed = packed._replace(scale=packed.scale.view(torch.float8_e8m0fnu))
    assert torch.equal(typed.dequantize(BF16), packed.dequantize(BF16))
    assert typed.operands()["weight_scale"].dtype == U8


def test_export_and_its_files():
    class Rows(torch.nn.Module):
        def forward(self, packed: PackedWeight) -> torch.Tensor:
            return packed.scale * 2

    packed = with_group("nf4")
    program = torch.export.export(Rows(), (packed,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    out = torch.export.load(file).module()(packed)
    assert torch.equal(out, packed.scale * 2)
    compiled = torch.compile(lambda p: p.turned().scale + p.shape[1], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed), packed.scale + 24)


@pytest.mark.parametrize("dtype", HALVES_AND_FP32)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_nearer(name, dtype):
    """No other code of the same group is nearer to the number than the one that was chosen."""
    w = torch.randn(2, 6, 256, generator=generator()).mul(torch.tensor([1.0, 1e-3]).view(2, 1, 1)).to(dtype)
    packed = formats.quantize(w, name)
    got = (packed.dequantize(FP32).double() - w.double()).abs()
    row = FORMATS[name]
    values = sorted({v for v in row.codes if math.isfinite(v)} - ({-128.0} if name == "int8" else set()))
    for value in values:
        other = packings.constant(packed, row.codes.index(value)).dequantize(FP32).double()
        assert (got <= (other - w.double()).abs() * (1 + 1e-5)).all(), value


@pytest.mark.parametrize("name", ["nf4", "fp4", "mxfp4"])
def test_tables_round_as_the_rule(name):
    """Around every number where the code changes, and in every run of numbers that share a table entry."""
    if name == "mxfp4":
        rule, rounding = quantizers._e2m1, quantizers._e2m1_rounding(torch.device("cpu"))
    else:
        table = torch.tensor(FORMATS[name].codes)
        rounding = quantizers._codebook_rounding(FORMATS[name].codes, torch.device("cpu"))

        def rule(values):
            return quantizers._nearest(values.clamp(-1, 1), table)

    values = torch.tensor(sorted(FORMATS[name].codes))
    middles = ((values[1:] + values[:-1]) / 2).view(torch.int32)
    near = (middles[:, None] + torch.arange(-70000, 70001, dtype=torch.int32)).flatten()
    everywhere = torch.arange(-(2**31), 2**31, 4099).to(torch.int32)
    for bits in (near, everywhere):
        numbers = bits.view(torch.float32)
        numbers = numbers[~numbers.isnan()].contiguous()
        assert torch.equal(rounding(numbers), rule(numbers))


@pytest.mark.parametrize("name", NAMES)
def test_pieces_do_not_show(name, monkeypatch):
    w = torch.randn(2, 192, 300, generator=generator()).transpose(1, 2)  # along K, too, it has strides
    whole = formats.quantize(w, name, None if name != "int4" else 96)
    monkeypatch.setattr(quantizers, "PIECE", 1000)
    pieces = formats.quantize(w, name, None if name != "int4" else 96)
    for a, b in zip(whole.tensors, pieces.tensors, strict=True):
        assert torch.equal(a.view(U8), b.view(U8))
        assert a.is_contiguous() and b.is_contiguous()


def test_lookup_of_many_threads(monkeypatch):
    """torch shares out a matrix: the same numbers."""
    w = torch.randn(1, 64, 256, generator=generator())
    few = formats.quantize(w, "nf4")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert torch.equal(formats.quantize(w, "nf4").codes, few.codes)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_weights(name):
    """Zeros, the smallest and the largest numbers: finite, and zeros stay zeros."""
    for size in (0.0, 1e-45, 1e-40, 1e-30, 1.0, 1e30, 3e38):
        w = size * torch.randn(2, 3, 256, generator=generator()).clamp(-1, 1)
        w[0, 0] = 0
        packed = formats.quantize(w, name)
        back = packed.dequantize(FP32)
        assert back.isfinite().all()
        assert (back[0, 0] == 0).all()
        if size > 1e-30:
            assert (back - w).double().norm() <= 0.2 * w.double().norm()


def test_group_sizes():
    w = torch.randn(2, 130, 256)
    assert formats.quantize(w, "int8").scale.shape == (2, 130, 1)
    assert formats.quantize(w, "int8", group_size=64).scale.shape == (2, 130, 4)
    assert formats.quantize(w, "int4", group_size=0).scale.shape == (2, 130, 1)
    assert formats.quantize(w, "fp8").scale.shape == (2, 2, 2)
    assert formats.quantize(w, "fp8", group_size=0).scale.shape == (2, 130, 1)
    assert formats.quantize(w[:, :, :128], "fp8", group_size=0).scale.shape == (2, 130, 1)
    assert formats.quantize(w[:, :, :128], "fp8").scale.shape == (2, 2, 1)
    assert formats.quantize(w, "nf4", group_size=32).scale.shape == (2, 130, 8)
    assert formats.quantize(w[:, :, :100], "int8").dequantize(FP32).shape == (2, 130, 100)


@pytest.mark.parametrize("dtype", [BF16, torch.float64])
def test_another_default_dtype(dtype):
    """transformers sets one while it builds a model: then or at the import, no scale is of it."""
    script = (
        f"import torch; torch.set_default_dtype({dtype}); from torch_moelora import formats\n"
        "w = torch.arange(-32, 32).repeat(3, 4).view(1, 3, 256).float()\n"
        "for name in list(formats.FORMATS)[1:]:\n"
        "    packed = formats.quantize(w, name, nested=formats.FORMATS[name].nested)\n"
        "    print(name, packed.dequantize(torch.float32).double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    w = torch.arange(-32, 32).repeat(3, 4).view(1, 3, 256).float()
    expected = {
        name: formats.quantize(w, name, nested=FORMATS[name].nested).dequantize(FP32).double().sum().item()
        for name in NAMES
    }
    assert done.returncode == 0, done.stderr
    assert {n: float(s) for n, s in map(str.split, done.stdout.splitlines())} == expected


def test_zero_points():
    """Groups away from zero use all 16 codes; zero is a code; no other code is nearer."""
    w = torch.randn(2, 6, 256, generator=generator()) + torch.tensor([0.0, 1.5]).view(2, 1, 1)
    w[0, 0], w[0, 1] = 0, -torch.rand(256, generator=generator()) - 3
    packed = formats.quantize(w, "int4", 32, zeros=True)
    back = packed.dequantize(FP32)
    assert packed.zero.dtype == U8 and packed.zero.shape == packed.scale.shape == (2, 6, 8)
    assert (back[0, 0] == 0).all() and (packed.zero[0, 1] == 15).all()
    groups = w.unflatten(2, (-1, 32))
    used = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    assert torch.allclose(packed.scale[used > 0], used[used > 0] / 15)
    for code in range(16):
        other = packed._replace(codes=torch.full_like(packed.codes, code * 17)).dequantize(FP32)
        assert ((back - w).abs() <= (other - w).abs() * (1 + 1e-5)).all()
    error, plain = (
        (formats.quantize(w, "int4", 32, zeros=zeros).dequantize(FP32) - w).norm() for zeros in (True, False)
    )
    assert error < 0.8 * plain
    with pytest.raises(RuntimeError, match="weight must be finite"):
        formats.quantize(w / 0, "int4", 32, zeros=True)


W = torch.randn(2, 3, 96)
QUANTIZE_ERRORS = {
    "format must be dense, nf4, fp4, int4, mxfp4, nvfp4, int8 or fp8, got nf5": (W, "nf5"),
    "weight must be a 3-D tensor [E, N, K], got shape [3, 96]": (W[0], "nf4"),
    "weight must have dtype torch.bfloat16, torch.float16 or torch.float32, got torch.float64": (
        W.double(), "int8"
    ),
    "weight must have E, N and K of at least 1, got [2, 0, 96]": (W[:, :0], "int8"),
    "weight must be finite, got an infinity or a NaN": (W / 0, "fp8"),
    "nested must be False when format is int4, got True": (W, "int4", None, True),
    "zeros must be False when format is int8, got True": (W, "int8", None, False, True),
    "group_size must be a power of 2 of at least 32 that divides K=96, got 64": (W, "nf4"),
    "group_size must be a power of 2 of at least 32 that divides K=96, got 96": (W, "nf4", 96),
    "group_size must be a power of 2 of at least 32 that divides K=96, got 0": (W, "fp4", 0),
    "group_size must be 0, K=96 or a multiple of 32 that divides it, got 128": (W, "int4"),
    "group_size must be 0, K=96 or a multiple of 32 that divides it, got 48": (W, "int8", 48),
    "group_size must be 32, and divide K=95, got 32": (W[:, :, :95], "mxfp4"),
    "group_size must be 16, and divide K=96, got 32": (W, "nvfp4", 32),
    "group_size must be 0 or 128, got 64": (W, "fp8", 64),
    "group_size must be None when format is dense, got 32": (W, "dense", 32),
    "weight must have an even K, got shape [2, 3, 95]": (W[:, :, :95], "int4", 0),
}  # fmt: skip


@pytest.mark.parametrize("message", QUANTIZE_ERRORS)
def test_quantize_errors(message):
    with pytest.raises(RuntimeError) as caught:
        formats.quantize(*QUANTIZE_ERRORS[message])
    assert str(caught.value) == f"quantize: {message}"


def test_other_errors():
    packed = with_group("nf4")
    for call, message in (
        (lambda: packed.dequantize(torch.int8), "dequantize: dtype must be torch.bfloat16, "),
        (lambda: packed.experts(1, 1), "experts: start and stop must be within [0, 2], got 1 and 1"),
        (lambda: packed.experts(0, 3), "experts: start and stop must be within [0, 2], got 0 and 3"),
        (lambda: formats.stack([]), "stack: parts must have at least 1 weight, got none"),
        (lambda: formats.stack([packed, with_group("fp4")]), "stack: parts must be alike, got ('nf4', "),
        (lambda: packed._replace(scale=None).dequantize(BF16),
         "dequantize: scale must be given when format is nf4, got None"),
        (lambda: packed._replace(format="nf5").dequantize(BF16), "dequantize: format must be dense, "),
    ):  # fmt: skip
        with pytest.raises(RuntimeError) as caught:
            call()
        assert str(caught.value).startswith(message)


def test_a_packed_weight_is_left_alone():
    packed = with_group("nvfp4")
    before = copy.deepcopy(packed)
    packed.dequantize(BF16)
    packed.turned().experts(0, 1)
    assert all(
        torch.equal(a.view(U8), b.view(U8)) for a, b in zip(packed.tensors, before.tensors, strict=True)
    )
