"""Experts that somebody else packed: transformers' FP8Experts and bitsandbytes' parametrised parameters."""

import moelora
import pytest
import torch
from model_tiny import one_thread  # noqa: F401  (autouse)
from moelora import weights
from moelora.errors import MoeloraError
from moelora.experts import is_experts
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GptOssConfig, Qwen3MoeConfig
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from torch_moelora import formats
from torch_moelora.formats import PackedWeight

SIZES = {
    "hidden_size": 128, "num_hidden_layers": 1, "num_experts_per_tok": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50,
}  # fmt: skip
CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(moe_intermediate_size=64, num_experts=4, **SIZES),
    "gpt_oss": GptOssConfig(intermediate_size=64, num_local_experts=4, **SIZES),  # stored [in, out]
}
NAMES = ("gate_up_proj", "down_proj")
IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def dense_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).to(torch.bfloat16)
    return model.eval()


def layer(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if is_experts(module))


def by_bitsandbytes(family: str, kind: str, nested: bool) -> PeftModel:
    """Adapted first: PEFT does not find a parametrised parameter by its name."""
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = adapt(dense_model(family))
    for name in NAMES:
        parametrize.replace_parameter_4bit(
            layer(model), name, nested, kind, 32 if family == "gpt_oss" else 64
        )
    return model


def by_transformers(adapted: bool = True) -> nn.Module:
    model = dense_model("qwen3_moe")
    packed = {name: formats.quantize(getattr(layer(model), name), "fp8") for name in NAMES}
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    replace_with_fp8_linear(model, others, FineGrainedFP8Config())
    experts = layer(model)
    experts.to_empty(device="cpu")
    for name, weight in packed.items():
        setattr(experts, name, nn.Parameter(weight.codes, requires_grad=False))
        setattr(experts, name + "_scale_inv", nn.Parameter(weight.scale, requires_grad=False))
    return adapt(model.eval()) if adapted else model


MAKERS = {
    "fp8": by_transformers,
    "nf4": lambda: by_bitsandbytes("qwen3_moe", "nf4", False),
    "nf4 nested": lambda: by_bitsandbytes("qwen3_moe", "nf4", True),
    "fp4 [in, out]": lambda: by_bitsandbytes("gpt_oss", "fp4", False),
}


def dequantised(model: nn.Module, family: str) -> PeftModel:
    """The same model with dense experts of the numbers that the codes stand for."""
    other = adapt(dense_model(family))
    for name in NAMES:
        weight = weights.weight_of(layer(model), name)
        getattr(layer(other), name).data = weight.dequantize(torch.bfloat16)
    return other


def adapt(model: nn.Module) -> PeftModel:
    config = LoraConfig(r=3, lora_alpha=6, target_parameters=[f"experts.{name}" for name in NAMES])
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return adapted


def step(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), grads


@pytest.fixture(params=MAKERS)
def models(request) -> tuple[PeftModel, PeftModel]:
    packed = MAKERS[request.param]()
    dense = dequantised(packed, "gpt_oss" if "in, out" in request.param else "qwen3_moe")
    return packed, dense


def test_packed_experts_train_as_their_numbers_do(models):
    """To the bit: logits and every gradient, with no dense copy made on the way."""
    packed, dense = models
    report = moelora.enable(packed)
    assert report.served and report.layers[0].format in ("fp8", "nf4", "fp4")
    assert report.layers[0].gate == "fused"
    assert report.layers[0].nbytes < 0.6 * moelora.enable(dense).layers[0].nbytes
    logits, grads = step(packed)
    expected, wanted = step(dense)
    assert torch.equal(logits, expected)
    assert len(grads) == 4 and grads.keys() == wanted.keys()
    assert all(torch.equal(grads[name], wanted[name]) for name in wanted)
    assert not moelora.report(packed).untrained
    assert report.layers[0].format in str(report)


def test_attributes_that_unpack_everything_are_never_read(monkeypatch):
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = MAKERS["nf4"]()
    moelora.enable(model)
    monkeypatch.setattr(parametrize.Bnb4bitParametrization, "forward", None)
    step(model)


def test_saved_adapters_are_plain_peft(models, tmp_path):
    packed, dense = models
    moelora.enable(packed)
    logits, _ = step(packed)
    packed.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(dense.unload(), tmp_path)
    moelora.enable(again)
    assert torch.equal(again(input_ids=IDS).logits, logits)


def test_what_would_unpack_or_train_nothing_is_refused(models):
    packed, _ = models
    moelora.enable(packed)
    with pytest.raises(MoeloraError, match="is packed, and PEFT cannot add LoRA to packed weights: merging"):
        packed.merge_adapter()
    config = layer(packed).config
    config._experts_implementation_internal, before = "eager", config._experts_implementation
    with pytest.raises(MoeloraError, match=r"is packed.*the experts implementation is 'eager'"):
        packed(input_ids=IDS)
    config._experts_implementation_internal = before
    step(packed)


def test_an_adapter_that_came_late_is_refused():
    model = by_transformers(adapted=False)
    moelora.enable(model)
    model = adapt(model)
    with pytest.raises(MoeloraError, match=r"is packed.*came after moelora\.enable"):
        model(input_ids=IDS)
    moelora.enable(model)
    step(model)


