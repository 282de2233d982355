"""Shared experts of a block, which the accelerator computes while the host is at its routed ones."""

import copy
import itertools
import pickle
import threading

import model_tiny
import moelora
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from beside_layers import BF16, LATE, same
from model_tiny import one_thread  # noqa: F401
from moelora.placement.beside import link, settling, shared
from test_beside_models import put, served_there, step  # noqa: F401
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
)
from transformers.models.aria.modeling_aria import AriaTextMoELayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.hy_v3.modeling_hy_v3 import HYV3MoE
from transformers.models.inkling.configuration_inkling import InklingTextConfig
from transformers.models.inkling.modeling_inkling import InklingMoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

SIZES = {
    "hidden_size": 24, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 20,
    "intermediate_size": 20,
    "num_experts": 5, "n_routed_experts": 5, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
}  # fmt: skip
FIRST = [(Qwen2MoeSparseMoeBlock, Qwen2MoeConfig), (Qwen3_5MoeSparseMoeBlock, Qwen3_5MoeTextConfig)]
LAST = [(DeepseekV3MoE, DeepseekV3Config), (Glm4MoeMoE, Glm4MoeConfig)]


def built(block, config, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layer = block(config(**SIZES))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.to(dtype)


def beside(block, config, way="compute", dtype=torch.float32) -> nn.Module:
    layer = put(built(block, config, dtype))
    moelora.enable(layer)
    moelora.place(layer, way=way)
    return layer


def inputs(dtype=torch.float32, tokens=9) -> torch.Tensor:
    x = torch.randn(2, tokens, 24, generator=torch.Generator().manual_seed(tokens))
    return x.to(LATE, dtype).requires_grad_()


def theirs(layer: nn.Module) -> nn.Module:
    return next(m for name, m in layer.named_children() if name in shared.NAMES)


@pytest.mark.parametrize(("block", "config"), FIRST + LAST)
def test_order(block, config, monkeypatch):
    """Launched when the rows are on their way and before the host waits for them, in both directions."""
    layer = beside(block, config)
    seen = []
    inner = theirs(layer).down_proj
    inner.register_forward_hook(lambda *_: seen.append("shared"))
    inner.register_full_backward_hook(lambda *_: seen.append("shared backward"))
    wait, fetch = link.wait, link.Link.fetch
    monkeypatch.setattr(link, "wait", lambda event: (seen.append("wait"), wait(event)))
    monkeypatch.setattr(link.Link, "fetch", lambda *args: (seen.append("leave"), fetch(*args))[1])
    x = inputs()
    layer(x).sum().backward()
    forward = ["leave", "shared", "wait"] if (block, config) in LAST else ["shared", "leave", "wait"]
    found = [one for one, _ in itertools.groupby(seen)]
    assert found == [*forward, "leave", "shared backward", "wait"]


def gradients(layer: nn.Module, forward=None, times: int = 1) -> list[torch.Tensor]:
    layer.zero_grad()
    several = [inputs(layer.gate.weight.dtype, 9 + i) for i in range(times)]
    outs = [(forward or layer)(x) for x in several]
    for out in outs:
        out.float().square().sum().backward()
    return [
        t.detach().cpu() for t in (*outs, *(x.grad for x in several), *(p.grad for p in layer.parameters()))
    ]


@pytest.mark.parametrize(("block", "config"), FIRST + LAST)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_values(block, config, dtype, served_there):  # noqa: F811
    """Everything is as if the block had called them itself: to the bit, several at once, checkpointed.

    Where they are called first, autograd adds up the input's gradient in another order.
    """
    there = built(block, config, dtype).to(LATE)
    moelora.enable(there)
    expected, three = gradients(there), gradients(there, times=3)

    def alike(found: list[torch.Tensor], wanted: list[torch.Tensor], times: int = 1) -> bool:
        inputs = range(times, 2 * times) if (block, config) in FIRST else ()
        rounding = 2 * torch.finfo(dtype).eps
        return all(
            model_tiny.difference(f, w) < rounding if number in inputs else torch.equal(f, w)
            for number, (f, w) in enumerate(zip(found, wanted, strict=True))
        )

    for way in ("compute", "bring"):
        layer = beside(block, config, way, dtype)
        assert alike(gradients(layer), expected)
        assert alike(gradients(layer, times=3), three, 3)
        for reentrant in (True, False):
            again = gradients(layer, lambda x, r=reentrant, m=layer: checkpoint(m, x, use_reentrant=r))
            assert alike(again, expected)
        with torch.no_grad():
            assert torch.equal(layer(inputs(dtype)).cpu(), expected[0])


@pytest.mark.parametrize(("block", "config"), [FIRST[0], LAST[0]])
def test_compiled(block, config):
    """In a graph they run where the block has them."""
    layer = beside(block, config)
    compiled = torch.compile(layer, backend="eager")
    expected = gradients(layer)
    for found, one in zip(gradients(layer, lambda x: compiled(x)), expected, strict=True):
        assert model_tiny.difference(found, one) < 1e-6


def count(layer: nn.Module) -> list[str]:
    seen = []
    theirs(layer).down_proj.register_forward_hook(lambda *_: seen.append(threading.current_thread().name))
    return seen


@pytest.mark.parametrize(("block", "config"), LAST)
def test_once(block, config):
    """They run once a call, in the caller's thread, and nothing is kept of it."""
    layer = beside(block, config)
    own = settling.beside(layer.experts).shared
    seen = count(layer)
    layer(inputs()).sum().backward()
    assert len(seen) == 1 and not vars(own._now)
    theirs(layer).register_forward_pre_hook(lambda *_: None)  # it comes when the block calls them
    layer(inputs())
    assert len(seen) == 2 and not vars(own._now)
    twin = copy.copy(own)
    assert not vars(twin._now)


def test_accelerate_takes_its_hooks_off():
    """And with them, perhaps, what was put above them."""
    layer = beside(*LAST[0])
    expected = layer(inputs()).detach().cpu()
    seen, module = count(layer), theirs(layer)
    own = module.forward
    add_hook_to_module(module, ModelHook())
    assert torch.equal(layer(inputs()).detach().cpu(), expected) and len(seen) == 1
    module._old_forward = own.plain
    remove_hook_from_module(module)
    assert torch.equal(layer(inputs()).detach().cpu(), expected) and len(seen) == 2
    assert not vars(own._now)


def test_errors():
    """One of the host's, and one of theirs: the next call is as ever."""
    layer = beside(*LAST[0])
    own = settling.beside(layer.experts).shared
    expected = layer(inputs()).detach().cpu()
    for module in (layer.experts, theirs(layer).act_fn):
        broken = {"on": True}

        def fail(*_, broken=broken):
            if broken["on"]:
                raise ZeroDivisionError

        handle = module.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            layer(inputs())
        broken["on"] = False
        assert torch.equal(layer(inputs()).detach().cpu(), expected) and not vars(own._now)
        handle.remove()


def test_threads():
    layer = beside(*LAST[0])
    expected = [layer(inputs(tokens=t)).detach().cpu() for t in range(3, 7)]
    found = [None] * 4

    def run(number):
        for _ in range(10):
            found[number] = layer(inputs(tokens=number + 3)).detach().cpu()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_disable():
    layer = beside(*LAST[0])
    module = theirs(layer)
    moelora.enable(layer)  # again: no second one
    assert isinstance(module.forward, shared.Shared) and not isinstance(module.forward.plain, shared.Shared)
    moelora.disable(layer)
    assert "forward" not in vars(module) and not layer._forward_pre_hooks


@pytest.mark.parametrize(
    ("block", "whose"),
    [(HYV3MoE, "experts"), (DeepseekV3MoE, "block"), (InklingMoE, None), (AriaTextMoELayer, None)],
)
def test_which_blocks(block, whose):
    """Read from the source: whose first argument they are given, and nothing else."""
    forward = shared._forward(block)
    routed, own = (shared._call(forward, name) for name in ("experts", "shared_experts"))
    assert shared._whose(forward, routed, own) == whose


def test_blocks_that_show_nothing(monkeypatch):
    assert shared._forward(type("NoSource", (nn.Module,), {"forward": len})) is None
    assert shared._call(shared._forward(nn.Linear), "experts") is None
    margin = "    def forward(self, x):\n# where lines begin before the function\n        return x\n"
    monkeypatch.setattr(shared.inspect, "getsource", lambda _: margin)
    assert shared._forward(nn.Linear) is None


def test_inkling():
    """Its shared experts take gates, too: they run when the block calls them."""
    layer = beside(InklingMoE, InklingTextConfig)
    assert settling.beside(layer.experts).shared is None and layer(inputs()).isfinite().all()


def test_pickled():
    layer = beside(*LAST[0])
    expected = layer(inputs()).detach().cpu()
    twin = pickle.loads(pickle.dumps(layer.cpu()))
    assert model_tiny.difference(twin(inputs().cpu().detach()).detach(), expected) < 1e-5


def test_another_module_in_their_place():
    """As PEFT's modules_to_save puts one: it runs when the block calls it, and `enable` finds it."""
    layer = beside(*LAST[0])
    own, before = settling.beside(layer.experts).shared, theirs(layer)
    layer.shared_experts = copy.deepcopy(before.cpu()).to(LATE)
    seen = count(layer)
    layer(inputs())
    assert len(seen) == 1 and not vars(own._now)
    moelora.enable(layer)
    found = settling.beside(layer.experts).shared
    assert found.module is layer.shared_experts and "forward" not in vars(before)
    layer(inputs()).sum().backward()
    assert len(seen) == 2 and not vars(found._now)


def test_routed_experts_alone():
    """Nothing is launched for a call that no block has made."""
    layer = beside(*LAST[0])
    own, seen = settling.beside(layer.experts).shared, count(layer)
    gates, ids = torch.rand(18, 5, generator=torch.Generator().manual_seed(0)).topk(2)
    layer.experts(inputs().flatten(0, 1), ids.to(LATE), gates.to(LATE))
    assert not seen and not vars(own._now)


def test_two_backwards_at_once():
    """Of one graph, by two threads: each has its own gradient of the sum."""
    layer, x = beside(*LAST[0]), inputs()
    out = layer(x)
    expected = torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)[0].cpu()
    wrong = []

    def run(factor):
        for _ in range(40):
            seed = torch.full_like(out, factor)
            found = torch.autograd.grad(out, x, seed, retain_graph=True)[0].cpu()
            if model_tiny.difference(found, factor * expected) > 1e-5:
                wrong.append(factor)

    threads = [threading.Thread(target=run, args=(factor,)) for factor in (1.0, -3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model(reentrant, served_there):  # noqa: F811
    """Whole, with LoRA on the shared experts' layers too."""
    config = DeepseekV3Config(
        **SIZES | {"moe_intermediate_size": 20}, num_hidden_layers=2, first_k_dense_replace=1, vocab_size=64,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=4, n_shared_experts=1,
    )  # fmt: skip
    losses = []
    for place in (lambda m: m.to(LATE), put):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config)
        model = place(model_tiny.adapt(base, targets=["down_proj", "o_proj"]))
        moelora.enable(model)
        if place is put:
            moelora.place(model, way="compute")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        losses.append(step(model))
    assert same([losses[1]], [losses[0]])
