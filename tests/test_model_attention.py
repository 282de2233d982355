"""Attention with sinks through one fused kernel, beside transformers' own of the families that have them."""

import copy

import pytest
import torch
from model_tiny import build, one_thread  # noqa: F401  (one_thread is autouse)
from moelora import attention, checkpoints
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    "pad_token_id": 0,
}
FAMILIES = {
    "gpt_oss": {},
    "granitemoe_swa": {},
    "mimo_v2_flash": {
        "n_routed_experts": 4,
        "v_head_dim": 6,
        "swa_v_head_dim": 6,
        "swa_head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "add_swa_attention_sink_bias": True,
    },
}


def _model(kind: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **_COMMON | FAMILIES[kind])
    model = AutoModelForCausalLM.from_config(
        config, experts_implementation="eager", attn_implementation="eager"
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    assert any("sinks" in name or "sink" in name for name, _ in model.named_parameters())
    return model.to(dtype).eval()


def _both(kind, dtype=torch.float32):
    own = _model(kind, dtype)
    fused = copy.deepcopy(own)
    assert attention.use(fused)
    assert fused.config.get_text_config()._attn_implementation == attention.NAME
    return own, fused


@pytest.mark.parametrize("block", [256, 5], ids=["", "blocks"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kind", attention.KNOWN)
def test_as_transformers(kind, padded, block, monkeypatch):
    """Logits, and gradients of all parameters, sinks among them; sequences longer than a sliding window."""
    monkeypatch.setattr(attention, "BLOCK", block)
    own, fused = _both(kind)
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (3, 17), generator=gen)
    here = torch.ones_like(ids)
    if padded:
        here[0, :4] = here[2, 11:] = 0
    weight = torch.randn(3, 17, 64, generator=gen) * here[..., None]
    for model in (own, fused):
        logits = model(input_ids=ids, attention_mask=here).logits
        (logits * weight).sum().backward()
        model.found = logits.detach() * here[..., None]
    torch.testing.assert_close(fused.found, own.found, rtol=2e-5, atol=2e-5)
    moved = 0
    for (name, a), (_, b) in zip(own.named_parameters(), fused.named_parameters(), strict=True):
        if a.grad is not None:
            scale = a.grad.abs().max().item()
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=2e-5 * max(scale, 1e-3), msg=name)
            moved += "sink" in name and scale > 0
    assert moved


def test_a_mask_that_is_added():
    """As somebody's own, in four dimensions."""
    own, fused = _both("gpt_oss")
    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(5))
    seen = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7)
    added = torch.zeros(2, 1, 7, 7).masked_fill(~seen, torch.finfo(torch.float32).min)
    given = dict.fromkeys(("full_attention", "sliding_attention"), added)
    with torch.no_grad():
        expected, found = (model(input_ids=ids, attention_mask=given).logits for model in (own, fused))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_checkpoints_are_loaded_with_it(tmp_path):
    """By every command, and outlined so."""
    _model("gpt_oss").save_pretrained(tmp_path)
    model, _ = checkpoints.load(tmp_path, "auto")
    for one in (model, checkpoints.outline(tmp_path)[0]):
        assert one.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("kind", attention.KNOWN)
