"""Every state that PEFT can bring an adapter into: an enabled model does what PEFT does, and says how."""

import json

import moelora
import pytest
import torch
from model_tiny import (
    adapt,
    build,
    difference,
    fill,
    gradients,
    logits,
    one_thread,  # noqa: F401  (autouse)
    tokens,
    wrappers,
)
from moelora import errors
from moelora.adapters import together
from moelora.experts import Factors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def _second(**keywords) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=BOTH, **keywords)


def _two_adapters(**keywords) -> PeftModel:
    model = adapt(build("qwen3_moe"), **keywords)
    model.add_adapter("second", _second())
    fill(model, seed=4)
    return model


# ---- states: what brings the model there, and the path that the report then names for what is active

_STATES = {
    "as it is": (lambda m: m, "operators"),
    "switched": (lambda m: m.set_adapter("second"), "operators"),
    "deleted": (lambda m: (m.set_adapter("second"), m.delete_adapter("default")), "operators"),
    "deleted and added": (
        lambda m: (m.set_adapter("second"), m.delete_adapter("default"), _again(m)),
        "operators",
    ),
    "unmerged": (lambda m: (m.merge_adapter(), m.unmerge_adapter()), "operators"),
    "scaled": (lambda m: [w.set_scale("default", 3.0) for w in wrappers(m)], "operators"),
    "two active": (lambda m: _both(m), "operators"),
    "two active, of one scaling": (lambda m: (_both(m), _scale_alike(m)), "operators"),
    "two active, then one": (lambda m: (_both(m), logits(m), m.set_adapter("second")), "operators"),
    "another dtype": (lambda m: [w.to(torch.bfloat16) for w in _factor_modules(m)], "PEFT"),
    "eager chosen": (lambda m: m.get_base_model().set_experts_implementation("eager"), "PEFT"),
}


def _again(model: PeftModel) -> None:
    model.add_adapter("default", _second(use_rslora=True))
    model.set_adapter("default")
    fill(model, seed=6)


def _factor_modules(model: PeftModel, adapter: str = "default") -> list[nn.Module]:
    return [factors[adapter] for w in wrappers(model) for factors in (w.lora_A, w.lora_B)]


def _both(model: PeftModel) -> None:
    model.base_model.set_adapter(["default", "second"])


def _bf16_second(model: PeftModel) -> None:
    for factor in _factor_modules(model, "second"):
        factor.to(torch.bfloat16)


def _scale_alike(model: PeftModel) -> None:
    for wrapper in wrappers(model):
        wrapper.scaling.update(default=1.5, second=1.5)


@pytest.mark.parametrize("state", _STATES)
def test_state_trains_as_in_peft(state):
    change, path = _STATES[state]
    plain, enabled = _two_adapters(), _two_adapters()
    moelora.enable(enabled)
    for model in (plain, enabled):
        torch.manual_seed(7)
        change(model)
    (expected_logits, expected), (found_logits, found) = gradients(plain), gradients(enabled)
    assert difference(found_logits, expected_logits) < 1e-5
    assert found.keys() == expected.keys() and len(found) >= 8
    for name, gradient in expected.items():
        limit = 1e-2 if gradient.dtype is torch.bfloat16 else 1e-5  # of factors in 16 bits: one rounding
        assert difference(found[name], gradient) < limit, name
    active = [a for layer in moelora.report(enabled).layers for a in layer.adapters if a.active]
    assert active and {adapter.path for adapter in active} == {path}
    assert all(adapter.gradient for adapter in active)


@pytest.mark.parametrize("state", ["disabled", "merged", "unloaded", "another checkpoint"])
def test_state_infers_as_in_peft(state, tmp_path):
    def run(enabled):
        model = _two_adapters()
        if enabled:
            moelora.enable(model)
        if state == "disabled":
            with model.disable_adapter():
                assert not enabled or not moelora.report(model).trainable
                return logits(model)
        if state == "merged":
            model.merge_adapter()
            assert not enabled or "merged into the weights" in str(moelora.report(model))
        elif state == "unloaded":
            return logits(model.unload())
        elif state == "another checkpoint":
            model.save_pretrained(tmp_path)
            fill(model, seed=9)
            model.load_adapter(tmp_path / "second", "third")
            model.set_adapter("third")
        return logits(model)

    assert difference(run(True), run(False)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"rank_pattern": {".*gate_up_proj": 2}, "alpha_pattern": {".*down_proj": 1}}],
)
def test_scaling_and_patterns(options):
    plain, enabled = (adapt(build("gpt_oss"), **options) for _ in range(2))
    ranks = {a.rank for layer in moelora.enable(enabled).layers for a in layer.adapters}
    assert ranks == ({2, 3} if "rank_pattern" in options else {3})
    scalings = {wrapper.scaling["default"] for wrapper in wrappers(enabled)}
    assert len(scalings) == (2 if "rank_pattern" in options else 1)
    expected, found = gradients(plain)[1], gradients(enabled)[1]
    assert all(difference(found[name], gradient) < 1e-5 for name, gradient in expected.items())