@pytest.mark.parametrize("name", MAKERS)
def test_plain_forward_and_disable(name):
    model = MAKERS[name]()
    before = {n: id(p) for n, p in model.named_parameters()}
    moelora.enable(model)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        assert logits.isfinite().all()
    moelora.disable(model)
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert all(is_parametrized(layer(model), n) for n in NAMES) == (name != "fp8")


def test_layouts_that_no_format_has():
    model = by_transformers(adapted=False)
    experts = layer(model)
    codes = experts.down_proj.data
    for scale, told in (
        (torch.ones(4, 2, 3), r"down_proj has scales \[4, 2, 3\] for \[4, 128, 64\], expected blocks of 128"),
        (None, "down_proj is float8_e4m3fn without scales"),
    ):
        experts._parameters.pop("down_proj_scale_inv", None)
        if scale is not None:
            experts.down_proj_scale_inv = nn.Parameter(scale, requires_grad=False)
        with pytest.raises(MoeloraError, match=told):
            moelora.enable(model)
    assert experts.down_proj.data is codes or torch.equal(
        experts.down_proj.data.view(torch.uint8), codes.view(torch.uint8)
    )


@pytest.mark.parametrize("cast", ["float", "half", "bfloat16", "double"])
def test_codes_that_were_cast_to_numbers_are_refused(cast):
    """Their scales are then beside them and in no product: wrong logits, and no error from transformers."""
    model = by_transformers()
    moelora.enable(model)
    getattr(model, cast)()
    told = (
        r"^model\.layers\.0\.mlp\.experts\.(gate_up|down)_proj is b?float\d+ beside its scales "
        r"\w+_scale_inv: its fp8 codes became numbers.*load it anew.*moelora\.from_pretrained"
    )
    for use in (moelora.report, moelora.enable, lambda m: m(input_ids=IDS)):
        with pytest.raises(MoeloraError, match=told) as raised:
            use(model)
        assert "\n" not in str(raised.value)
    fresh = by_transformers(adapted=False).to(torch.float32)
    with pytest.raises(
        MoeloraError, match=r"^model\.layers\.0\.mlp\.experts\.gate_up_proj is float32 beside"
    ):
        moelora.enable(fresh)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "fp8"])
def test_a_cast_leaves_bitsandbytes_codes_and_scales_alone(name):
    """Logits of the same numbers: codes are no floating point, and their scales no tensors of the module."""
    model = MAKERS[name]()
    dense = dequantised(model, "gpt_oss" if "in, out" in name else "qwen3_moe")
    for each in (model, dense):
        moelora.enable(each)
        each.float()
    assert moelora.report(model).layers[0].format in ("nf4", "fp4")
    with torch.no_grad():
        logits, expected = model(input_ids=IDS).logits, dense(input_ids=IDS).logits
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() < 4e-3 * expected.norm()  # `dense` has rounded its numbers to bfloat16


def test_powers_of_two_that_were_cast_are_refused():
    """DeepSeek V4's scales of E2M1, which .float() casts and the codes' int8 not."""
    model = by_transformers(adapted=False)
    experts = layer(model)
    for name in NAMES:
        packed = formats.quantize(torch.randn(getattr(experts, name).shape), "mxfp4")
        scale = packed.scale.view(torch.float8_e8m0fnu)
        setattr(experts, name, nn.Parameter(packed.codes.view(torch.int8), requires_grad=False))
        setattr(experts, name + "_scale_inv", nn.Parameter(scale, requires_grad=False))
    assert moelora.enable(model).layers[0].format == "mxfp4"
    model.float()
    told = (
        r"^model\.layers\.0\.mlp\.experts\.gate_up_proj has scales of float32.*changed after moelora\.enable"
    )
    for use in (moelora.report, moelora.enable, lambda m: m(input_ids=IDS)):
        with pytest.raises(MoeloraError, match=told):
            use(model)


def test_blocks_across_rows_are_refused():
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = dense_model("qwen3_moe")
    for name in NAMES:
        parametrize.replace_parameter_4bit(layer(model), name, False, "nf4", 128)  # down's rows are 64
    with pytest.raises(MoeloraError, match="down_proj has blocks of 128 across rows of 64"):
        moelora.enable(model)


def test_scales_of_every_kind():
    """One for gate and one for up; one for an expert; rows; bf16; two codes of E2M1 a byte."""
    codes = torch.zeros(4, 256, 128, dtype=torch.float8_e4m3fn)
    for shape in ((4, 2, 1), (4, 1, 1), (4,), (4, 256, 1), (4, 2, 1)):
        found = weights._of_transformers(codes, torch.ones(shape))
        assert found.format == "fp8" and found.checked("test").shape == (4, 256, 128)
    gate_and_up = torch.tensor([[[2.0], [3.0]]]).expand(4, 2, 1)
    ones = torch.ones(4, 300, 128).to(torch.float8_e4m3fn)
    found = weights._of_transformers(ones, gate_and_up).dequantize(torch.float32)
    assert (found[:, :150] == 2).all() and (found[:, 150:] == 3).all()
    packed = formats.quantize(torch.randn(4, 32, 64), "mxfp4")
    found = weights._of_transformers(packed.codes.view(torch.int8), packed.scale.view(torch.float8_e8m0fnu))
    assert isinstance(found, PackedWeight) and torch.equal(
        found.dequantize(torch.float32), packed.dequantize(torch.float32)
    )
