"""Norms by rows, beside transformers' own."""

import copy
import pickle

import pytest
import torch
from model_tiny import CONFIGS, adapt, build, one_thread  # noqa: F401  (one_thread is autouse)
from moelora import norms
from moelora.subclasses import remove
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm


def _pair(kind=MixtralRMSNorm, width=24, dtype=torch.bfloat16):
    torch.manual_seed(0)
    own = kind(width).to(dtype).requires_grad_(False)
    nn.init.normal_(own.weight)
    by_rows = copy.deepcopy(own)
    assert norms.use(nn.Sequential(by_rows)) == 1 and isinstance(by_rows, kind)
    return own, by_rows


def _gradient(norm, x, dy):
    x = x.detach().requires_grad_()
    y = norm(x)
    return y, *torch.autograd.grad(y, x, dy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [MixtralRMSNorm, GptOssRMSNorm])
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (2, 5, 3, 24)])
def test_equals_the_norm(kind, shape, dtype, monkeypatch):
    monkeypatch.setattr(norms, "AT_ONCE", 4 * 24)  # the last block is a part of one
    own, by_rows = _pair(kind, dtype=dtype)
    x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
    for given in (x, x.transpose(0, -2)):
        expected, got = (_gradient(norm, given, dy.view(given.shape)) for norm in (own, by_rows))
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(other, one, rtol=torch.finfo(dtype).eps, atol=1e-12)


def test_keeps_its_input_alone():
    own, by_rows = _pair()
    x = torch.randn(6, 24, dtype=torch.bfloat16).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        own(x)
        assert set(kept) - {x.data_ptr(), own.weight.data_ptr()}
        kept.clear()
        by_rows(x)
    assert set(kept) == {x.data_ptr(), by_rows.weight.data_ptr()}


def test_weight_that_changes_before_the_backward_is_noticed():
    _, by_rows = _pair()
    y = by_rows(torch.randn(6, 24, dtype=torch.bfloat16).requires_grad_())
    by_rows.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivative_is_refused():
    _, by_rows = _pair()
    x = torch.randn(6, 24, dtype=torch.bfloat16).requires_grad_()
    (dx,) = torch.autograd.grad(by_rows(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_trained_norms_autocast_and_empty_batches_are_left_alone():
    own, by_rows = _pair(dtype=torch.float32)
    x = torch.randn(6, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert "ByRows" not in by_rows(x).grad_fn.name()
    assert by_rows(x[:0]).shape == (0, 24)
    by_rows.weight.requires_grad_()
    own.weight.requires_grad_()
    for norm in (own, by_rows):
        norm(x).square().sum().backward()
    assert torch.equal(own.weight.grad, by_rows.weight.grad)


def test_only_norms_of_transformers_once():
    class OtherRMSNorm(MixtralRMSNorm):
        pass

    class LayerNorm(nn.LayerNorm):
        __module__ = "transformers.models.llama.modeling_llama"

    _, by_rows = _pair()
    assert norms.use(nn.ModuleList([by_rows, OtherRMSNorm(24), LayerNorm(24), nn.RMSNorm(24)])) == 0


def test_is_copied_and_pickled():
    own, by_rows = _pair()
    x = torch.randn(6, 24, dtype=torch.bfloat16)
    for other in (copy.deepcopy(by_rows), pickle.loads(pickle.dumps(by_rows))):
        assert isinstance(other, norms.ByRows) and isinstance(other, MixtralRMSNorm)
        assert torch.equal(other(x), own(x))
    remove(by_rows)
    assert type(by_rows) is MixtralRMSNorm


def test_compiles_in_one_graph():
    own, by_rows = _pair(dtype=torch.float32)
    x, dy = torch.randn(2, 6, 24)
    compiled = torch.compile(by_rows, fullgraph=True, backend="aot_eager")
    for one, other in zip(_gradient(own, x, dy), _gradient(compiled, x, dy), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "not_reentrant", "reentrant"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_model_trains_as_before(kind, checkpointing):
    own = adapt(build(kind))
    by_rows = copy.deepcopy(own)
    assert norms.use(by_rows) >= 5
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    for model in (own, by_rows):
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.train()(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    assert len(expected) == 8
    for name, parameter in by_rows.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