def test_lora_beside_the_experts():
    """On attention, on the router's parameter, and a module that is trained whole."""
    options = {"targets": ["q_proj", "o_proj"], "modules_to_save": ["lm_head"], "which": "all"}

    def run(enabled):
        torch.manual_seed(3)
        model = build("qwen3_moe")
        config = LoraConfig(
            r=3, target_modules=options["targets"], modules_to_save=options["modules_to_save"],
            target_parameters=[*BOTH, "mlp.gate.weight"],
        )  # fmt: skip
        model = get_peft_model(model, config)
        fill(model)
        if enabled:
            report = moelora.enable(model)
            assert report.trainable == 4 and {a.path for layer in report.layers for a in layer.adapters} == {
                "operators"
            }
        return gradients(model)[1]

    expected, found = run(False), run(True)
    for part in ("q_proj.lora_A", "mlp.gate.lora_B", "lm_head.modules_to_save", "experts.base_layer.lora_A"):
        assert any(part in name for name in found), part
    assert all(difference(found[name], gradient) < 1e-5 for name, gradient in expected.items())


def test_experts_trained_whole():
    """modules_to_save on the experts: their own weights have gradients, on the operators."""

    def run(enabled):
        model = build("qwen3_moe")
        if enabled:
            moelora.enable(model)  # before PEFT copies the experts
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"])
        torch.manual_seed(1)
        return gradients(get_peft_model(model, config))[1]

    expected, found = run(False), run(True)
    assert any("experts.modules_to_save.default.down_proj" in name for name in found)
    assert all(difference(found[name], gradient) < 1e-5 for name, gradient in expected.items())


# ---- what the user is told


def test_fallback_is_reported_and_warned_of_once(caplog, monkeypatch):
    monkeypatch.setattr(errors, "_warned", set())
    model = _two_adapters()
    moelora.enable(model)
    _both(model)
    _bf16_second(model)
    reason = "of second, its factors are torch.bfloat16 beside torch.float32 weights"
    assert f"by PEFT: {reason}" in str(moelora.report(model))
    for _ in range(2):
        logits(model)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all(reason in message for message in messages)
    assert {"gate_up_proj", "down_proj"} == {
        word for m in messages for word in m.split() if word.endswith("_proj")
    }


@pytest.mark.parametrize("scalings", [(0.7, 0.7, 0.7), (0.7, 2.0, -1.0)])
def test_adapters_side_by_side(scalings):
    """As the sum of what each adds, exactly but for one rounding of half-precision factors' products."""
    generator = torch.Generator().manual_seed(0)
    several = []
    for rank, scaling in zip((1, 3, 2), scalings, strict=True):
        a, b = (torch.randn(s, generator=generator).to(torch.bfloat16) for s in ((4, rank, 8), (4, 6, rank)))
        several.append(Factors(a.requires_grad_(), b.requires_grad_(), scaling))
    one = together(several)
    assert one.a.shape == (4, 6, 8) and one.b.shape == (4, 6, 6)
    assert one.a.dtype == (torch.bfloat16 if len(set(scalings)) == 1 else torch.float32)
    found = one.scaling * one.b.double() @ one.a.double()
    expected = sum(f.scaling * f.b.double() @ f.a.double() for f in several)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    every = [t for f in several for t in (f.a, f.b)]
    pairs = zip(*(torch.autograd.grad(y.square().sum(), every) for y in (found, expected)), strict=True)
    assert all(difference(got, want) < 1e-6 for got, want in pairs)


def test_adapter_that_came_late_trains_and_is_told_of(caplog, monkeypatch):
    monkeypatch.setattr(errors, "_warned", set())
    model = build("qwen3_moe")
    moelora.enable(model)
    model = adapt(model)
    _, late = gradients(model)
    report = moelora.report(model)
    assert report.trainable == 4 and {a.path for layer in report.layers for a in layer.adapters} == {"PEFT"}
    assert caplog.text.count("call moelora.enable(model) again") == 2  # each parameter
    assert {a.path for layer in moelora.enable(model).layers for a in layer.adapters} == {"operators"}
    _, found = gradients(model)
    assert all(difference(found[name], gradient) < 1e-5 for name, gradient in late.items())


