"""One matrix of each spelling that other projects' files have, against plain arithmetic."""

import json
import subprocess
import sys

import pytest
import torch
from model_tiny import one_thread  # noqa: F401  (autouse)
from moelora import matrices, stacking
from moelora.errors import MoeloraError
from packed_files import (
    BF16,
    E4M3,
    LAYOUTS,
    _words,
    bnb,
    fp8_blocks,
    fp8_rows,
    gptq,
    int4,
    nvfp4_modelopt,
)

from torch_moelora import formats
from torch_moelora.formats import PackedWeight


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def numbers(function, parts: dict, **settings) -> torch.Tensor:
    weight = function("a.weight", parts, settings)
    assert isinstance(weight, PackedWeight) and weight.shape[0] == 1
    return weight.dequantize(torch.float32)[0]


def codes(rows: int = 64, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns, generator=gen()).mul(50).to(E4M3)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])])
def test_fp8_with_one_scale(scale):
    assert torch.equal(
        numbers(matrices.fp8, {"weight": codes(), "weight_scale": scale}), codes().float() * 0.5
    )


def test_fp8_scales_of_rows_without_a_second_dimension():
    scale = torch.rand(64, generator=gen())
    found = numbers(matrices.fp8, {"weight": codes(), "weight_scale": scale})
    assert torch.equal(found, codes().float() * scale[:, None])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_fp8_scales_that_are_exponents(dtype):
    """DeepSeek-V3.1's ue8m0."""
    bits = torch.randint(120, 130, (1, 2), generator=gen(), dtype=torch.uint8)
    found = numbers(matrices.fp8, {"weight": codes(), "weight_scale_inv": bits.view(dtype)})
    assert torch.equal(found, codes().float() * torch.exp2(bits.float() - 127).repeat_interleave(128, 1))


def test_fp8_half_scales():
    scale = torch.rand(64, 1, generator=gen()).half()
    found = numbers(matrices.fp8, {"weight": codes(), "weight_scale": scale})
    assert torch.equal(found, codes().float() * scale.float())


def test_two_e2m1_a_byte():
    """DeepSeek-V4's experts: int8 with exponents of groups of 32."""
    packed = formats.quantize(torch.randn(1, 64, 256, generator=gen()), "mxfp4")
    parts = {"weight": packed.codes[0].view(torch.int8), "scale": packed.scale[0].view(torch.float8_e8m0fnu)}
    assert torch.equal(numbers(matrices.fp8, parts), packed.dequantize(torch.float32)[0])
    parts = {"weight_packed": packed.codes[0], "weight_scale": packed.scale[0]}  # compressed-tensors' MXFP4
    assert torch.equal(numbers(matrices.compressed_tensors, parts), packed.dequantize(torch.float32)[0])


