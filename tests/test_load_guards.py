"""What would unpack experts, skip them in silence or write something else than they are."""

import copy
import pickle

import moelora
import pytest
import torch
from model_tiny import adapt, difference, logits, one_thread, tokens  # noqa: F401  (one_thread: autouse)
from moelora import packed_layout, standin, weights
from moelora.errors import MoeloraError
from moelora.linears import PackedLinear, slow_in_torch
from packed_models import adapted, checkpoints, experts  # noqa: F401  (checkpoints: a fixture)
from peft import LoraModel, PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

OWN, TURNED, LINEARS = "ours nf4 nested", "ours fp8 interleaved", "ours int8 with linears"
NAMES = ("gate_up_proj", "down_proj")


@pytest.fixture(params=[OWN, TURNED, LINEARS])
def model(request, checkpoints):  # noqa: F811
    return checkpoints(request.param).model()


def codes(model):
    return [weights.weight_of(module, name) for module in experts(model) for name in NAMES]


def same(found, expected) -> bool:
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for one, other in zip(found, expected, strict=True)
        for a, b in zip(one.tensors, other.tensors, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_change_of_dtype_leaves_packed_weights_alone(model, dtype):
    before = [weight.to("cpu") for weight in codes(model)]
    dtypes = [[t.dtype for t in weight.tensors] for weight in before]
    model.to(dtype)
    for module in experts(model):
        for name in NAMES:
            stand_in = getattr(module, name)
            assert stand_in.dtype == dtype and stand_in.untyped_storage().nbytes() <= 4
    assert [[t.dtype for t in weight.tensors] for weight in codes(model)] == dtypes
    assert same(codes(model), before)
    assert logits(model).dtype == dtype and logits(model).isfinite().all()


def test_float_and_half_are_refused(model):
    for change in (model.float, model.half):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            change()
    experts(model)[0].float()  # a part: only what is dense
    assert experts(model)[0].gate_up_proj.untyped_storage().nbytes() <= 4
    with pytest.raises(MoeloraError, match=r"packed \(\w+\): its codes cannot become torch.float64"):
        experts(model)[0].type(torch.float64)


def test_other_implementations_are_refused(model):
    config = experts(model)[0].config
    for name in ("eager", "grouped_mm", "batched_mm"):
        config._experts_implementation_internal = name
        with pytest.raises(MoeloraError, match=r"layers\.0\.mlp\.experts\.\w+ is packed .*moelora\.enable"):
            logits(model)


def test_disable_leaves_the_operators_and_refuses_adapters(model):
    expected = logits(model)
    model = adapted(model)
    moelora.enable(model, linears=False)
    trained = logits(model)
    assert not torch.equal(trained, expected)
    moelora.disable(model)
    with pytest.raises(MoeloraError, match=r"is packed .*only moelora's experts implementation reads it"):
        logits(model)
    moelora.enable(model, linears=False)
    assert torch.equal(logits(model), trained)
    assert torch.equal(logits(model.unload()), expected)


def test_adapters_without_enable_are_refused(model):
    model = adapted(model)
    with pytest.raises(MoeloraError, match=r"is packed .*moelora\.enable"):
        logits(model)


def test_merging_is_refused(model):
    model = adapted(model)
    with pytest.raises(MoeloraError, match="is packed"):  # by PEFT's own code
        model.merge_adapter()
    moelora.enable(model)
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MoeloraError, match="is packed"):
            merge()
    assert torch.equal(logits(model), expected)


def test_merging_is_refused_before_dense_layers_are_merged(model):
    model = adapt(model, targets=["q_proj", "o_proj"])
    moelora.enable(model)
    dense = [n for n, p in model.named_parameters() if "lora_" not in n and type(p) is torch.nn.Parameter]
    before = {name: model.get_parameter(name).clone() for name in dense}
    wrapped = [name for name in dense if name.endswith("proj.base_layer.weight")]
    assert len(wrapped) == (0 if any(isinstance(m, PackedLinear) for m in model.modules()) else 4)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MoeloraError, match="is packed"):
            merge()
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in before.items())
    assert not any(getattr(module, "merged", False) for module in model.modules())
    moelora.disable(model)
    assert type(model.base_model) is LoraModel


def test_a_second_adapter_is_applied_too(checkpoints):  # noqa: F811
    """Together, and by itself: as on the dense model."""
    both = []
    for base in (checkpoints(OWN).model(), checkpoints(OWN).other()):
        model = adapted(base)
        torch.manual_seed(4)
        model.add_adapter("second", model.peft_config["default"])
        moelora.enable(model)
        model.base_model.set_adapter(["default", "second"])
        found = [logits(model)]
        model.set_adapter("second")
        both.append([*found, logits(model)])
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    assert not torch.equal(*both[0])


def test_it_cannot_be_trained(model):
    with pytest.raises(MoeloraError, match=r"is packed .*cannot be trained"):
        model.requires_grad_(True)
    stand_in = experts(model)[0].gate_up_proj
    with pytest.raises(MoeloraError, match="cannot be trained"):
        stand_in.requires_grad = True
    stand_in.requires_grad_(False)
    assert not stand_in.requires_grad


