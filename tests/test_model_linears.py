"""Frozen linear layers on the operators: with LoRA and without, they compute what torch and PEFT do."""

import copy
import pickle
from contextlib import nullcontext

import moelora
import pytest
import torch
from model_tiny import (
    adapt,
    build,
    difference,
    gradients,
    one_thread,  # noqa: F401  (autouse)
    tokens,
)
from moelora import linears
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def slow(monkeypatch):
    """A machine on which torch has no fast 16-bit product."""
    monkeypatch.setattr(linears, "slow_in_torch", lambda weight: weight.dtype in linears.HALF)


def _adapted(dtype: torch.dtype, **keywords) -> nn.Module:
    torch.manual_seed(0)
    return adapt(build("qwen3_moe", dtype), targets=TARGETS, **keywords).train()


def test_logits_and_gradients_are_those_of_peft():
    plain, model = _adapted(torch.float32), _adapted(torch.float32)
    moelora.enable(plain, linears=False)
    report = moelora.enable(model, linears=True)
    layers = 2 * len(TARGETS) + 1
    assert report.linears == layers and f"{layers} frozen linear layers run on the operators" in str(report)
    assert sum(type(m) is linears.LoraLinear for m in model.modules()) == 2 * len(TARGETS)
    (logits, expected), (found, gradients_found) = gradients(plain), gradients(model)
    assert difference(found, logits) < 1e-5
    assert expected.keys() == gradients_found.keys() and any("q_proj" in name for name in expected)
    for name, gradient in expected.items():
        assert difference(gradients_found[name], gradient) < 1e-5, name
    moelora.disable(model)
    assert not any(isinstance(m, linears.FrozenLinear | linears.LoraLinear) for m in model.modules())
    assert difference(model(input_ids=tokens()).logits, logits) < 1e-5


@pytest.mark.parametrize("lora", ["none", "float32", "the base's dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_half_precision_is_as_exact_as_one_rounding(dtype, bias, lora):
    torch.manual_seed(1)
    layer = nn.Linear(40, 24, bias=bias).to(dtype).requires_grad_(False)
    model = nn.Sequential(layer)
    if lora != "none":
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(model, config, autocast_adapter_dtype=lora == "float32")
    assert linears.hook(model, True) == 1
    x = torch.randn(2, 5, 40, dtype=dtype, requires_grad=True)
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == (0 if lora == "none" else 2)
    found = [y, *torch.autograd.grad(y, [x, *trained], torch.ones_like(y))]
    exact = copy.deepcopy(model).double()
    linears.unhook(exact)
    wide = x.detach().double().requires_grad_()
    y = exact(wide)
    trained = [p for p in exact.parameters() if p.requires_grad]
    expected = [y, *torch.autograd.grad(y, [wide, *trained], torch.ones_like(y))]
    for one, other in zip(found, expected, strict=True):
        assert difference(one, other) < 3e-3


def test_only_what_is_slow_by_default(slow):
    model, wide = _adapted(torch.bfloat16), _adapted(torch.float32)
    assert moelora.enable(wide).linears == 0
    assert moelora.enable(model).linears == 2 * len(TARGETS) + 1
    own = [type(module).__name__ for module in model.modules() if isinstance(module, linears.OwnProducts)]
    assert sorted(own) == 2 * ["Qwen3MoeAttention"] + 2 * ["Qwen3MoeTopKRouter"]
    assert moelora.enable(model, linears=False).linears == 0
    assert not any(isinstance(module, linears.OwnProducts) for module in model.modules())


def test_those_with_lora_where_torch_is_fast(monkeypatch):
    """In one call each; by itself a layer is torch's."""
    monkeypatch.setattr(linears, "slow_in_torch", lambda weight: False)
    model, other = _adapted(torch.bfloat16), _adapted(torch.bfloat16)
    for dtype in (torch.float32, torch.float16):
        assert moelora.enable(_adapted(dtype)).linears == 0
    assert moelora.enable(build("qwen3_moe", torch.bfloat16)).linears == 0
    report = moelora.enable(model)
    assert report.linears == 2 * len(TARGETS) == moelora.report(model).linears
    assert moelora.enable(other, linears=False).linears == 0
    attention = model.base_model.model.model.layers[0].self_attn
    assert type(attention.q_proj) is linears.LoraLinear and type(attention.q_proj.base_layer) is nn.Linear
    assert not any(isinstance(module, linears.OwnProducts) for module in model.modules())
    (found, gradients_found), (logits, expected) = gradients(model), gradients(other)
    assert difference(found, logits) < 2e-2  # of two layers, each product of which is rounded
    assert expected.keys() == gradients_found.keys() and any("q_proj" in name for name in expected)
    attention.q_proj.base_layer._hf_hook = None  # accelerate's: where the weight will be is its business
    assert moelora.enable(model).linears == 2 * len(TARGETS) - 1
    moelora.disable(model)
    assert not any(isinstance(module, linears.LoraLinear) for module in model.modules())


@pytest.mark.parametrize("every", [None, True])
def test_lora_in_one_call_is_as_exact_alone(every, monkeypatch):
    monkeypatch.setattr(linears, "slow_in_torch", lambda weight: False)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 24).bfloat16().requires_grad_(False))
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(model, config)
    assert linears.hook(model, every) == 1
    x = torch.randn(5, 40, dtype=torch.bfloat16)
    found, exact = model(x), copy.deepcopy(model).double()
    linears.unhook(exact)
    assert difference(found, exact(x.double())) < 3e-3


