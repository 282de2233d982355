"""LoRA parameters that are no leaves while the model runs: other tensors in their place, or computed."""

from collections.abc import Callable

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
    wrappers,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

ROWS = {"input_ids": tokens(), "labels": tokens()}


def _model(enabled: bool) -> nn.Module:
    torch.manual_seed(3)
    model = adapt(build("qwen3_moe"))
    if enabled:
        moelora.enable(model)
    return model


def _lora(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def _loss(model: nn.Module, parameters: dict[str, Tensor] | None = None) -> Tensor:
    return functional_call(model, parameters or {}, kwargs=ROWS).loss


def _assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) >= 8
    assert all(e.any() and difference(f, e) < 1e-5 for f, e in zip(found, expected, strict=True))


def _told(model: nn.Module) -> list[bool | None]:
    return [a.gradient for layer in moelora.report(model).layers for a in layer.adapters]


# What stands in the parameters' place, and whether gradients come to the parameters behind.
_COMPUTED: Callable = lambda p: p * 1  # noqa: E731
_OTHER: Callable = lambda p: p.detach().clone().requires_grad_()  # noqa: E731


@pytest.mark.parametrize("replace", [_COMPUTED, _OTHER], ids=["computed", "other leaves"])
def test_functional_call(replace):
    def run(enabled: bool) -> list[Tensor]:
        model = _model(enabled)
        given = {name: replace(p) for name, p in _lora(model).items()}
        _loss(model, given).backward()
        trained = given if replace is _OTHER else _lora(model)
        found = [p.grad for p in trained.values()]
        model.zero_grad(set_to_none=True)
        if enabled:
            assert _told(model) == [True] * 4
            moelora.disable(model)
            assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
        return found

    _assert_close(run(True), run(False))


def test_first_order_meta_learning():
    """A step on a copy, by gradients that never lie in `.grad`, then the loss there."""

    def run(enabled: bool) -> list[Tensor]:
        model = _model(enabled)
        slow = _lora(model)
        assert not enabled or _told(model) == [False] * 4
        inner = torch.autograd.grad(_loss(model), slow.values())
        assert not enabled or _told(model) == [True] * 4
        fast = {name: p - 0.5 * g for (name, p), g in zip(slow.items(), inner, strict=True)}
        return list(torch.autograd.grad(_loss(model, fast), slow.values()))

    _assert_close(run(True), run(False))


def _views(model: nn.Module) -> Tensor:
    """As FSDP1 does for a forward: each LoRA weight a view of one flat parameter, in its place."""
    weights = _lora(model)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in weights.values()]))
    views = flat.split([p.numel() for p in weights.values()])
    for (name, p), view in zip(weights.items(), views, strict=True):
        module, _, attribute = name.rpartition(".")
        model.get_submodule(module)._parameters[attribute] = view.view(p.shape)
    return flat


def test_views_of_a_flat_parameter():
    """tests/model_distributed.py has FSDP1 itself."""

    def run(enabled: bool) -> list[Tensor]:
        model = _model(enabled)
        sizes = [p.numel() for p in _lora(model).values()]
        flat = _views(model)
        _loss(model).backward()
        assert not enabled or _told(model) == [True] * 4
        return list(flat.grad.split(sizes))

    _assert_close(run(True), run(False))


def test_views_that_no_gradient_reaches_show():
    model = _model(enabled=True)
    _views(model)
    (_loss(model) * 0).backward()
    assert len(moelora.report(model).untrained) == 4


@pytest.mark.parametrize("when", ["before enable", "after enable"])
def test_weight_norm_on_lora_a(when):
    def run(enabled: bool) -> dict[str, Tensor]:
        model = _model(enabled and when == "after enable")
        for wrapper in wrappers(model):
            weight_norm(wrapper.lora_A["default"])
        if enabled and when == "before enable":
            moelora.enable(model)
        found = gradients(model)[1]
        model.zero_grad(set_to_none=True)
        if enabled:
            assert _told(model) == [True] * 4
            assert {a.path for layer in moelora.report(model).layers for a in layer.adapters} == {"operators"}
        return found

    found, expected = run(True), run(False)
    assert any("original0" in name for name in found) and found.keys() == expected.keys()
    _assert_close(list(found.values()), list(expected.values()))


def test_a_parametrization_is_computed_once_in_a_call():
    class Count(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            Count.calls += 1
            return weight.clone()

    model = _model(enabled=True)
    first = wrappers(model)[0].lora_A["default"]
    parametrize.register_parametrization(first, "weight", Count())
    Count.calls = 0
    _loss(model)
    assert Count.calls == 1


@pytest.mark.slow
def test_what_cannot_be_told_is_not_called_untrained():
    """In a compiled call no hook is put on what stands in the parameters' place."""
    model = _model(enabled=True)
    given = {name: _OTHER(p) for name, p in _lora(model).items()}
    torch.compile(lambda: _loss(model, given), fullgraph=True, backend="aot_eager")().backward()
    assert all(p.grad.any() for p in given.values())
    assert _told(model) == [None] * 4
    report = moelora.report(model)
    assert not report.untrained and "gradient unknown" in str(report)
    assert "gradients have reached 0 so far; of 4 it cannot be told" in str(report)
    gradients(model)
    assert _told(model) == [True] * 4