def test_generates_the_same(kind):
    """One query at a time, behind a cache."""
    own, fused = _both(kind)
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(2))
    here = torch.ones_like(ids)
    here[1, :3] = 0
    asked = {"attention_mask": here, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(own.generate(ids, **asked), fused.generate(ids, **asked))


def test_bfloat16_is_as_close_to_float64_as_transformers():
    own, fused = _both("gpt_oss", torch.bfloat16)
    exact = copy.deepcopy(own).double()
    ids = torch.randint(1, 64, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wide, *logits = (model(input_ids=ids).logits.double() for model in (exact, own, fused))
    theirs, ours = ((found - wide).norm() / wide.norm() for found in logits)
    assert ours <= 1.2 * theirs


def test_without_a_mask_queries_see_what_is_before_them():
    gen = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(2, heads, n, 8, generator=gen) for heads, n in ((4, 3), (2, 5), (2, 5)))
    seen = torch.ones(3, 5, dtype=torch.bool).tril(2)
    for sinks in (None, torch.randn(4, generator=gen)):
        one, _ = attention.attend(nn.Module(), query, key, value, None, s_aux=sinks)
        other, _ = attention.attend(nn.Module(), query, key, value, seen.expand(2, 1, 3, 5), s_aux=sinks)
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sinks", [False, True])
def test_any_mask(sinks, monkeypatch):
    """In blocks of queries, a query without any key among them, as by torch's kernel with one more key."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    gen = torch.Generator().manual_seed(6)
    query, key, value = (
        torch.randn(2, heads, n, 8, generator=gen, dtype=torch.float64, requires_grad=True)
        for heads, n in ((4, 10), (2, 13), (2, 13))
    )
    logits = torch.randn(4, generator=gen, dtype=torch.float64, requires_grad=True) if sinks else None
    seen = torch.rand(2, 1, 10, 13, generator=gen) < 0.3
    seen[0, :, 4:8] = False  # a block that sees nothing
    seen[:, :, 9, 12] = True
    dy = torch.randn(2, 10, 4, 8, generator=gen, dtype=torch.float64)
    inputs = [t for t in (query, key, value, logits) if t is not None]
    found, _ = attention.attend(nn.Module(), query, key, value, seen, 0.3, s_aux=logits)
    expected = attention._with_another_key(query, key, value, logits, seen, 0.3, 0.0).transpose(1, 2)
    assert (found[0, 4:8] == 0).all()
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(y, inputs, dy) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_any_layout():
    """Of query, key and value, and a mask for all queries alike."""
    gen = torch.Generator().manual_seed(10)
    plain = [torch.randn(2, heads, 5, 8, generator=gen) for heads in (4, 2, 2)]
    odd = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in plain]
    seen = torch.rand(2, 1, 1, 5, generator=gen) < 0.7
    seen[..., 0] = True
    expected, _ = attention.attend(nn.Module(), *plain, seen.expand(2, 1, 5, 5).contiguous())
    for tensors in (plain, odd):
        assert torch.equal(attention.attend(nn.Module(), *tensors, seen)[0], expected)
    added = torch.zeros(2, 1, 5, 5, requires_grad=True)
    attention.attend(nn.Module(), *plain, added)[0].square().sum().backward()
    assert added.grad.any()


@pytest.mark.parametrize(
    ("keys", "mask", "told"), [(0, (1, 1, 3, 0), "S of at least 1"), (3, (1, 3, 3), "must be a 4-D tensor")]
)
def test_what_is_refused(keys, mask, told):
    key = torch.zeros(1, 2, keys, 8)
    with pytest.raises(ValueError, match=told):
        attention.attend(nn.Module(), torch.zeros(1, 2, 3, 8), key, key, torch.ones(mask, dtype=torch.bool))


def test_keys_that_nobody_sees_are_not_read():
    """A window's, by their NaN."""
    gen = torch.Generator().manual_seed(7)
    query, key, value = (torch.randn(1, 2, 600, 8, generator=gen) for _ in range(3))
    seen = torch.ones(600, 600, dtype=torch.bool).tril().triu(-20)[None, None]
    key[:, :, 300:] = torch.nan
    found, _ = attention.attend(nn.Module(), query, key, value, seen)
    assert found[:, :256].isfinite().all() and found[:, 300:].isnan().all()


def test_dtypes():
    """Under autocast those of it, as in torch's own; else one."""
    own, fused = _both("gpt_oss")
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(9))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected, found = (model(input_ids=ids).logits.float() for model in (own, fused))
    assert (found - expected).norm() < 0.02 * expected.norm()
    query = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="must have one dtype"):
        attention.attend(nn.Module(), query, query, query.bfloat16(), None)


def test_without_storage():
    """Shapes, with gradients, as where only memory is reckoned."""
    query, key = (torch.empty(2, heads, 9, 8, device="meta", requires_grad=True) for heads in (4, 2))
    y, _ = attention.attend(nn.Module(), query, key, key, None, s_aux=torch.empty(4, device="meta"))
    y.sum().backward()
    assert y.shape == (2, 9, 4, 8) and key.grad.shape == key.shape


