"""LoRA of hot experts: parameters of their own beside these experts, and one factor in files and for PEFT."""

import copy
import logging

import model_tiny
import moelora
import pytest
import torch
from beside_layers import BF16, LATE
from hypothesis import given
from hypothesis import strategies as st
from model_tiny import one_thread  # noqa: F401
from moelora import adapters, errors, hot_factors
from peft import PeftModel
from safetensors.torch import load_file
from test_beside_models import put, step
from torch.nn.utils import parametrize

HOT = {"model.layers.0.mlp.experts": [1, 4], "model.layers.1.mlp.experts": [0, 2, 3]}


def built(dtype=torch.float32, hot=HOT, adapt=True) -> torch.nn.Module:
    model = model_tiny.build("qwen3_moe", dtype)
    model = put(model_tiny.adapt(model) if adapt else model)
    moelora.enable(model)
    if hot is not None:
        moelora.place(model, hot=hot, way="compute")
    return model


def parts(model) -> dict[str, hot_factors.HotPart]:
    return {n: m for n, m in model.named_modules() if isinstance(m, hot_factors.HotPart)}


def whole(model) -> dict[str, torch.Tensor]:
    return {n: t.detach().cpu() for n, t in model.state_dict().items() if "lora_" in n}


def stale(model) -> None:
    """Nobody may read what the host has of hot experts."""
    for name, part in parts(model).items():
        factor = model.get_submodule(name.removesuffix(".parametrizations.weight.0")).parametrizations.weight
        with torch.no_grad():
            hot_factors.by_expert(factor.original, part.dim, part.rank)[list(part.ids)] = torch.nan


def near(a: dict, b: dict, tolerance: float) -> bool:
    return a.keys() == b.keys() and all(model_tiny.difference(a[n], b[n]) < tolerance for n in a)


@pytest.mark.parametrize("way", ["compute", "bring"])
def test_trained_where_they_are(way):
    """State and all of them; after three steps the factors are those of a model with one place."""
    plain, model = built(hot=None), built()
    assert len(parts(model)) == 2 * 2 * 2
    stale(model)
    moelora.place(model, way=way)
    for one in (plain, model):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], 1e-2, eps=1e-3)
        losses = [step(one)[0]]
        for _ in range(3):
            optimizer.step()
            losses.append(step(one)[0])
        assert losses[-1] < losses[0] and not moelora.report(one).untrained
    places = {
        p: t.device.type for p, state in optimizer.state.items() for n, t in state.items() if n != "step"
    }
    hot = {part.part for part in parts(model).values()}
    assert {places[p] for p in hot} == {LATE.type} and {places[p] for p in places if p not in hot} == {"cpu"}
    assert near(whole(model), whole(plain), 1e-5)


def test_norms_see_a_gradient_once():
    plain, model = built(hot=None), built()
    step(plain), step(model)
    norms = [torch.nn.utils.clip_grad_norm_(one.parameters(), 1e-3).cpu() for one in (plain, model)]
    assert model_tiny.difference(*norms) < 1e-5


