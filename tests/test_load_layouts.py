"""`moelora.from_pretrained` on tiny checkpoints of every packed layout, beside the dense ones."""

import moelora
import pytest
import torch
from model_tiny import adapt, one_thread, tokens  # noqa: F401  (one_thread: autouse)
from moelora import weights
from moelora.experts import is_experts
from packed_files import LAYOUTS, TABLE, write
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from torch_moelora.formats import PackedWeight


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """name of the layout → (packed directory, dense directory, cache)."""
    made = {}

    def get(name: str):
        if name not in made:
            home = tmp_path_factory.mktemp("layout")
            write(LAYOUTS[name], home / "packed", home / "dense")
            made[name] = home / "packed", home / "dense", home / "cache"
        return made[name]

    return get


def experts(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_experts(module)]


def adapted(model: nn.Module) -> PeftModel:
    torch.manual_seed(3)  # of A
    return adapt(model, targets=["q_proj"])


def step(model: nn.Module):
    out = model(input_ids=tokens(), labels=tokens())
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), out.loss.detach(), grads


@pytest.mark.parametrize("layout", TABLE, ids=str)
def test_trains_as_the_dense_model_of_its_numbers(layout, checkpoints):
    """Logits, loss, every adapter's gradient and generated tokens: the same bits; the report names the format."""
    directory, other, cache = checkpoints(layout.name)
    packed = moelora.from_pretrained(directory, cache_dir=cache)
    dense = AutoModelForCausalLM.from_pretrained(other)
    for module, beside in zip(experts(packed), experts(dense), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            weight = weights.weight_of(module, name)
            assert isinstance(weight, PackedWeight) and weight.format == layout.format
            assert torch.equal(weight.dequantize(torch.bfloat16), getattr(beside, name))
            assert getattr(module, name).shape == getattr(beside, name).shape
            assert getattr(module, name).untyped_storage().nbytes() <= 4
    models = [adapted(model) for model in (packed, dense)]
    reports = [moelora.enable(model) for model in models]
    assert {row.format for row in reports[0].layers} == {layout.format}
    assert reports[0].layers[0].nbytes < 0.6 * reports[1].layers[0].nbytes
    (logits, loss, grads), (expected, loss_too, wanted) = map(step, models)
    assert torch.equal(logits, expected) and torch.equal(loss, loss_too)
    assert grads.keys() == wanted.keys() and len(grads) >= 8
    assert all(torch.equal(grads[name], wanted[name]) for name in wanted)
    new, new_too = (m.generate(input_ids=tokens(1, 5), max_new_tokens=6, do_sample=False) for m in models)
    assert torch.equal(new, new_too) and new.shape[1] > 5
