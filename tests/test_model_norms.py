"""Norms by rows, beside transformers' own."""

import copy
import pickle

import pytest
import torch
from model_tiny import adapt, difference, one_thread, tokens  # noqa: F401  (one_thread is autouse)
from moelora import norms
from moelora.subclasses import remove
from test_model_families import FAMILIES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
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


@pytest.mark.parametrize("wide", [False, True], ids=["weight as x", "fp32 weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [MixtralRMSNorm, GptOssRMSNorm])
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (24, 7), (2, 5, 3, 24), (2, 24, 3)])
def test_equals_the_norm(kind, shape, dtype, wide, monkeypatch):
    monkeypatch.setattr(norms, "AT_ONCE", 4 * 24)  # the last block is a part of one
    own, by_rows = _pair(kind, dtype=torch.float32 if wide else dtype)
    x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
    if shape[-1] != 24:
        x, dy = x.transpose(1, -1), dy.transpose(1, -1)
        if x.ndim == 2:
            x, dy = x.T, dy.T
    expected, got = (_gradient(norm, x, dy) for norm in (own, by_rows))
    assert got[0].dtype == expected[0].dtype and "ByRows" in got[0].grad_fn.name()
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


def _other(norm):
    norm.weight = nn.Parameter(2 * norm.weight, requires_grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda norm: norm.weight.mul_(2), "modified by an inplace operation"),
        (_other, "a norm's weight is another in the backward"),
    ],
)
def test_weight_that_changes_before_the_backward_is_noticed(change, message):
    _, by_rows = _pair()
    y = by_rows(torch.randn(6, 24, dtype=torch.bfloat16).requires_grad_())
    change(by_rows)
    with pytest.raises(RuntimeError, match=message):
        y.sum().backward()


def test_result_may_be_changed_in_place():
    """As a router's jitter and a limit on queries do."""
    own, by_rows = _pair()
    x = torch.randn(2, 3, 24, dtype=torch.bfloat16).requires_grad_()
    expected, got = (
        torch.autograd.grad(norm(x).mul_(3).clamp_(-1, 1).square().sum(), x) for norm in (own, by_rows)
    )
    torch.testing.assert_close(got, expected)


def test_abstract_tensors():
    (_, by_rows), (_, other) = _pair(), _pair()
    assert by_rows.to("meta")(torch.empty(2, 24, dtype=torch.bfloat16, device="meta")).shape == (2, 24)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1 << 20, 24, dtype=torch.bfloat16).requires_grad_()
        assert other(x).shape == x.shape


def test_second_derivative_is_refused():
    _, by_rows = _pair()
    x = torch.randn(6, 24, dtype=torch.bfloat16).requires_grad_()
    (dx,) = torch.autograd.grad(by_rows(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_what_keeps_nothing_or_cannot_is_left_alone():
    own, by_rows = _pair()
    x = torch.randn(6, 24, dtype=torch.bfloat16, requires_grad=True)
    assert "ByRows" in by_rows(x).grad_fn.name()
    with torch.autocast("cpu", torch.bfloat16):
        assert "ByRows" not in by_rows(x).grad_fn.name()
    assert "ByRows" not in by_rows(x.float()).grad_fn.name()
    assert by_rows(x[:0]).shape == (0, 24)
    with torch.no_grad():
        assert torch.equal(by_rows(x), own(x))
    for norm in (own, by_rows):
        norm.weight.requires_grad_()
        norm(x).square().sum().backward()
    assert torch.equal(own.weight.grad, by_rows.weight.grad)


def test_only_norms_of_transformers_once():
    class OtherRMSNorm(MixtralRMSNorm):
        pass

    class LayerNorm(nn.LayerNorm):
        __module__ = "transformers.models.llama.modeling_llama"

    class WithoutWeightRMSNorm(nn.Module):
        __module__ = "transformers.models.hy_v4.modeling_hy_v4"

    _, by_rows = _pair()
    assert (
        norms.use(
            nn.ModuleList([WithoutWeightRMSNorm(), by_rows, OtherRMSNorm(24), LayerNorm(24), nn.RMSNorm(24)])
        )
        == 0
    )


def test_is_copied_and_pickled():
    own, by_rows = _pair()
    x = torch.randn(6, 24, dtype=torch.bfloat16)
    for other in (copy.deepcopy(by_rows), pickle.loads(pickle.dumps(by_rows))):
        assert isinstance(other, norms.ByRows) and isinstance(other, MixtralRMSNorm)
        assert torch.equal(other(x), own(x))
    remove(by_rows)
    assert type(by_rows) is MixtralRMSNorm


def test_compiles_in_one_graph():
    own, by_rows = _pair()
    x, dy = torch.randn(2, 6, 24).bfloat16()
    compiled = torch.compile(by_rows, fullgraph=True, backend="aot_eager")
    for one, other in zip(_gradient(own, x, dy), _gradient(compiled, x, dy), strict=True):
        torch.testing.assert_close(one, other)


CHANGES = {"mixtral": {"router_jitter_noise": 0.01}, "olmoe": {"clip_qkv": 2.0}}  # in place, after norms


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "not_reentrant", "reentrant"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_model_trains_as_before(kind, checkpointing, monkeypatch):
    monkeypatch.setattr(norms, "AT_ONCE", 5 * 24)
    torch.manual_seed(0)
    config = FAMILIES[kind]()
    config.update(CHANGES.get(kind, {}))
    own = adapt(AutoModelForCausalLM.from_config(config, experts_implementation="eager").bfloat16())
    by_rows = copy.deepcopy(own)
    assert norms.use(by_rows) >= 5
    seen = []
    for model in (own, by_rows):
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        torch.manual_seed(1)
        with monkeypatch.context() as patch:
            patch.setattr(norms, "_blocks", _counted(norms._blocks, seen))
            model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        assert bool(seen) == (model is by_rows)
    expected = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    assert expected
    for name, parameter in by_rows.named_parameters():
        if name in expected:
            assert difference(parameter.grad, expected[name]) < 1e-2, name


def _counted(blocks, seen):
    return lambda rows: seen.append(rows) or blocks(rows)