def test_files_are_those_of_one_place(tmp_path):
    plain, model = built(BF16, None), built(BF16)
    stale(model)
    for one, name in ((plain, "plain"), (model, "hot")):
        one.save_pretrained(tmp_path / name)
    names = [p.name for p in (tmp_path / "plain").iterdir()]
    assert all((tmp_path / "plain" / n).read_bytes() == (tmp_path / "hot" / n).read_bytes() for n in names)
    assert plain.state_dict().keys() == model.state_dict().keys()
    saved = load_file(tmp_path / "hot" / "adapter_model.safetensors")
    assert saved and all(t.isfinite().all() for t in saved.values())
    expected = step(model)[0]
    for part in parts(model).values():
        part.part.data.zero_()
    assert step(model)[0] != expected
    model.load_adapter(tmp_path / "hot", "default", is_trainable=True)
    assert torch.equal(step(model)[0], expected) and len(parts(model)) == 8
    model.load_state_dict(plain.state_dict(), strict=True)
    other = put(PeftModel.from_pretrained(model_tiny.build("qwen3_moe", BF16), tmp_path / "hot"))
    moelora.enable(other)
    moelora.place(other, hot={name: [0] for name in HOT}, way="compute")
    assert all(torch.equal(t, whole(model)[n]) for n, t in whole(other).items())
    bad = {n: t[1:] if "experts.lora_A" in n else t for n, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_A"):
        model.load_state_dict(bad)


def test_adapters_that_come_later():
    """Not in use where they are not split, and told; `enable` sees to it."""
    model = model_tiny.build("qwen3_moe", torch.float32)
    put(model)
    moelora.enable(model)
    moelora.place(model, hot=HOT, way="compute")
    with torch.no_grad():
        model(input_ids=model_tiny.tokens().to(LATE))
    assert "not in use" not in str(moelora.report(model))  # without LoRA there is nothing to lack
    model = put(model_tiny.adapt(model))
    moelora.enable(model)
    assert len(parts(model)) == 8
    expected = step(model)
    model.add_adapter("second", model.peft_config["default"])
    put(model)
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        both = model(input_ids=model_tiny.tokens().to(LATE)).logits.cpu()
    assert "2 of them there, not in use" in str(moelora.report(model))
    moelora.enable(model)
    assert len(parts(model)) == 16
    with torch.no_grad():
        found = model(input_ids=model_tiny.tokens().to(LATE)).logits.cpu()
    assert model_tiny.difference(found, both) < 1e-5
    assert "not in use" not in str(moelora.report(model))
    model.base_model.set_adapter("default")
    assert torch.equal(step(model)[0], expected[0])


@pytest.mark.parametrize("undo", ["disable", "hot=0", "other experts"])
def test_one_parameter_again(undo):
    model = built(hot=None)
    before = dict(model.named_parameters())
    moelora.place(model, hot=HOT, way="compute")
    stale(model)
    for part in parts(model).values():
        part.part.data += 1
    trained = whole(model)
    if undo == "other experts":
        moelora.place(model, hot={name: [0, 1] for name in HOT})
        stale(model)
        assert {part.ids for part in parts(model).values()} == {(0, 1)}
    else:
        moelora.disable(model) if undo == "disable" else moelora.place(model, hot=0)
        after = dict(model.named_parameters())
        assert after.keys() == before.keys() and all(after[n] is p for n, p in before.items())
    assert trained.keys() == whole(model).keys()
    assert all(torch.equal(t, trained[n]) for n, t in whole(model).items())


def test_merged():
    model = built()
    stale(model)
    tokens = model_tiny.tokens().to(LATE)
    with torch.no_grad():
        for part in parts(model).values():
            part.part.mul_(1.5)
        adapted = model(input_ids=tokens).logits.cpu()
        merged = model.merge_and_unload()(input_ids=tokens).logits.cpu()
    assert model_tiny.difference(merged, adapted) < 1e-5


def test_tokens_on_the_host():
    model = built()
    stale(model)
    gen = torch.Generator().manual_seed(0)
    gates, ids = torch.rand(9, 5, generator=gen).topk(2)
    x = torch.randn(9, 24, generator=gen)
    for outermost, *_ in adapters.wrappers(model).values():
        there = outermost(*(t.to(LATE) for t in (x, ids, gates))).detach().cpu()
        assert model_tiny.difference(outermost(x, ids, gates).detach(), there) < 1e-5


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 5), st.integers(0, 5), st.data())
def test_a_factor(experts, rank, rows, columns, data):
    """In one piece for whoever reads, writes, saves, loads, copies or differentiates it."""
    ids = data.draw(st.lists(st.integers(0, experts - 1), min_size=1, unique=True).map(sorted))
    a = torch.nn.Linear(columns, rank * experts, bias=False)
    b = torch.nn.Linear(rank * experts, rows, bias=False)
    expected = [layer.weight.detach().clone() for layer in (a, b)]
    hot_factors.split(a, b, rank, ids, torch.device("cpu"))
    for layer, whole, dim in zip((a, b), expected, (0, 1), strict=True):
        original, part = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
        assert part.ids == tuple(ids)
        assert torch.equal(part.part, hot_factors.of_experts(whole, dim, rank, ids))
        hot_factors.by_expert(original.data, dim, rank)[ids] = torch.nan
        twin = copy.deepcopy(layer)
        for one in (layer, twin):
            assert torch.equal(one.weight, whole)
            assert list(one.state_dict()) == ["weight"] and torch.equal(one.state_dict()["weight"], whole)
        twin.load_state_dict({"weight": whole + 1})
        assert torch.equal(twin.weight, whole + 1) and torch.equal(layer.weight, whole)
        twin.weight = whole + 2
        assert torch.equal(twin.weight, whole + 2)
        seed = torch.randn_like(whole)
        layer.weight.backward(seed)
        assert torch.equal(part.part.grad, hot_factors.of_experts(seed, dim, rank, ids))
        assert not hot_factors.by_expert(original.grad, dim, rank)[ids].any()
        hot_factors.join(layer)
        assert layer.weight is original and torch.equal(original, whole)


