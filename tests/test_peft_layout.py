"""PEFT's storage of expert adapters, checked against the weights that PEFT itself merges."""

import moelora
import pytest
import torch
from model_tiny import (
    adapt,
    build,
    difference,
    logits,
    one_thread,  # noqa: F401  (autouse)
    tokens,
    wrappers,
)
from moelora.adapters import factors
from moelora.experts import Factors
from moelora.hot_factors import stored
from peft.tuners.lora.layer import ParamWrapper

KINDS = ("qwen3_moe", "gpt_oss")  # [E, out, in] and [E, in, out]


def _factors(wrapper: ParamWrapper) -> Factors:
    return factors(wrapper, "default", *stored(wrapper.lora_A["default"], wrapper.lora_B["default"]))


def _merged_minus_base(kind: str, **keywords) -> dict[str, torch.Tensor]:
    before, after = build(kind), adapt(build(kind), **keywords).merge_and_unload()
    after = dict(after.named_parameters())
    return {name: (after[name] - weight).detach() for name, weight in before.named_parameters()}


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_views_give_the_delta_that_peft_merges(kind, rank):
    deltas = _merged_minus_base(kind, rank=rank)
    model = adapt(build(kind), rank=rank)
    for name, wrapper in model.named_modules():
        if wrapper not in wrappers(model):
            continue
        a, b, scaling, _ = _factors(wrapper)
        delta = scaling * b @ a  # [E, out, in]
        layer = name.removeprefix("base_model.model.").replace(".base_layer", "")
        expected = deltas[f"{layer}.{wrapper.parameter_name}"]
        expected = expected.transpose(1, 2) if kind == "gpt_oss" else expected
        assert len({a.shape[0], a.shape[1], a.shape[2], b.shape[1]}) == 4, (
            "sizes must differ to tell layouts apart"
        )
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_views(kind):
    for wrapper in wrappers(adapt(build(kind))):
        a, b, *_ = _factors(wrapper)
        assert a.data_ptr() == wrapper.lora_A["default"].weight.data_ptr()
        assert b.data_ptr() == wrapper.lora_B["default"].weight.data_ptr()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"experts.gate_up_proj": 2}}])
@pytest.mark.parametrize("kind", KINDS)
def test_enabled_model_agrees_with_the_merged_model(kind, options):
    merged = logits(adapt(build(kind), **options).merge_and_unload())
    model = adapt(build(kind), **options)
    moelora.enable(model)
    assert difference(logits(model), merged) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_files_are_the_same_with_and_without(kind, tmp_path):
    model = adapt(build(kind))
    model.save_pretrained(tmp_path / "without")
    moelora.enable(model)
    model.save_pretrained(tmp_path / "with")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_merging_an_enabled_model_equals_merging_a_plain_one(kind):
    plain = adapt(build(kind)).merge_and_unload().state_dict()
    model = adapt(build(kind))
    moelora.enable(model)
    model(input_ids=tokens())
    merged = model.merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], value) for name, value in plain.items())
