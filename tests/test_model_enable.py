"""`enable`, `disable` and `report`: what they change, what they leave, what they say."""

import contextlib
import copy
import json

import moelora
import pytest
import torch
from accelerate import init_empty_weights
from model_tiny import (
    CONFIGS,
    adapt,
    build,
    difference,
    fill,
    gradients,
    logits,
    one_thread,  # noqa: F401  (autouse)
    wrappers,
)
from moelora import experts
from moelora.experts import recognise_activation
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation


def _experts(model):
    return [module for module in model.modules() if hasattr(module, "is_concatenated")]


def _weights_built(model, monkeypatch) -> list[str]:
    """The parameters for which PEFT builds a whole weight in one forward."""
    built = []
    original = torch.nn.utils.parametrize.register_parametrization

    def spy(module, name, *args, **kwargs):
        built.append(name)
        return original(module, name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils.parametrize, "register_parametrization", spy)
        logits(model)
    return built


def test_round_trip_leaves_no_trace():
    model = adapt(build("qwen3_moe"))
    before, state = logits(model), {name: id(p) for name, p in model.named_parameters()}
    keys, text = list(model.state_dict()), repr(model)
    moelora.enable(model)
    assert list(model.state_dict()) == keys and repr(model) == text
    assert {name: id(p) for name, p in model.named_parameters()} == state
    assert all(isinstance(w, ParamWrapper) and type(w) is not ParamWrapper for w in wrappers(model))
    assert "moelora" not in str(model.config.to_dict())
    moelora.disable(model)
    assert all(type(w) is ParamWrapper for w in wrappers(model))
    assert all(
        m.config._experts_implementation == "eager" and "_moelora" not in vars(m) for m in _experts(model)
    )
    assert torch.equal(logits(model), before)
    moelora.disable(model)


def test_enable_twice_is_enable_once():
    model = adapt(build("qwen3_moe"))
    first = moelora.enable(model)
    assert moelora.enable(model) == first == moelora.report(model)
    moelora.disable(model)
    assert all(m.config._experts_implementation == "eager" for m in _experts(model))


def test_no_weight_is_built(monkeypatch):
    model = adapt(build("gpt_oss"))
    assert _weights_built(model, monkeypatch) == ["down_proj", "gate_up_proj"] * 2
    moelora.enable(model)
    assert _weights_built(model, monkeypatch) == []


def test_report_names_layers_and_adapters():
    report = moelora.enable(adapt(build("qwen3_moe"), "down", rank=3))
    (row,) = [line for line in str(report).splitlines() if "layers" in line and "mlp" in line]
    name, *cells = row.split()
    assert name == "model.layers.*.mlp.experts"
    assert " ".join(cells) == "×2 Qwen3MoeExperts 5 operators down_proj r=3 (no gradient yet)"
    assert "2 expert parameters train with LoRA, gradients have reached 0 so far" in str(report)
    assert json.loads(report.to_json())["layers"][1]["adapters"][0]["parameter"] == "down_proj"