def _seen(model) -> list[bool]:
    return [a.gradient for layer in moelora.report(model).layers for a in layer.adapters]


def test_gradients_are_remembered_after_they_are_cleared():
    model = adapt(build("qwen3_moe"))
    assert len(moelora.enable(model).untrained) == 4
    gradients(model)
    model.zero_grad(set_to_none=True)
    assert _seen(model) == [True] * 4 and not moelora.report(model).untrained
    assert "gradients have reached 4 so far" in str(moelora.report(model))
    assert json.loads(moelora.report(model).to_json())["layers"][0]["adapters"][0]["gradient"] is True
    moelora.enable(model)
    assert _seen(model) == [True] * 4
    moelora.disable(model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_run_that_trains_nothing_shows():
    """Reentrant checkpointing of inputs that need no gradient: autograd drops all that is inside."""
    model = adapt(build("qwen3_moe"))
    moelora.enable(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.get_base_model().disable_input_require_grads()
    model.get_base_model().lm_head.weight.requires_grad_(True)
    model.train()
    gradients(model, missing=True)
    assert _seen(model) == [False] * 4
    assert "model.layers.1.mlp.experts.down_proj" in moelora.report(model).untrained
    assert "no gradient yet" in str(moelora.report(model))


def test_adapter_that_no_token_reaches_shows():
    model = adapt(build("qwen3_moe"))
    moelora.enable(model)
    for wrapper in wrappers(model)[:2]:
        nn.init.zeros_(wrapper.lora_A["default"].weight)  # A and B at zero: no gradient ever
        nn.init.zeros_(wrapper.lora_B["default"].weight)
    gradients(model)
    assert len(moelora.report(model).untrained) == 2


# ---- files


def test_trained_files_are_interchangeable(tmp_path):
    """Trained by one, saved by both: the same bytes; loaded by the other: the same logits."""
    model = adapt(build("qwen3_moe"), targets=["o_proj"])
    moelora.enable(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "with")
    expected = logits(model)
    plain = PeftModel.from_pretrained(build("qwen3_moe"), tmp_path / "with")
    assert difference(logits(plain), expected) < 1e-5
    plain.save_pretrained(tmp_path / "without")
    name = "adapter_model.safetensors"
    assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    base = build("qwen3_moe")
    moelora.enable(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "without")
    moelora.enable(loaded)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_equals_that_of_peft_to_the_bit(dtype):
    def merged(enabled):
        model = adapt(build("gpt_oss", dtype))
        if enabled:
            moelora.enable(model)
            gradients(model)
        return model.merge_and_unload(safe_merge=True).state_dict()

    expected, found = merged(False), merged(True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def _per_expert_adapter(directory) -> None:
    """An adapter as PEFT wrote it when each expert was three linear layers."""
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    config.base_model_name_or_path, config.inference_mode = "", True
    config.save_pretrained(directory)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(2):
        for expert in range(5):
            for name, (k, n) in {"gate_proj": (24, 20), "up_proj": (24, 20), "down_proj": (20, 24)}.items():
                stem = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(2, k, generator=generator) * 0.3
                tensors[f"{stem}.lora_B.weight"] = torch.randn(n, 2, generator=generator) * 0.3
    save_file(tensors, directory / "adapter_model.safetensors")


def test_per_expert_adapters_are_converted_by_peft(tmp_path):
    _per_expert_adapter(tmp_path)
    model = PeftModel.from_pretrained(build("qwen3_moe"), tmp_path)
    expected = logits(model)
    assert difference(expected, logits(build("qwen3_moe"))) > 1e-2
    report = moelora.enable(model)
    assert {a.path for layer in report.layers for a in layer.adapters} == {"operators"}
    assert difference(logits(model), expected) < 1e-5
    # An expert of its own, by hand: the last layer's third, merged.
    files = load_file(tmp_path / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.mlp.experts.2.down_proj"
    delta = 1.5 * files[f"{stem}.lora_B.weight"] @ files[f"{stem}.lora_A.weight"]
    weight = build("qwen3_moe").model.layers[1].mlp.experts.down_proj[2] + delta
    merged = model.merge_and_unload().model.layers[1].mlp.experts.down_proj[2]
    torch.testing.assert_close(merged, weight, rtol=1e-5, atol=1e-6)
