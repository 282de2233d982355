"""The loss's log-probabilities, entropies and gradients under a frozen head, against TRL's and float64."""

import pytest
import torch
from finetune_tiny import (
    arguments,  # noqa: F401  (a fixture)
    changed,
    model_dir,  # noqa: F401  (a fixture)
)
from hypothesis import given
from hypothesis import strategies as st
from model_tiny import build, one_thread  # noqa: F401  (one_thread is autouse)
from moelora.__main__ import main
from moelora.commands import head
from transformers import AutoModelForCausalLM, GraniteMoeConfig
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import add_fused_lm_head

OUTPUTS = ("log_probs", "entropy", "is_top1")
BF16 = torch.bfloat16


def _case(tokens, vocabulary, width, dtype, bias, seed, scale=1.0):
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=gen).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=gen) * scale).to(dtype)
    own = torch.randn(vocabulary, generator=gen).to(dtype) if bias else None
    return hidden, weight, own, torch.randint(vocabulary, (tokens,), generator=gen)


def _exact(hidden, weight, bias, targets):
    """By the formulas, in float64."""
    hidden = hidden.detach().double().requires_grad_()
    logits = hidden @ weight.double().T
    logits = logits if bias is None else logits + bias.double()
    every = logits.log_softmax(-1)
    top = logits.argmax(-1) == targets
    return hidden, every.gather(1, targets[:, None]).squeeze(1), -(every.exp() * every).sum(-1), top


def _gradient(log_probs, hidden, upstream):
    return torch.autograd.grad(log_probs, hidden, upstream.to(log_probs.dtype))[0]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(head, "PIECE", 7)
    monkeypatch.setattr(head, "ROWS", 3)


@given(
    tokens=st.integers(0, 8),
    vocabulary=st.integers(1, 30),
    dtype=st.sampled_from([torch.float64, torch.float32, BF16, torch.float16]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 0.3, 3.0]),
)
def test_matches_float64(tokens, vocabulary, dtype, bias, seed, scale):
    with pytest.MonkeyPatch.context() as small:
        small.setattr(head, "PIECE", 7)
        small.setattr(head, "ROWS", 3)
        case = hidden, *_ = _case(tokens, vocabulary, 5, dtype, bias, seed, scale)
        found = head.scores(*case)
    wide, log_probs, entropy, top = _exact(*case)
    # The logits are rounded to the products' dtype, and the rest to the sums': of numbers of a logit's size.
    eps = torch.finfo(dtype).eps
    close = {"rtol": 4 * eps, "atol": 6 * eps * (1 + scale)}
    for one, other in zip(found[:2], (log_probs, entropy), strict=True):
        assert one.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(one.double(), other, **close)
    upstream = torch.linspace(-1, 2, tokens)
    gradient = _gradient(found.log_probs, hidden, upstream)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), _gradient(log_probs, wide, upstream), **close)
    if dtype is torch.float64 and scale:
        assert torch.equal(found.is_top1, top)


def test_wide_states_are_not_rounded():
    hidden, weight, _, targets = _case(6, 40, 16, torch.float32, False, 2)
    narrow = weight.to(BF16)
    wide, log_probs, *_ = _exact(hidden, narrow, None, targets)
    found = head.scores(hidden, narrow, None, targets).log_probs
    torch.testing.assert_close(found.double(), log_probs, rtol=1e-5, atol=1e-5)
    gradient = _gradient(found, hidden, torch.ones(6))
    torch.testing.assert_close(
        gradient.double(), _gradient(log_probs, wide, torch.ones(6)), rtol=1e-4, atol=1e-4
    )


def test_gradcheck(small_tiles):
    hidden, *rest = _case(5, 20, 4, torch.float64, True, 0)
    assert torch.autograd.gradcheck(lambda x: head.scores(x, *rest).log_probs, hidden)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_as_trl(dtype):
    """Several of its tiles, or ours; at least as close to float64 as it is."""
    case = hidden, weight, bias, targets = _case(40, 9000, 32, dtype, False, 3, 0.3)
    found = head.scores(*case)
    given = hidden.float() if head.slow_in_torch(weight) else hidden
    theirs = ChunkedLogProbFunction.apply(
        given, weight, bias, targets, 1.0, 4096, None, 1.0, ("entropy", "is_top1")
    )
    wide, log_probs, *_ = _exact(*case)
    upstream = torch.full((40,), 0.025)
    exact = _gradient(log_probs, wide, upstream)
    errors = [
        (_gradient(t[0], hidden, upstream).double() - exact).norm() / exact.norm() for t in (found, theirs)
    ]
    assert errors[0] <= max(1.05 * errors[1], 2e-6 if dtype is torch.float32 else 3e-3)
    torch.testing.assert_close(found.entropy, theirs[1], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.log_probs, theirs[0], rtol=1e-4, atol=1e-3)
    assert torch.equal(found.is_top1, theirs[4])


