"""Logits and gradients on the operators beside transformers' eager experts and PEFT."""

import moelora
import pytest
import torch
from model_tiny import (
    CONFIGS,
    PROJECTIONS,
    adapt,
    build,
    difference,
    gradients,
    logits,
    one_thread,  # noqa: F401  (autouse)
    tokens,
)


def _train_router(model):
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
            parameter.requires_grad_(True)


def _assert_same(found, expected, tolerance):
    (found_logits, found_gradients), (expected_logits, expected_gradients) = found, expected
    assert difference(found_logits, expected_logits) < tolerance
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert gradient.norm() > 0, name
        assert difference(found_gradients[name], gradient) < tolerance, name


@pytest.mark.parametrize("which", PROJECTIONS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_and_router_fp32(kind, which):
    model = adapt(build(kind), which)
    _train_router(model)
    expected = gradients(model)
    report = moelora.enable(model)
    assert len(report.served) == 2 and report.trainable == 2 * len(PROJECTIONS[which])
    _assert_same(gradients(model), expected, 1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_without_adapters_fp32(kind):
    model = build(kind)
    expected = gradients(model)
    moelora.enable(model)
    _assert_same(gradients(model), expected, 1e-5)


@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_expert_layer_bf16(kind, fp32):
    """One layer, so that rounding cannot change the routing: as close to fp32 as eager in bf16, or closer."""

    def run(dtype, enabled):
        model = adapt(build(kind, torch.bfloat16), fp32=fp32)
        if dtype == torch.float32:
            model.float()
        if enabled:
            moelora.enable(model)
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(40, 24, generator=generator).bfloat16().to(dtype).requires_grad_()
        routes = torch.rand(40, 5, generator=generator).topk(2)
        gates = routes.values.bfloat16().to(dtype).requires_grad_()
        y = model.get_base_model().model.layers[0].mlp.experts(x, routes.indices, gates)
        dy = torch.randn(y.shape, generator=generator).bfloat16().to(dtype)
        adapters = [p for name, p in model.named_parameters() if "layers.0" in name and p.requires_grad]
        return [y, *torch.autograd.grad(y, [x, gates, *adapters], dy)]

    exact = run(torch.float32, enabled=False)
    eager = run(torch.bfloat16, enabled=False)
    ours = run(torch.bfloat16, enabled=True)
    assert [t.dtype for t in ours] == [t.dtype for t in eager]
    for found, peer, expected in zip(ours, eager, exact, strict=True):
        assert difference(found, expected) < 1.5 * difference(peer, expected) + 2e-3


def test_bf16_model_loss():
    model = adapt(build("qwen3_moe", torch.bfloat16))
    with torch.no_grad():
        expected = model(input_ids=tokens(), labels=tokens()).loss
        moelora.enable(model)
        found = model(input_ids=tokens(), labels=tokens()).loss
    assert difference(found, expected) < 2e-2


def test_chosen_by_name():
    """`experts_implementation="moelora"` works without `enable`; PEFT then adds its delta as usual."""
    moelora.register()
    model = adapt(build("qwen3_moe"))
    expected = logits(model)
    model.get_base_model().set_experts_implementation("moelora")
    assert difference(logits(model), expected) < 1e-5
