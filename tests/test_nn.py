"""moe_mlp and LoRAExperts against a plain loop over tokens, in fp64 and in bf16."""

import problems
import pytest
import torch
import torch.nn.functional as F
from cases import BF16, FP32, FP64

from torch_moelora import functional, nn, reference

E, H, INNER, R, TOP_K, T = 5, 12, 7, 3, 2, 11

ACTIVATIONS = {
    "SwiGLU": {},
    "gpt_oss": {"act": "silu", "alpha": 1.702, "limit": 7.0, "up_shift": 1.0, "interleaved": True},
    "GEGLU": {"act": "gelu_tanh"},
    "ungated silu": {"gated": False},
    "ungated quick gelu": {"gated": False, "alpha": 1.702},
    "ungated gelu": {"gated": False, "act": "gelu"},
    "ungated gelu_tanh": {"gated": False, "act": "gelu_tanh"},
    "ungated relu": {"gated": False, "act": "relu"},
    "relu squared": {"gated": False, "act": "relu2"},
    "one's own, halving": {"activation": lambda h: h[:, :INNER].tanh() * h[:, INNER:].exp()},
}


def module(dtype=FP64, **options) -> nn.LoRAExperts:
    """B is not zero, biases and weights are trainable."""
    torch.manual_seed(0)
    names = {"alpha": "act_alpha"}
    m = nn.LoRAExperts(
        E, H, INNER, rank=R, alpha=2.0, dtype=dtype, **{names.get(k, k): v for k, v in options.items()}
    )
    for name, p in m.named_parameters():
        p.requires_grad_()
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p, std=0.5)
    return m


def inputs(dtype=FP64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=gen, dtype=FP64).to(dtype).requires_grad_()
    ids = torch.randint(-1, E + 1, (T, TOP_K), generator=gen)
    gates = torch.rand(T, TOP_K, generator=gen, dtype=FP64).to(dtype).requires_grad_()
    return x, ids, gates


def effective(m: nn.LoRAExperts, name: str, e: int) -> torch.Tensor:
    w, a, b = (getattr(m, f"{name}_{part}") for part in ("weight", "lora_a", "lora_b"))
    w = w[e].to(FP64)
    return w if a is None else w + m.scaling * b[e].to(FP64) @ a[e].to(FP64)


def inner_activation(m: nn.LoRAExperts, h: torch.Tensor) -> torch.Tensor:
    o = m.options
    if o["activation"] is not None:
        return o["activation"](h[None])[0]
    if o["gated"]:
        options = (o["act"], o["alpha"], o["limit"], o["up_shift"], o["interleaved"])
        return reference.glu(h[None], *options)[0]
    plain = {
        "silu": lambda t: t * torch.sigmoid(o["alpha"] * t),
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda t: F.relu(t) ** 2,
    }
    return plain[o["act"]](h)


def loop(m: nn.LoRAExperts, x, ids, gates) -> torch.Tensor:
    """The definition, one token and one choice at a time."""
    rows = []
    for t in range(T):
        y = torch.zeros(H, dtype=FP64)
        for j in range(TOP_K):
            e = int(ids[t, j])
            if 0 <= e < E:
                h = effective(m, "gate_up", e) @ x[t].to(FP64)
                h = h if m.gate_up_bias is None else h + m.gate_up_bias[e].to(FP64)
                out = effective(m, "down", e) @ inner_activation(m, h)
                out = out if m.down_bias is None else out + m.down_bias[e].to(FP64)
                y = y + gates[t, j].to(FP64) * out
        rows.append(y)
    return torch.stack(rows)


def results(m, function, x, ids, gates):
    m.zero_grad()
    x.grad = gates.grad = None
    y = function(x, ids, gates)
    y.to(FP64).square().sum().backward()
    return {"y": y.detach(), "x": x.grad, "gates": gates.grad} | {
        name: p.grad for name, p in m.named_parameters()
    }


