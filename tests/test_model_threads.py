"""Threads that share one enabled model: each call is what it would be alone."""

import sys
import threading
import time
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
from moelora import adapters
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn.utils import parametrize

# Factors that pass through the module spoil one call in six; a missing lock, nearly all.
THREADS, CALLS, BATCHES = 8, 96, 10
MANY = 240  # of the plainest case, in which calls are shortest and meet most often


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
    calls = MANY if active == [("default",)] and not recompute else CALLS
    jobs = [(models[call % len(models)], call % BATCHES) for call in range(calls)]
    serial = {(id(model), batch): _step(model, trained[id(model)], batch) for model, batch in {*jobs}}
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda job: _step(job[0], trained[id(job[0])], job[1]), jobs))
    assert len(serial) == BATCHES
    for (model, batch), tensors in zip(jobs, found, strict=True):
        expected = serial[id(model), batch]
        assert len(tensors) == 1 + 8 * len(active[0])
        assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))
    assert all(not moelora.report(model).untrained for model in models)


def test_the_choice_of_path_waits_for_a_weight_that_is_away(monkeypatch):
    """PEFT takes the weight away, and another call comes to where that decides, before it is back."""
    model = _model("second", by_peft=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    serial = [_step(model, trained, batch) for batch in range(2)]
    away, came = threading.Event(), threading.Event()
    inject, watch = parametrize._inject_property, adapters.watch

    def pausing(module, name):
        if not away.is_set():
            away.set()
            assert came.wait(60)
            time.sleep(0.2)  # time enough for the other call to look
        return inject(module, name)

    def coming(*arguments, **keywords):
        watch(*arguments, **keywords)
        if away.is_set():
            came.set()

    monkeypatch.setattr(parametrize, "_inject_property", pausing)
    monkeypatch.setattr(adapters, "watch", coming)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(_step, model, trained, 0)
        assert away.wait(60)
        second = pool.submit(_step, model, trained, 1)
        found = [first.result(), second.result()]
    assert came.is_set()
    for tensors, expected in zip(found, serial, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))
