"""`moelora.from_pretrained` on tiny checkpoints of every packed layout, beside the dense ones."""

import moelora
import pytest
import torch
from model_tiny import one_thread, tokens  # noqa: F401  (one_thread: autouse)
from moelora import weights
from packed_files import TABLE
from packed_models import adapted, checkpoints, experts, one_family  # noqa: F401  (the last: fixtures)
from torch import nn

from torch_moelora.formats import PackedWeight


def step(model: nn.Module):
    out = model(input_ids=tokens(), labels=tokens())
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), out.loss.detach(), grads


@pytest.mark.parametrize("layout", TABLE, ids=str)
def test_trains_as_the_dense_model_of_its_numbers(layout, checkpoints, one_family):  # noqa: F811
    """Logits, loss, every adapter's gradient and generated tokens to the bit; the report names the format."""
    packed, dense = checkpoints(layout.name).model(), checkpoints(layout.name).other()
    for module, beside in zip(experts(packed), experts(dense), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            weight = weights.weight_of(module, name)
            assert isinstance(weight, PackedWeight) and weight.format == layout.format
            assert torch.equal(weight.dequantize(torch.bfloat16), getattr(beside, name))
            assert getattr(module, name).shape == getattr(beside, name).shape
            assert getattr(module, name).untyped_storage().nbytes() <= 4
    models = [adapted(model) for model in (packed, dense)]
    reports = [moelora.enable(model, linears=True) for model in models]
    assert {row.format for row in reports[0].layers} == {layout.format}
    assert reports[0].layers[0].nbytes < 0.6 * reports[1].layers[0].nbytes
    (logits, loss, grads), (expected, loss_too, wanted) = map(step, models)
    assert torch.equal(logits, expected) and torch.equal(loss, loss_too)
    assert grads.keys() == wanted.keys() and len(grads) >= 8
    assert all(torch.equal(grads[name], wanted[name]) for name in wanted)
    new, new_too = (m.generate(input_ids=tokens(1, 5), max_new_tokens=6, do_sample=False) for m in models)
    assert torch.equal(new, new_too) and new.shape[1] > 5