class Half(torch.nn.Module):
    def forward(self, factor):
        return factor / 2


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
@pytest.mark.parametrize("late", [False, True])
def test_parametrized_by_somebody_else(side, late):
    """Before `place`, or behind it."""
    plain, model = built(hot=None), built(hot=HOT if late else None)
    for one in (plain, model):
        (wrapper, *_) = (m for m in one.modules() if type(m).__name__ == "ParamWrapper")
        parametrize.register_parametrization(getattr(wrapper, side)["default"], "weight", Half())
    if late:
        stale(model)
    else:
        moelora.place(model, hot=HOT, way="compute")
    assert model_tiny.difference(step(model)[0], step(plain)[0]) < 1e-5
    assert "not in use" in str(moelora.report(model))


@pytest.mark.parametrize("clear", ["optimizer", "model", "zeros"])
def test_an_optimizer_that_came_before(clear, caplog, monkeypatch):
    monkeypatch.setattr(errors, "_warned", set())
    model = built(hot=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for hot, warned in ((None, False), (HOT, True)):
        if hot:
            moelora.place(model, hot=HOT, way="compute")
        with caplog.at_level(logging.WARNING, "moelora"):
            for _ in range(4):
                step(model)
                optimizer.step()
                if clear == "model":
                    model.zero_grad()
                else:
                    optimizer.zero_grad(set_to_none=clear == "optimizer")
        assert ("after moelora.place(hot=...)" in caplog.text) == warned


def test_moved_and_assigned():
    """What is no longer on the accelerator is not used there; a state dict puts it there again."""
    model = built()
    expected = step(model)[0]
    state = {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n}
    for part in parts(model).values():
        part.to("cpu")
    assert model_tiny.difference(step(model)[0], expected) < 1e-5
    assert "not in use" in str(moelora.report(model))
    moelora.enable(model)
    assert torch.equal(step(model)[0], expected) and "not in use" not in str(moelora.report(model))
    model.load_state_dict(state, strict=False, assign=True)
    assert {part.part.device.type for part in parts(model).values()} == {LATE.type}
    assert torch.equal(step(model)[0], expected)


@pytest.mark.parametrize("way", ["compute", "bring"])
def test_the_others_frozen(way):
    model = built()
    moelora.place(model, way=way)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("0.part"))
    tokens = model_tiny.tokens().to(LATE)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(part.part.grad.abs().max() > 0 for part in parts(model).values())


def test_between_two_backwards():
    """Gradients of a step that is not complete go with what they are of, there and back."""
    plain, model = built(hot=None), built(hot=None)
    for again in (HOT, 0):
        norms = []
        for one in (plain, model):
            step(one)
            if one is model:
                moelora.place(one, hot=again, way="compute")
            tokens = model_tiny.tokens().to(LATE)
            one(input_ids=tokens, labels=tokens).loss.backward()
            norms.append(
                torch.nn.utils.get_total_norm([p.grad for p in one.parameters() if p.requires_grad]).cpu()
            )
        assert model_tiny.difference(*norms) < 1e-5


def test_enabled_in_other_states():
    """An adapter without values yet, a `place` within inference mode, linear layers that are served too."""
    model = built(hot=None)
    moelora.enable(model, linears=True)
    with torch.inference_mode():
        moelora.place(model, hot=HOT, way="compute")
    step(model)
    model.add_adapter("second", model.peft_config["default"], low_cpu_mem_usage=True)
    moelora.enable(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    moelora.enable(model, linears=True)
    moelora.disable(model)
    kinds = {type(m).__name__ for n, m in model.named_modules() if "lora_A." in n}
    assert kinds == {"Linear"}


def test_in_a_graph():
    """Tokens on the host need no break."""
    model = built()
    gen = torch.Generator().manual_seed(0)
    gates, ids = torch.rand(9, 5, generator=gen).topk(2)
    x = torch.randn(9, 24, generator=gen)
    outermost = next(iter(adapters.wrappers(model).values()))[0]
    compiled = torch.compile(outermost, backend="eager", fullgraph=True)
    assert model_tiny.difference(compiled(x, ids, gates).detach(), outermost(x, ids, gates).detach()) < 1e-6
