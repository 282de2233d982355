"""Threads that share one enabled model: each call is what it would be alone."""

import sys
from concurrent.futures import ThreadPoolExecutor

import moelora
import pytest
import torch
from model_tiny import (
    adapt,
    build,
    fill,
    one_thread,  # noqa: F401  (autouse)
    wrappers,
)
from peft import LoraConfig, PeftModel
from torch import nn

THREADS, CALLS, BATCHES = 8, 240, 30


@pytest.fixture(autouse=True)
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def _model(*active: str, by_peft: bool = False) -> PeftModel:
    """With two adapters, `active` ones of them, of which PEFT computes the second if `by_peft`."""
    torch.manual_seed(3)
    model = adapt(build("qwen3_moe"))
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=names))
    fill(model, seed=4)
    model.base_model.set_adapter(list(active))
    if by_peft:  # a dtype that the operators do not take beside float32
        for wrapper in wrappers(model):
            wrapper.lora_A["second"].to(torch.bfloat16)
            wrapper.lora_B["second"].to(torch.bfloat16)
    moelora.enable(model)
    return model.train()


def _step(model: PeftModel, trained: list[nn.Parameter], batch: int) -> list[torch.Tensor]:
    """The logits of a batch, and the gradients of what is trained."""
    ids = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(batch))
    out = model(input_ids=ids, labels=ids)
    return [out.logits.detach(), *torch.autograd.grad(out.loss, trained)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "active",
    [[("default",)], [("default",), ("second",)], [("default", "second")], [("second",)]],
    ids=["one model", "a copy for each adapter", "two active adapters", "an adapter that PEFT computes"],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_concurrent_calls_equal_serial_ones(active, recompute):
    by_peft = active == [("second",)]
    models = [_model(*names, by_peft=by_peft) for names in active]
    paths = {a.path for model in models for x in moelora.report(model).layers for a in x.adapters if a.active}
    assert paths == {"PEFT" if by_peft else "operators"}
    for model in models:
        if recompute:
            # torch 2.13 locks a generator and the interpreter in two orders where garbage is collected while
            # its state is read: threads that keep it for recomputation can wait for each other forever.
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    # Listed before the calls: PEFT changes the tree of modules during one.
    trained = {id(model): [p for p in model.parameters() if p.requires_grad] for model in models}
    jobs = [(models[call % len(models)], call % BATCHES) for call in range(CALLS)]
    serial = {(id(model), batch): _step(model, trained[id(model)], batch) for model, batch in {*jobs}}
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda job: _step(job[0], trained[id(job[0])], job[1]), jobs))
    assert len(serial) == BATCHES
    for (model, batch), tensors in zip(jobs, found, strict=True):
        expected = serial[id(model), batch]
        assert len(tensors) == 1 + 8 * len(active[0])
        assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))
    assert all(not moelora.report(model).untrained for model in models)