@pytest.mark.operators
@pytest.mark.parametrize("options", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("bias", [pytest.param(False, marks=pytest.mark.long_interpreted), True])
def test_forward_and_gradients(options, bias):
    m = module(bias=bias, **options)
    args = inputs()
    expected = results(m, lambda *a: loop(m, *a), *args)
    for name, got in results(m, m, *args).items():
        torch.testing.assert_close(got, expected[name], msg=lambda msg, name=name: f"{name}: {msg}")


@pytest.mark.parametrize("options", [{}, {"activation": lambda h: h[:, :INNER].tanh()}])
def test_rows_without_gates(options):
    """Weighted by hand, they are what the gates give; the rows of sentinels are zero."""
    m = module(bias=True, **options)

    def by_hand(x, ids, gates):
        rows = functional.moe_mlp(
            x, ids, None, m.gate_up_weight, m.down_weight, gate_up_bias=m.gate_up_bias, down_bias=m.down_bias,
            gate_up_lora_a=m.gate_up_lora_a, gate_up_lora_b=m.gate_up_lora_b, gate_up_scaling=m.scaling,
            down_lora_a=m.down_lora_a, down_lora_b=m.down_lora_b, down_scaling=m.scaling, **options,
        )  # fmt: skip
        assert torch.count_nonzero(rows.view(T, TOP_K, H)[(ids < 0) | (ids >= E)]) == 0
        return torch.einsum("tj,tjh->th", gates, rows.view(T, TOP_K, H))

    args = inputs()
    expected = results(m, m, *args)
    for name, got in results(m, by_hand, *args).items():
        torch.testing.assert_close(got, expected[name])


@pytest.mark.parametrize("target", ["gate_up", "down", ("gate_up", "down")])
def test_targets(target):
    m = module(target=target)
    present = {n for n, p in m.named_parameters() if "lora" in n}
    names = (target,) if isinstance(target, str) else target
    assert present == {f"{name}_lora_{ab}" for name in names for ab in "ab"}
    args = inputs()
    expected = results(m, lambda *a: loop(m, *a), *args)
    for name, got in results(m, m, *args).items():
        torch.testing.assert_close(got, expected[name])


@pytest.mark.operators
def test_bf16_with_fp32_lora():
    m = module(dtype=BF16)
    assert m.gate_up_lora_a.dtype == FP32
    x, ids, gates = inputs(BF16)
    y, ref = m(x, ids, gates), loop(m, x, ids, gates)
    assert y.dtype == BF16
    assert ((y.double() - ref).norm() / ref.norm()).item() < 1e-2  # h and glu(h) are rounded too


def test_sentinels_only():
    m = module(bias=True)
    x, ids, gates = inputs()
    y = m(x, torch.full_like(ids, E), gates)
    assert torch.count_nonzero(y) == 0
    y.sum().backward()
    assert torch.count_nonzero(m.down_weight.grad) == 0 and torch.count_nonzero(x.grad) == 0


def test_no_tokens():
    m = module(bias=True)
    y = m(
        torch.zeros(0, H, dtype=FP64),
        torch.zeros(0, TOP_K, dtype=torch.int64),
        torch.zeros(0, TOP_K, dtype=FP64),
    )
    assert y.shape == (0, H)
    y.sum().backward()
    assert torch.count_nonzero(m.gate_up_lora_b.grad) == 0


def test_a_fresh_adapter_changes_nothing_and_trains():
    m = nn.LoRAExperts(E, H, INNER, rank=R)
    x, ids, gates = (t.detach().float() if t.is_floating_point() else t for t in inputs())
    base = functional.moe_mlp(x, ids, gates, m.gate_up_weight, m.down_weight)
    assert torch.equal(m(x, ids, gates), base)
    trainable = {n for n, p in m.named_parameters() if p.requires_grad}
    assert trainable == {f"{p}_lora_{ab}" for p in ("gate_up", "down") for ab in "ab"}
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    target = torch.zeros_like(base)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.mse_loss(m(x, ids, gates), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_merged_weights_give_the_same_result():
    m = module()
    gate_up, down = m.merged_weights()
    args = inputs()
    torch.testing.assert_close(functional.moe_mlp(*args, gate_up, down), m(*args))
    assert gate_up.data_ptr() != m.gate_up_weight.data_ptr()


def test_transposed_storage():
    """gpt_oss stores [E, K, N]; the views are used as they are."""
    m = module()
    args = inputs()
    stored = [getattr(m, f"{n}_weight").detach().transpose(1, 2).contiguous() for n in ("gate_up", "down")]
    merged = functional.moe_mlp(*args, *(w.transpose(1, 2) for w in stored))
    torch.testing.assert_close(
        merged, functional.moe_mlp(*args, m.gate_up_weight.detach(), m.down_weight.detach())
    )


def test_only_h_is_kept_of_the_inner_rows():
    """Of everything with S rows, the backward keeps h; glu(h) is recomputed from it."""
    m = module()
    for name, p in m.named_parameters():
        p.requires_grad_("lora" in name)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        m(*inputs())
    inner = [s for s in shapes if len(s) == 2 and s[0] == T * TOP_K]
    assert inner == [(T * TOP_K, 2 * INNER)]


@pytest.mark.parametrize("cast", [BF16, torch.float16])
def test_autocast(cast):
    m = module(dtype=FP32)
    x, ids, gates = inputs(FP32)
    with torch.autocast("cpu", dtype=cast):
        y = m(x, ids, gates)
    assert y.dtype == cast
    y.float().square().sum().backward()
    for name, p in m.named_parameters():
        assert p.grad.dtype == FP32, name
    expected = loop(m, x, ids, gates)
    assert ((y.double() - expected).norm() / expected.norm()).item() < 1e-2


def test_double_backward_raises():
    m = module()
    x, ids, gates = inputs()
    (grad,) = torch.autograd.grad(m(x, ids, gates).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="moelora operators can be differentiated once only"):
        grad.sum().backward()


def test_scaling():
    assert nn.LoRAExperts(2, 4, 4, rank=4, alpha=8).scaling == 2
    assert nn.LoRAExperts(2, 4, 4, rank=4, alpha=8, use_rslora=True).scaling == 4


def test_initial_values():
    m = nn.LoRAExperts(3, 64, 16, rank=8)
    assert torch.count_nonzero(m.down_lora_b) == 0
    assert 0.9 / 8 < m.gate_up_lora_a.abs().max() <= 1 / 8
    assert 0.9 / 4 < m.down_lora_a.abs().max() <= 1 / 4


def test_state_dict_round_trip_and_repr():
    m, other = module(bias=True), module(bias=True)
    torch.nn.init.normal_(m.down_lora_b)
    other.load_state_dict(m.state_dict())
    args = inputs()
    assert torch.equal(m(*args), other(*args))
    for part in ("num_experts=5", "rank=3", "act=silu", "torch.float64"):
        assert part in repr(m)


def test_meta_device():
    m = nn.LoRAExperts(E, H, INNER, device="meta", dtype=BF16)
    y = m(
        torch.empty(T, H, device="meta", dtype=BF16),
        torch.empty(T, TOP_K, device="meta", dtype=torch.int64),
        torch.empty(T, TOP_K, device="meta"),
    )
    assert y.shape == (T, H) and y.dtype == BF16


def test_poison_reaches_fresh_tensors():
    """The premise of every operator test: an element that is not written shows as NaN."""
    with problems.poisoned():
        assert torch.empty(4).isnan().all()
        assert torch.zeros(2, dtype=BF16).new_empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(2, 2)).isnan().all()