def test_routers_multiply_on_the_operators(slow):
    model = build("qwen3_moe", torch.bfloat16).requires_grad_(False)
    router = model.model.layers[0].mlp.gate
    kind, x = type(router), torch.randn(6, router.weight.shape[1], dtype=torch.bfloat16)
    expected = router(x)
    moelora.enable(model)
    assert isinstance(router, kind) and isinstance(router, linears.OwnProducts)
    for clone in (router, copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        with torch.profiler.profile() as profiler:
            found = clone(x)
        assert "moelora::scatter_lora" in {event.key for event in profiler.key_averages()}
        assert difference(found[0], expected[0]) < 3e-3
    moelora.disable(model)
    assert type(router) is kind


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_attention_is_in_float32(slow, kind):
    """One is torch's own attention, the other two products and sinks."""
    model = build(kind, torch.bfloat16).requires_grad_(False)
    attention = model.model.layers[0].self_attn
    moelora.enable(model)
    assert isinstance(attention, linears.OwnProducts)
    seen = {}

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function.overloadpacket)
            if any(part in name for part in ("attention", "bmm", "aten.mm")):
                seen.setdefault(args[0].dtype, set()).add(name)
            return function(*args, **(kwargs or {}))

    with Seen():
        model(input_ids=tokens(), output_hidden_states=True)
    assert set(seen) == {torch.float32}, seen
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=tokens())


@pytest.mark.parametrize(
    "changed",
    ["two adapters", "dropout", "DoRA", "disabled", "merged", "autocast"],
)
def test_what_is_no_plain_adapter_is_left_to_peft(changed):
    keywords = {"dropout": {"lora_dropout": 0.5}, "DoRA": {"use_dora": True}}.get(changed, {})
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 8).requires_grad_(False))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **keywords)
    model = get_peft_model(model, config)
    if changed == "two adapters":
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    if changed == "merged":
        model.merge_adapter()
    plain = copy.deepcopy(model)
    linears.hook(model, True)
    assert any(type(module) is linears.LoraLinear for module in model.modules())
    x = torch.randn(4, 16)
    outputs = []
    for one in (plain, model):
        torch.manual_seed(2)  # of the dropout
        with (
            one.disable_adapter() if changed == "disabled" else nullcontext(),
            torch.autocast("cpu", enabled=changed == "autocast"),
        ):
            outputs.append(one(x))
    assert difference(outputs[1], outputs[0]) < 1e-5


def test_trained_layers_are_left_alone():
    model = _adapted(torch.float32)
    model.get_output_embeddings().weight.requires_grad_(True)
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    assert moelora.enable(model, linears=True).linears == 2 * len(TARGETS) - 1


def test_compiled(slow):
    model = _adapted(torch.bfloat16)
    moelora.enable(model)
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
        found = torch.compile(model, backend="eager", fullgraph=True)(input_ids=tokens()).logits
    assert difference(found, expected) < 2e-2  # attention stays in 16 bits there
