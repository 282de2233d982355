"""`finetune`'s optimizers: 8-bit moments, steps inside the backward, and both resumed to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from finetune_tiny import (
    adapter,
    arguments,  # noqa: F401  (a fixture)
    changed,
    fails,
    model_dir,  # noqa: F401  (a fixture)
)
from model_tiny import (
    adapt,
    build,
    one_thread,  # noqa: F401  (autouse)
    tokens,
    wrappers,
)
from moelora import linears
from moelora.__main__ import main
from moelora.commands import lora, optimizers, saving
from moelora.errors import MoeloraError
from torch import nn
from torch.utils._pytree import tree_leaves

KINDS = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": lambda parameters: pytest.importorskip("bitsandbytes").optim.AdamW8bit(
        parameters, min_8bit_size=64
    ),
}


def _trained(kind: str, in_backward: bool) -> tuple[dict[str, nn.Parameter], int]:
    """LoRA parameters after three steps, and the most gradients that there were at a time."""
    torch.manual_seed(0)
    model = adapt(build("qwen3_moe"), targets=["q_proj"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = KINDS[kind](list(trained.values()))
    most = 0

    def count(_) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in trained.values()))

    for parameter in trained.values():
        parameter.register_post_accumulate_grad_hook(count)
    if in_backward:
        optimizers.step_in_backward(optimizer, model, lambda: 1)
    for _ in range(3):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained, most


@pytest.mark.parametrize("kind", KINDS)
def test_steps_inside_the_backward_are_the_same_steps(kind):
    (expected, all_at_once), (found, most) = _trained(kind, False), _trained(kind, True)
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())
    assert all_at_once == len(expected) > 10 and most == 1


def test_a_gradient_that_is_not_finite_is_not_used():
    model = adapt(build("qwen3_moe"))
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizers.step_in_backward(torch.optim.AdamW(trained), model, lambda: 7)
    with pytest.raises(MoeloraError, match=r"the gradient of \S*lora\S* has \d+ NaN .* at step 7"):
        (model(input_ids=tokens(), labels=tokens()).loss * float("nan")).backward()
    assert all(torch.equal(p, b) for p, b in zip(trained, before, strict=True))


@pytest.mark.slow
def test_a_run_with_both_and_its_resumption(arguments, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    given = changed(arguments, optimizer="adamw_8bit", step_in_backward=True, rank=64)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(changed(given, output=whole)) == 0
    real = saving.Watch.on_pre_optimizer_step

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt
        real(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.Watch, "on_pre_optimizer_step", stop)
        assert main(given) == 130
    assert (out / "checkpoint-2").exists()
    state = torch.load(out / "checkpoint-2" / "optimizer.pt", weights_only=False)
    assert torch.uint8 in {t.dtype for t in tree_leaves(state["state"]) if isinstance(t, torch.Tensor)}
    assert main(["finetune", "--resume", "--output", str(out), "--compare", "0", "--sample", "0"]) == 0
    ours, theirs = adapter(out), adapter(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((out / "summary.json").read_text())["options"]["max_grad_norm"] == 0


def test_what_does_not_go_with_steps_in_the_backward(arguments, capsys):  # noqa: F811
    given = changed(arguments, step_in_backward=True)
    line = fails(changed(given, grad_accumulation=2), capsys)
    assert "--grad-accumulation is 2, expected 1 with --step-in-backward" in line
    line = fails(changed(given, max_grad_norm=0.5), capsys)
    assert "--max-grad-norm is 0.5, expected 0 with --step-in-backward" in line


@pytest.mark.parametrize("own", [None, 5])
def test_linear_layers_with_a_rank_of_their_own(own):
    model = lora.adapt(build("qwen3_moe"), 2, 3.0, "both", ["q_proj", "o_proj"], own)
    layer = model.base_model.model.model.layers[0]
    for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj):
        assert linear.r["default"] == (own or 2) and linear.scaling["default"] == 1.5
    assert {(w.r["default"], w.scaling["default"]) for w in wrappers(model)} == {(2, 1.5)}


def test_a_rank_for_no_layer(arguments, capsys):  # noqa: F811
    assert "--target-rank is for --target-modules" in fails(changed(arguments, target_rank=3), capsys)


def test_without_bitsandbytes(arguments, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    line = fails(changed(arguments, optimizer="adamw_8bit"), capsys)
    assert "--optimizer adamw_8bit" in line and "pip install bitsandbytes" in line


def test_a_slow_head_is_widened(arguments, tmp_path, monkeypatch):  # noqa: F811
    """The same losses, as nothing but the head's products changes."""
    losses = []
    for slow in (False, True):
        out = tmp_path / str(slow)
        for where in ("linears", "commands.training", "commands.head"):
            here = f"moelora.{where}.slow_in_torch"
            monkeypatch.setattr(here, lambda weight, slow=slow: slow and weight.dtype in linears.HALF)
        assert main(changed(arguments, dtype="bfloat16", steps=2, output=out)) == 0
        losses.append([loss for _, loss in json.loads((out / "summary.json").read_text())["losses"]])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3) and losses[1] != losses[0]
