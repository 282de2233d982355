"""The same files by transformers and the projects' own packages: the numbers that the codes stand for."""

import moelora
import pytest
import torch
from model_tiny import one_thread  # noqa: F401  (autouse)
from moelora import weights
from packed_files import LAYOUTS, write
from packed_models import experts
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

# What transformers makes dense by itself on a CPU. Of experts with zero points or a global scale it does not
# know these, and their own package is asked.
NAMES = ["fp8 blocks", "gpt-oss mxfp4"]
COMPRESSED = ["fp8 rows", "compressed int4"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Experts of whole blocks of 128: of others transformers takes the blocks to be smaller."""

    def made(name: str):
        home = tmp_path_factory.mktemp("elsewhere")
        write(LAYOUTS[name], home / "packed", moe_intermediate_size=256)
        return home / "packed", home / "cache"

    return made


@pytest.mark.parametrize("layout", NAMES + COMPRESSED)
def test_transformers_dequantises_to_the_same_numbers(layout, directory):
    packed, cache = directory(layout)
    theirs = AutoModelForCausalLM.from_pretrained(packed, **dequantising(layout))
    ours = moelora.from_pretrained(packed, cache_dir=cache)
    for module, other in zip(experts(ours), experts(theirs), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            found = weights.weight_of(module, name).dequantize(torch.bfloat16)
            torch.testing.assert_close(found, getattr(other, name).data, atol=0, rtol=0)
    beside = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            torch.testing.assert_close(parameter, beside[name], atol=0, rtol=0)


def dequantising(layout: str) -> dict:
    if layout not in COMPRESSED:
        return {}
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


@pytest.mark.parametrize("layout", ["compressed int4", "compressed int4 asymmetric", "compressed nvfp4"])
def test_compressed_tensors_dequantises_to_the_same_numbers(layout):
    """A matrix by itself. Its scales are bfloat16 here, so NVFP4's product of two is rounded once more."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    section = LAYOUTS[layout].section
    args = QuantizationArgs(**section["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=section["format"])
    stored, expected = LAYOUTS[layout].matrix(64, 128, torch.Generator().manual_seed(0))
    compressor = BaseCompressor.get_value_from_registry(section["format"])
    theirs = compressor.decompress(dict(stored), scheme)["weight"]
    tolerance = 0 if "int4" in layout else 2**-6
    torch.testing.assert_close(theirs.to(torch.bfloat16), expected, atol=0, rtol=tolerance)