def test_numbers_of_a_stand_in_are_refused(model):
    stand_in = experts(model)[0].gate_up_proj
    for use in (
        lambda: stand_in + 1,
        lambda: stand_in[0],
        lambda: stand_in.sum(),
        lambda: stand_in.T,
        lambda: torch.stack([stand_in]),
        lambda: stand_in.data.add_(1),
        lambda: setattr(stand_in, "data", torch.zeros(1)),
        lambda: torch.nn.functional.linear(torch.zeros(1, stand_in.shape[2]), stand_in),
    ):
        with pytest.raises(MoeloraError, match=r"^model\.layers\.0\.mlp\.experts\.gate_up_proj is packed"):
            use()
    assert stand_in.numel() == stand_in.shape.numel() and len(stand_in) == 4
    for copied in (copy.deepcopy(stand_in), pickle.loads(pickle.dumps(stand_in)), stand_in.clone()):
        assert type(copied) is standin.StandIn and copied.shape == stand_in.shape
        assert copied.told == stand_in.told and copied.untyped_storage().nbytes() <= 4


def test_a_copy_of_a_model_computes_the_same(model):
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model))
    assert same(codes(again), codes(model))


def test_saving_writes_our_own_layout(model, tmp_path):
    """And transformers' own classes read it."""
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(codes(again), codes(model)) and torch.equal(logits(again), logits(model))
    stored = {}
    for file in tmp_path.glob("*.safetensors"):
        stored |= load_file(file)
    name = "model.layers.1.mlp.experts.down_proj"
    parts = {part for tensor in stored if tensor.startswith(name + ".") for part in tensor.rsplit(".")[-1:]}
    assert parts <= set(packed_layout.PARTS) and {"codes", "scale"} <= parts
    assert name not in stored and not any("packed" in tensor for tensor in stored)
    assert again.config.quantization_config.experts["format"] == codes(model)[0].format


@pytest.mark.parametrize("layout", ["gptq", "gpt-oss mxfp4", "bitsandbytes fp4"])
def test_saving_what_others_packed_writes_our_own_layout(layout, checkpoints, tmp_path):  # noqa: F811
    model = checkpoints(layout).model()
    model.save_pretrained(tmp_path)
    again = moelora.from_pretrained(tmp_path)
    assert same(codes(again), codes(model)) and torch.equal(logits(again), logits(model))


def test_dequantize_makes_a_plain_model(model, tmp_path):
    expected = logits(model)
    model.dequantize()
    dense = [getattr(module, name) for module in experts(model) for name in NAMES]
    assert all(type(weight) is torch.nn.Parameter for weight in dense)
    assert not list(standin.installed(model))
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moelora")
    assert torch.equal(logits(again), expected)


def test_adapter_files_are_plain_peft(checkpoints, tmp_path):  # noqa: F811
    """Saved beside packed experts, loaded by PEFT alone on the dense base; and the other way."""
    packed = adapted(checkpoints(OWN).model())
    moelora.enable(packed)
    packed.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(checkpoints(OWN).other(experts_implementation="eager"), tmp_path)
    torch.testing.assert_close(logits(plain), logits(packed), atol=0.15, rtol=0.05)
    moelora.enable(plain)
    assert torch.equal(logits(plain), logits(packed))
    back = PeftModel.from_pretrained(checkpoints(OWN).model(), tmp_path)
    moelora.enable(back)
    assert torch.equal(logits(back), logits(packed))


def test_linear_layers_stay_packed(checkpoints):  # noqa: F811
    """Before enable, with it and after disable; with LoRA on them and without."""
    packed, dense = checkpoints(LINEARS).model(), checkpoints(LINEARS).other()
    kept = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert len(kept) == 8 and isinstance(kept[0], torch.nn.Linear)
    assert all(module.weight.untyped_storage().nbytes() <= 4 for module in kept)
    assert tuple(kept[0].weight.shape) == (kept[0].out_features, kept[0].in_features)
    moelora.enable(dense, linears=True)
    expected = logits(dense)
    # Where torch is slow in 16 bits, routers and attention are on the operators, too, while enabled.
    limit = 0.02 if slow_in_torch(dense.lm_head.weight) else 0.0
    assert difference(logits(packed), expected) <= limit
    report = moelora.enable(packed)
    assert report.linears >= len(kept) and torch.equal(logits(packed), expected)
    moelora.disable(packed)
    assert difference(logits(packed), expected) <= limit


def test_preparing_for_training_in_few_bits(model):
    """PEFT makes every 16-bit parameter float32: here what is dense, and nothing of what is packed."""
    before = [weight.to("cpu") for weight in codes(model)]
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert prepared.model.norm.weight.dtype == torch.float32
    assert all(
        getattr(module, name).untyped_storage().nbytes() <= 4 for module in experts(model) for name in NAMES
    )
    assert same(codes(prepared), before) and logits(prepared).isfinite().all()


def test_state_dicts_have_the_codes(model):
    state = model.state_dict()
    name = "model.layers.0.mlp.experts.down_proj_packed.codes"
    assert torch.equal(state[name].view(torch.uint8), codes(model)[1].codes.view(torch.uint8))
    before = [weight.to("cpu") for weight in codes(model)]
    model.load_state_dict(state)
    assert same(codes(model), before)