def test_report_says_frozen():
    model = adapt(build("qwen3_moe"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    report = moelora.enable(model)
    assert report.trainable == 0 and not report.untrained
    assert "NOTHING ON THE EXPERTS WILL BE TRAINED: their LoRA is frozen" in str(report)


def test_adapter_with_one_factor_frozen_still_trains():
    model = adapt(build("qwen3_moe"))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    moelora.enable(model)
    gradients(model)
    assert moelora.report(model).trainable == 4 and not moelora.report(model).untrained


def test_report_says_that_there_is_no_lora():
    base = build("qwen3_moe").requires_grad_(False)
    assert 'target_parameters=["experts.down_proj", "experts.gate_up_proj"]' in str(moelora.enable(base))
    base.requires_grad_(True)
    assert "NOTHING" not in str(moelora.report(base))  # the experts' own weights are trained


def test_model_without_experts_is_an_error():
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(moelora.MoeloraError, match="LlamaForCausalLM has no expert layers"):
        moelora.enable(LlamaForCausalLM(config))


def _eight_bit(module):
    """Weights that transformers' eager experts could not use either: for what `enable` says only."""
    module.down_proj = nn.Parameter(module.down_proj.to(torch.float8_e4m3fn), requires_grad=False)


def test_model_that_cannot_be_served_is_an_error_and_unchanged():
    model = build("qwen3_moe")
    for module in _experts(model):
        _eight_bit(module)
    message = r"can use the operators: model\.layers\.0\.mlp\.experts down_proj is float8_e4m3fn"
    with pytest.raises(moelora.MoeloraError, match=message):
        moelora.enable(model)
    assert all("_moelora" not in vars(module) for module in model.modules())


def test_layer_that_cannot_be_served_goes_its_old_way(monkeypatch):
    model = adapt(build("qwen3_moe"))
    expected = gradients(model)
    second = _experts(model)[1]
    monkeypatch.setattr(
        experts, "unsupported", lambda module, where: "is special" if module is second else None
    )
    report = moelora.enable(model)
    assert [layer.path for layer in report.layers] == ["operators", "transformers"]
    assert "transformers: is special" in str(report) and report.trainable == 4
    found = gradients(model)
    assert all(difference(found[1][name], gradient) < 1e-5 for name, gradient in expected[1].items())


def test_layers_of_another_interface_keep_their_own_functions():
    """As quantised experts do, beside others of the same configuration."""

    class Others(ExpertsInterface):
        _global_mapping = {"mine": lambda self, x, ids, gates: 2 * x}  # noqa: RUF012

    plain = _with_gate()
    kind = type("EightBit", (_Experts,), {"gated": True})
    eight_bit = use_experts_implementation(kind, experts_interface=Others())(plain.config)
    _eight_bit(eight_bit)
    plain.config._experts_implementation_internal = "mine"
    report = moelora.enable(nn.ModuleList([plain, eight_bit]))
    assert [layer.path for layer in report.layers] == ["operators", "transformers"]
    x = torch.randn(3, 8)
    assert torch.equal(eight_bit(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)), 2 * x)
    plain.config._experts_implementation_internal = None


def test_whole_model_can_be_pickled(tmp_path):
    model = adapt(build("qwen3_moe"))
    moelora.enable(model)
    gradients(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded), logits(model))
    gradients(loaded)
    assert not moelora.report(loaded).untrained and moelora.report(loaded).served


def test_copy_of_an_enabled_model_is_its_own():
    model = adapt(build("qwen3_moe"))
    moelora.enable(model)
    twin = copy.deepcopy(model)
    fill(twin, seed=9)
    assert difference(logits(twin), logits(model)) > 1e-3
    moelora.disable(twin)
    assert moelora.report(model).served and not moelora.report(twin).layers


# ---- gates

_CONFIG = Qwen3MoeConfig(hidden_size=8, num_hidden_layers=1)


class _Experts(nn.Module):
    def __init__(self, config, act="silu"):
        super().__init__()
        first, rows = ("gate_up_proj", 12) if self.gated else ("up_proj", 6)
        setattr(self, first, nn.Parameter(torch.randn(3, rows, 8)))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.act_fn = ACT2FN[act]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError


def _with_gate(gate=None, act="silu", has_gate=True, **attributes):
    members = {"gated": has_gate} | ({} if gate is None else {"_apply_gate": gate})
    cls = use_experts_implementation(type("Experts", (_Experts,), members), has_gate=has_gate)
    module = cls(_CONFIG, act=act)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def _clamped(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
    return (up + 1) * gate * torch.sigmoid(gate * self.slope)


def _clamped_after(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


def _swapped(self, gate_up):
    up, gate = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (_with_gate(), ("silu", 1.0, None, 0.0)),
        (_with_gate(act="gelu"), ("gelu", 1.0, None, 0.0)),
        (_with_gate(act="gelu_pytorch_tanh"), ("gelu_tanh", 1.0, None, 0.0)),
        (_with_gate(act="quick_gelu"), ("silu", 1.702, None, 0.0)),
        (_with_gate(_clamped, limit=5, slope=1.5), ("silu", 1.5, 5.0, 1.0)),
    ],
)
def test_known_gates_are_fused(module, expected):
    found = recognise_activation(module)
    assert tuple(found[key] for key in ("act", "alpha", "limit", "up_shift")) == expected
    assert found["interleaved"] is False