@pytest.mark.parametrize("scale", [(64, 1), (64,), (64, 8)], ids=str)
def test_compressed_integers_of_eight_bits(scale):
    """Packed four a word with 128 added, or as they are."""
    values = torch.randint(-128, 128, (64, 256), generator=gen()).to(torch.int8)
    scales = torch.rand(scale, generator=gen()).to(BF16)
    spread = scales.float().reshape(64, -1).repeat_interleave(256 // (scales.numel() // 64), 1)
    expected = values.float() * spread
    words = (values.view(torch.uint8) ^ 0x80).view(torch.int32)
    parts = {"weight_packed": words, "weight_scale": scales, "weight_shape": torch.tensor([64, 256])}
    assert torch.equal(numbers(matrices.compressed_tensors, parts), expected)
    parts = {
        "weight": values,
        "weight_scale": scales,
        "weight_zero_point": torch.zeros(scale, dtype=torch.int8),
    }
    assert torch.equal(numbers(matrices.compressed_tensors, parts), expected)
    parts["weight_zero_point"] += 1
    with pytest.raises(MoeloraError, match=r"a\.weight: int8 with zero points, which no format has"):
        matrices.compressed_tensors("a.weight", parts, {})


def test_compressed_integers_of_a_row():
    """One group a row; and an order of columns that is none."""
    nibbles = torch.randint(0, 16, (64, 256), generator=gen(), dtype=torch.uint8)
    scale = torch.rand(64, 1, generator=gen())
    parts = {"weight_packed": _words(nibbles), "weight_scale": scale, "weight_shape": torch.tensor([64, 256])}
    expected = (nibbles.float() - 8) * scale
    assert torch.equal(numbers(matrices.compressed_tensors, parts), expected)
    plain = {"weight_g_idx": torch.zeros(256, dtype=torch.int32)}
    assert torch.equal(numbers(matrices.compressed_tensors, parts | plain), expected)
    parts["weight_scale"] = torch.rand(64, 2, generator=gen())
    permuted = {"weight_g_idx": torch.arange(256, dtype=torch.int32) % 2}
    with pytest.raises(
        MoeloraError, match=r"weight_g_idx permutes the columns: .*python -m moelora quantize"
    ):
        matrices.compressed_tensors("a.weight", parts | permuted, {})


def test_an_order_of_columns_beside_codes_that_are_not_packed():
    """Which would be wrong numbers, silently; one with -1 is none."""
    scale = torch.rand(64, 2, generator=gen())
    permuted = torch.arange(256, dtype=torch.int32) % 2
    for values in (torch.ones(64, 256, dtype=torch.int8), codes()):
        parts = {"weight": values, "weight_scale": scale, "weight_g_idx": permuted}
        with pytest.raises(MoeloraError, match=r"a\.weight: weight_g_idx permutes the columns"):
            matrices.compressed_tensors("a.weight", parts, {})
        parts["weight_g_idx"] = torch.full((256,), -1, dtype=torch.int32)
        spread = scale.repeat_interleave(128, 1)
        assert torch.equal(numbers(matrices.compressed_tensors, parts), values.float() * spread)


def test_fp8_in_other_blocks():
    """2 rows of blocks could be those of 128 as well as of 200."""
    parts = {"weight": codes(256), "weight_scale_inv": torch.rand(2, 2, generator=gen())}
    matrices.fp8("a.weight", parts, {"weight_block_size": [128, 128]})
    with pytest.raises(MoeloraError, match=r"a\.weight: blocks of \[200, 128\], expected \[128, 128\]"):
        matrices.fp8("a.weight", parts, {"weight_block_size": [200, 128]})


def _state(**changes) -> torch.Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [64, 256], "dtype": "bfloat16"} | changes
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


NESTED = {"nested_blocksize": 256, "nested_offset": 0.5}
STATE = "weight.quant_state.bitsandbytes__nf4"
MALFORMED = [
    (int4, matrices.compressed_tensors, {"weight_shape": torch.tensor(64)}, "weight_shape is []"),
    (int4, matrices.compressed_tensors, {"weight_shape": torch.tensor([64, 256, 1])}, "weight_shape is [3]"),
    (int4, matrices.compressed_tensors, {"weight_packed": torch.tensor(1, dtype=torch.int32)},
     "weight_packed is [], expected 2 dimensions"),
    (gptq, matrices.gptq, {"scales": torch.tensor(1.0).half()}, "with scales []"),
    (bnb, matrices.bitsandbytes, {STATE: _state(blocksize=0)}, "expected nf4 or fp4 with a blocksize"),
    (bnb, matrices.bitsandbytes, {STATE: _state(shape=["a", "b"])}, "expected nf4 or fp4 with a blocksize"),
    (bnb, matrices.bitsandbytes, {STATE: _state(shape=[-64, -256])}, "expected nf4 or fp4 with a blocksize"),
    (bnb, matrices.bitsandbytes, {STATE: _state().float()}, "bitsandbytes__nf4 is float32, expected uint8"),
    (bnb, matrices.bitsandbytes, {STATE: _state(**NESTED), "weight.nested_absmax": torch.tensor(1.0)},
     "weight.nested_absmax is [], expected 1 dimensions"),
    (bnb, matrices.bitsandbytes,
     {STATE: _state(**NESTED | {"nested_offset": "0"}), "weight.nested_absmax": torch.ones(1)},
     "its nested_offset is '0', expected a number"),
]  # fmt: skip