def test_ties_are_the_first_one_s(small_tiles):
    """As argmax has it: within a piece of the vocabulary and across."""
    weight = torch.zeros(16, 2)
    weight[[2, 4, 11]] = 1.0
    hidden = torch.ones(4, 2, requires_grad=True)
    assert head.scores(hidden, weight, None, torch.tensor([2, 4, 11, 0])).is_top1.tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_a_certain_target_has_an_exact_gradient():
    """1 − p is nothing but rounding where p is 1 in float32; the sum over the others is not."""
    hidden = torch.tensor([[20.0, 1.0]], requires_grad=True)
    case = hidden, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), None, torch.tensor([0])
    wide, log_probs, *_ = _exact(*case)
    exact = _gradient(log_probs, wide, torch.ones(1))
    found = _gradient(head.scores(*case).log_probs, hidden, torch.ones(1))
    assert exact.abs().min() > 0
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_nan_stays_in_its_row():
    hidden, *rest = _case(4, 30, 5, torch.float32, False, 4)
    with torch.no_grad():
        hidden[1, 2] = float("nan")
    found = head.scores(hidden, *rest)
    gradient = _gradient(found.log_probs, hidden, torch.ones(4))
    for t in (found.log_probs, found.entropy, gradient.sum(-1)):
        assert t.isnan().tolist() == [False, True, False, False]


def test_unlikely_columns_are_zeros_not_subnormal():
    """Among logits that are far apart, as of a base that was trained for long."""
    hidden, weight, _, targets = _case(8, 64, 4, torch.float32, False, 5, 40.0)
    wide, log_probs, *_ = _exact(hidden, weight, None, targets)
    found = head.scores(hidden, weight, None, targets)
    assert log_probs.min() < -100
    torch.testing.assert_close(found.log_probs.double(), log_probs, rtol=1e-5, atol=1e-5)
    gradient, exact = (
        _gradient(t, h, torch.ones(8)) for t, h in ((found.log_probs, hidden), (log_probs, wide))
    )
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-3)


def test_nothing_is_kept_without_a_gradient():
    hidden, *rest = _case(3, 9, 4, torch.float32, False, 1)
    with torch.no_grad():
        assert not head.scores(hidden, *rest).log_probs.requires_grad
    assert not head.scores(hidden.detach(), *rest).log_probs.requires_grad
    scored = head.scores(hidden, *rest)
    assert not scored.entropy.requires_grad and not scored.is_top1.requires_grad


def _granite():
    config = GraniteMoeConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        logits_scaling=8.0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "mixtral_gelu", "granite"])
def test_the_model_s_own_loss(kind, monkeypatch):
    """And gradients; a head whose logits are scaled is left to TRL."""
    model = _granite() if kind == "granite" else build(kind)
    model.config.output_router_logits = False
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        model.get_output_embeddings().weight = torch.nn.Parameter(
            model.get_output_embeddings().weight.detach().clone(), requires_grad=False
        )
    calls = []
    real = head.scores
    monkeypatch.setattr(head, "scores", lambda *args: calls.append(args) or real(*args))
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (3, 9), generator=gen)
    labels = ids.masked_fill(torch.rand(3, 9, generator=gen) < 0.3, -100)
    own = model(input_ids=ids, labels=labels).loss
    own.backward()
    wanted = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    add_fused_lm_head(model, outputs=OUTPUTS)
    theirs = model(input_ids=ids, labels=labels, fused_lm_head=True)
    head.use(model)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert len(calls) == (kind != "granite")
    found.loss.backward()
    torch.testing.assert_close(found.loss, own)
    torch.testing.assert_close(model.get_input_embeddings().weight.grad, wanted)
    for name in (*OUTPUTS, "label_mask"):
        torch.testing.assert_close(getattr(found, name), getattr(theirs, name).to(getattr(found, name).dtype))
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, own)  # its own forward is as before
    nothing = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True).loss
    assert nothing.item() == 0
    model.zero_grad()
    nothing.backward()
    assert not model.get_input_embeddings().weight.grad.any()


def test_only_a_frozen_head():
    model = build("qwen3_moe")
    before = model.forward
    head.use(model)
    assert model.forward == before and not head.fits(model)
    model.requires_grad_(False)
    assert head.fits(model)
    model.config.final_logit_softcapping = 30.0
    assert not head.fits(model)


def test_shifted_labels_are_trl_s():
    model = build("qwen3_moe").requires_grad_(False)
    add_fused_lm_head(model, outputs=OUTPUTS)
    head.use(model)
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    found = model(input_ids=ids, shift_labels=ids, labels=ids, fused_lm_head=True)
    assert found.log_probs.shape == (2, 9)


def test_finetune_takes_it(arguments, monkeypatch):  # noqa: F811
    calls = []
    real = head.scores
    monkeypatch.setattr(head, "scores", lambda *args: calls.append(args) or real(*args))
    assert main(changed(arguments, steps=1, save_every=None)) == 0
    assert calls and not any(weight.requires_grad for _, weight, *_ in calls)


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "width"), [(700, 60000, 64), (4096, 16384, 1024)], ids=["tiles", "rows"]
)
def test_memory_is_told(tokens, vocabulary, width):
    """Peak of what is allocated while scores are computed, forward and backward."""
    hidden, *rest = _case(tokens, vocabulary, width, BF16, False, 0)
    with torch.profiler.profile(profile_memory=True) as profiled:
        head.scores(hidden, *rest).log_probs.sum().backward()
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert 0.85 * peak < head.memory(tokens, rest[0]) < 1.05 * peak