def _cut(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate).detach() * up  # a fused one, but for its gradient


@pytest.mark.parametrize("gate", [_clamped_after, _swapped, _cut])
def test_other_gates_are_called_as_they_are(gate):
    module = _with_gate(gate, limit=5)
    assert recognise_activation(module) == {"activation": module._apply_gate}


def test_gate_with_parameters_is_called_as_it_is():
    module = _with_gate()
    module.scale = nn.Parameter(torch.ones(6))
    assert recognise_activation(module) == {"activation": module._apply_gate}


def test_gpt_oss_gate_is_fused():
    (module, _) = _experts(build("gpt_oss"))
    assert recognise_activation(module) == {
        "act": "silu",
        "alpha": pytest.approx(1.702),
        "limit": 7.0,
        "up_shift": 1.0,
        "interleaved": True,
    }


# ---- where nothing can be computed


@contextlib.contextmanager
def _meta_as_default():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.device("meta"),
        _meta_as_default,
        lambda: init_empty_weights(include_buffers=True),
        FakeTensorMode,
    ],
    ids=["meta", "default device", "init_empty_weights", "fake"],
)
def test_enabled_under_a_mode_as_without(mode):
    model, expected = adapt(build("gpt_oss")), moelora.enable(adapt(build("gpt_oss")))
    with mode():
        report = moelora.enable(model)
    assert report == expected and report.layers[0].gate == "fused"
    gradients(model)
    assert not moelora.report(model).untrained


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_a_model_without_values_is_enabled_run_and_reported_of(mode):
    with mode():
        model = AutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"](), experts_implementation="eager")
        (first, second) = moelora.enable(model).layers
        assert first.gate == second.gate == "fused" and first.path == "operators"
        ids = torch.zeros(2, 5, dtype=torch.int64)
        assert model(input_ids=ids, labels=ids).logits.shape == (2, 5, 64)


def test_gradients_without_values_are_unknown():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"](), experts_implementation="eager")
        lora = LoraConfig(target_modules=[], target_parameters=["experts.down_proj"])
        model = get_peft_model(model, lora)
        moelora.enable(model)
        ids = torch.zeros(2, 5, dtype=torch.int64)
        model(input_ids=ids, labels=ids).loss.backward()
    assert [a.gradient for layer in moelora.report(model).layers for a in layer.adapters] == [None] * 2


def _clamped_by_buffer(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate.clamp(max=self.bound)) * up.clamp(-self.bound, self.bound)


def test_a_gate_without_values_is_tried_again_in_the_first_real_call():
    module = _with_gate(_clamped_by_buffer, limit=5.0)
    module.register_buffer("bound", torch.empty((), device="meta"))
    assert moelora.enable(module).layers[0].gate == "module"
    module.bound = torch.tensor(5.0)
    x, ids, gates = torch.randn(7, 8), torch.randint(0, 3, (7, 2)), torch.rand(7, 2)
    y = module(x, ids, gates)
    assert moelora.report(module).layers[0].gate == "fused"
    inner = module._apply_gate(torch.einsum("th,tjih->tji", x, module.gate_up_proj[ids]))
    expected = torch.einsum("tj,tji,tjhi->th", gates, inner, module.down_proj[ids])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_ungated_experts():
    module = _with_gate(act="relu2", has_gate=False)
    moelora.enable(module)
    x, ids, gates = torch.randn(7, 8), torch.randint(0, 3, (7, 2)), torch.rand(7, 2)
    inner = torch.einsum("th,tjih->tji", x, module.up_proj[ids]).relu().square()
    expected = torch.einsum("tj,tji,tjhi->th", gates, inner, module.down_proj[ids])
    torch.testing.assert_close(module(x, ids, gates), expected, rtol=1e-4, atol=1e-4)