@pytest.mark.parametrize(("draw", "function", "changes", "told"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed(draw, function, changes, told):
    """No error but one that names the tensor."""
    stored, _ = draw(64, 256, gen())
    with pytest.raises(MoeloraError) as caught:
        function("a.weight", stored | changes, {})
    assert str(caught.value).startswith("a.weight: ") and told in str(caught.value)


def test_gptq_of_both_versions():
    """The first stores zero points less one; one that is symmetric needs none."""
    stored, expected = gptq(64, 256, gen())
    assert torch.equal(matrices.gptq("a", stored, {}).dequantize(BF16)[0], expected)
    later = numbers(matrices.gptq, stored, checkpoint_format="gptq_v2")
    scale = stored["scales"].t().float().repeat_interleave(64, 1)
    torch.testing.assert_close(later, numbers(matrices.gptq, stored) + scale, atol=1e-5, rtol=1e-5)
    stored["qzeros"] = torch.full_like(stored["qzeros"], 0x77777777)
    assert matrices.gptq("a", stored, {}).zero is None
    del stored["g_idx"]
    assert matrices.gptq("a", stored, {}).zero is None


def test_matrices_one_below_the_other():
    """Blocks that end inside of a matrix become a scale a row; whole ones stay; half with half."""
    for rows, blocks in ((192, False), (256, True)):
        parts, dense = zip(*(fp8_blocks(rows, 256, gen()) for _ in range(2)), strict=True)
        weight = stacking.below([matrices.fp8("a", part, {}) for part in parts])
        assert weight.scale.shape == ((1, 4, 2) if blocks else (1, 2 * rows, 2))
        assert torch.equal(weight.dequantize(BF16)[0], torch.cat(dense))
    mixed = [matrices.fp8("a", make(128, 256, gen())[0], {}) for make in (fp8_blocks, fp8_rows)]
    dense = [make(128, 256, gen())[1] for make in (fp8_blocks, fp8_rows)]
    assert torch.equal(stacking.below(mixed).dequantize(BF16)[0], torch.cat(dense))
    parts, dense = zip(*(nvfp4_modelopt(64, 256, gen()) for _ in range(2)), strict=True)
    weight = stacking.below([matrices.modelopt("a", part, {}) for part in parts])
    assert weight.scale2.shape == (1, 2) and torch.equal(weight.dequantize(BF16)[0], torch.cat(dense))


@pytest.mark.filterwarnings("ignore:load. nested scales became float32")
@pytest.mark.parametrize("rows", [64, 72])
def test_nested_scales_below_each_other(rows):
    """Whole runs of 256 stay; others are unpacked to float32, to the same numbers."""
    parts, dense = zip(*(bnb(rows, 256, gen(), "nf4", True) for _ in range(2)), strict=True)
    weight = stacking.below([matrices.bitsandbytes("a", part, {}) for part in parts])
    assert weight.is_nested == (rows == 64)
    assert torch.equal(weight.checked("test").dequantize(BF16)[0], torch.cat(dense))


def test_a_symmetric_matrix_beside_one_that_is_not():
    stored = [gptq(64, 256, gen())[0] for _ in range(2)]
    stored[0]["qzeros"] = torch.full_like(stored[0]["qzeros"], 0x77777777)
    each = [matrices.gptq("a", part, {}) for part in stored]
    weight = stacking.below(each)
    assert each[0].zero is None and weight.zero is not None
    expected = torch.cat([one.dequantize(BF16)[0] for one in each])
    assert torch.equal(weight.dequantize(BF16)[0], expected)


def test_matrices_that_do_not_fit():
    first = matrices.fp8("a", fp8_blocks(128, 256, gen())[0], {})
    for other, told in (
        (matrices.fp8("a", fp8_blocks(128, 128, gen())[0], {}), "fp8 128×256 and fp8 128×128"),
        (matrices.modelopt("a", nvfp4_modelopt(128, 256, gen())[0], {}), "fp8 128×256 and nvfp4 128×256"),
    ):
        with pytest.raises(ValueError, match=f"its matrices are {told}, expected one format and width"):
            stacking.below([first, other])
    tall, short = (matrices.modelopt("a", nvfp4_modelopt(n, 256, gen())[0], {}) for n in (128, 64))
    with pytest.raises(ValueError, match="not the same height"):
        stacking.below([tall, short])


@pytest.mark.slow
def test_registration_costs_nothing_and_is_there_in_time():
    """`import moelora` imports neither torch nor transformers; their table has it, whoever is first."""
    both = ("moelora", "transformers.quantizers.auto")
    for first, second in (both, both[::-1]):
        script = (
            f"import sys, {first}\n"
            f"assert {first!r} != 'moelora' or not {{'torch', 'transformers'}} & set(sys.modules)\n"
            f"import {second}\n"
            "from transformers.quantizers import auto\n"
            "assert 'moelora' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING\n"
            "assert 'moelora' in auto.AUTO_QUANTIZER_MAPPING\n"
            "assert 'moelora.experts' not in sys.modules\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_layout_is_in_the_table_of_the_tests():
    from moelora.layouts import LAYOUTS as READ

    assert {layout.section["quant_method"] for layout in LAYOUTS.values()} == set(READ)