@pytest.mark.parametrize("products", [False, True], ids=["sinks", "products"])
def test_compiled(products, monkeypatch):
    """In one graph, with its backward."""
    if products:
        monkeypatch.setattr(attention, "BY_PRODUCTS", True)
    dtype = torch.bfloat16 if products else torch.float32
    gen = torch.Generator().manual_seed(8)
    tensors = [torch.randn(1, heads, 19, 8, generator=gen).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    sinks = None if products else torch.randn(4, generator=gen)

    def loss(query, key, value):
        return attention.attend(nn.Module(), query, key, value, None, s_aux=sinks)[0].square().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_others_are_left_alone():
    assert not attention.use(build("qwen3_moe"))
    flexible = _model("gpt_oss")
    flexible.set_attn_implementation("flex_attention")
    assert not attention.use(flexible)


def _exact(query, key, value, mask, scale):
    """In float64, step by step; of a query without a key nothing."""
    query, key, value = (t.double() for t in (query, key, value))
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    added = mask.double() if mask.dtype is not torch.bool else torch.zeros(mask.shape).double()
    if mask.dtype is torch.bool:
        added = added.masked_fill(~mask, torch.finfo(torch.float64).min)
    shares = (query @ key.transpose(2, 3) * scale + added).softmax(-1)
    seen = (added > torch.finfo(torch.bfloat16).min / 2).any(-1, keepdim=True)
    return ((shares * seen) @ value).transpose(1, 2)


def _masks(queries: int, keys: int) -> dict[str, torch.Tensor]:
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    padded = causal.expand(2, 1, -1, -1).clone()
    padded[0, :, :, :4] = False  # so that some queries see nothing
    padded[1, :, :, 30:] = False
    window = causal.triu(keys - queries - 7)
    of_heads = torch.rand(1, 6, queries, keys, generator=torch.Generator().manual_seed(6)) < 0.5
    added = torch.zeros(padded.shape).masked_fill(~padded, torch.finfo(torch.bfloat16).min)
    return {
        "causal": causal[None, None],
        "none": causal[None, None],
        "padded": padded,
        "window": window[None, None],
        "of heads": of_heads,
        "all": torch.ones_like(causal)[None, None],
        "added": added.bfloat16(),
    }


@pytest.mark.parametrize("at_once", [64, 7], ids=["", "blocks"])
@pytest.mark.parametrize(
    ("own", "key_heads"), [(16, 3), (12, 6), (24, 1)], ids=["", "a key head each", "wide values"]
)
@pytest.mark.parametrize("kind", _masks(2, 2))
def test_by_products(kind, own, key_heads, at_once, monkeypatch):
    """Values and gradients, of strided arguments."""
    monkeypatch.setattr(attention, "BY_PRODUCTS", True)
    monkeypatch.setattr(attention, "ROWS", at_once)
    gen = torch.Generator().manual_seed(7)
    queries, keys, scale = 33, 40, 0.4
    several = [
        torch.randn(2, n, heads, width, generator=gen).bfloat16().transpose(1, 2).requires_grad_()
        for n, heads, width in ((queries, 6, 16), (keys, key_heads, 16), (keys, key_heads, own))
    ]
    mask = _masks(queries, keys)[kind]
    y, _ = attention.attend(nn.Module(), *several, None if kind == "none" else mask, scaling=scale)
    assert y.grad_fn is not None and "ByProducts" in str(y.grad_fn.next_functions[0][0])
    dy = torch.randn(y.shape, generator=gen).bfloat16()
    with torch.autocast("cpu", torch.float16):  # which changes nothing
        found = (y, *torch.autograd.grad(y, several, dy))
    exact = _exact(*several, mask, scale)
    expected = (exact, *torch.autograd.grad(exact, several, dy.double()))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other.double()).norm() <= 6e-3 * other.double().norm()


_MLA = {
    "num_key_value_heads": 4, "first_k_dense_replace": 1, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "kv_lora_rank": 8, "q_lora_rank": 8, "n_group": 1, "topk_group": 1,
    "n_routed_experts": 4,
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", attention.PLAIN)
def test_products_of_a_model(kind, batch, monkeypatch):
    """Where transformers takes torch's kernel; not in another dtype, nor where somebody has chosen."""
    monkeypatch.setattr(attention, "BY_PRODUCTS", True)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **_COMMON | (_MLA if "deepseek" in kind else {}))
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").bfloat16().eval()
    ids = torch.randint(1, 64, (batch, 30), generator=torch.Generator().manual_seed(3))
    exact = copy.deepcopy(model).double()
    assert not attention.use(exact)
    with torch.no_grad():
        wide, theirs = exact(input_ids=ids).logits, model(input_ids=ids).logits.double()
        assert attention.use(model)
        ours = model(input_ids=ids).logits.double()
    assert model.config._attn_implementation == attention.NAME and not torch.equal(ours, theirs)
    assert (ours - wide).norm() <= 1.5 * (theirs - wide).norm() + 2e-3 * wide.norm()
    model.set_attn_implementation("eager")
    assert not attention.use(model)


def test_what_it_does_not_know_is_refused():
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    for name in attention.NOT_HERE:
        with pytest.raises(ValueError, match=f"does not know {name}; use another"):
            attention.attend(nn.Module(), query, key, value, None, **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match="query and key must have the same B, got 1 and 2"):
        attention.attend(nn.Module(), query, key.repeat(2, 1, 1, 1), value.repeat(2, 1, 1, 1), None)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("queries", [1, 20])
def test_shapes_at_the_border(queries, batch, monkeypatch):
    """No sequence, one query behind a cache; values wider than keys."""
    monkeypatch.setattr(attention, "BY_PRODUCTS", True)
    query, key, value = (torch.randn(batch, 2, n, w).bfloat16() for n, w in ((queries, 8), (25, 8), (25, 12)))
    y, _ = attention.attend(nn.Module(), query, key, value, None)
    assert y.shape == (batch, queries, 2, 12)
    seen = torch.ones(queries, 25, dtype=torch.bool).tril(25 - queries)[None, None]
    exact = _exact(query, key, value, seen, 8**-0.5)
    assert (y.double() - exact).norm() <= 6e-3 * exact.norm()


def test_not_causal():
    gen = torch.Generator().manual_seed(8)
    query, key, value = (torch.randn(2, 2, 5, 8, generator=gen) for _ in range(3))
    module = nn.Module()
    module.is_causal = False
    one, _ = attention.attend(module, query, key, value, None)
    other, _ = attention.attend(module, query, key, value, torch.ones(1, 1, 5, 5, dtype=torch.bool))
    torch.testing.assert_close(one, other)
