"""Training on packed experts beside dense ones: checkpointing, autocast, compile, and two trainers."""

import math

import moelora
import pytest
import torch
from datasets import Dataset
from model_tiny import difference, one_thread, tokens  # noqa: F401  (one_thread: autouse)
from moelora.linears import PackedLinear
from packed_models import adapted, checkpoints, one_family  # noqa: F401  (the last: fixtures)
from transformers import Trainer, TrainingArguments

NAMES = ["ours nf4 nested", "gpt-oss mxfp4", "fp8 blocks"]


@pytest.fixture(params=NAMES)
def both(request, checkpoints, one_family):  # noqa: F811
    """The packed model and the dense one, adapted alike."""
    models = [adapted(checkpoints(request.param).model()), adapted(checkpoints(request.param).other())]
    for model in models:
        moelora.enable(model, linears=True)
    return models


def step(model, **context):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", **context) if context else torch.enable_grad():
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_equal(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys() and len(found[1]) >= 8
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


def test_gradient_checkpointing(both):
    plain = step(both[0])
    for model in both:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    found = step(both[0])
    check_equal(found, step(both[1]))
    check_equal(found, plain)


def test_autocast(both):
    for model in both:
        model.to(torch.float32)  # as it is for packed weights: they take any
    with pytest.raises(AssertionError):
        check_equal(step(both[0]), step(both[0], dtype=torch.bfloat16))
    found, expected = step(both[0], dtype=torch.bfloat16), step(both[1], dtype=torch.bfloat16)
    if any(isinstance(module, PackedLinear) for module in both[0].modules()):
        assert difference(found[0], expected[0]) < 0.01  # torch computes the dense ones
        assert all(difference(found[1][name], grad) < 0.2 for name, grad in expected[1].items())
    else:
        check_equal(found, expected)


def test_compile(checkpoints):  # noqa: F811
    """A compiled layer: no break in its graph, and what comes out without one."""
    model = adapted(checkpoints("ours nf4 nested").model())
    moelora.enable(model)
    loss, grads = step(model)
    block = model.base_model.model.model.layers[0].mlp
    torch._dynamo.reset()
    block.compile(backend="aot_eager", fullgraph=True)
    found, found_grads = step(model)
    torch.testing.assert_close(found, loss)
    assert found_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, atol=1e-3, rtol=1e-2)


def lines(count: int = 32) -> Dataset:
    ids = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": ids[i % 4], "labels": ids[i % 4]} for i in range(count)])


def arguments(kind, to, **more):
    return kind(
        output_dir=str(to), per_device_train_batch_size=4, max_steps=8, learning_rate=3e-3, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **more,
    )  # fmt: skip


def check_learns(trainer):
    """The loss falls, and what was trained is on the experts."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.2, losses
    assert not moelora.report(trainer.model).untrained


def test_trainer(checkpoints, tmp_path):  # noqa: F811
    model = adapted(checkpoints("gptq").model())
    moelora.enable(model)
    trainer = Trainer(model, arguments(TrainingArguments, tmp_path), train_dataset=lines())
    check_learns(trainer)
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_sft_trainer(checkpoints, tmp_path):  # noqa: F811
    trl = pytest.importorskip("trl")
    from moelora.commands.default_model import byte_tokenizer
    from peft import LoraConfig

    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names)
    trainer = trl.SFTTrainer(
        checkpoints("ours nf4 nested").model(), arguments(trl.SFTConfig, tmp_path, bf16=True),
        train_dataset=lines(), peft_config=config, processing_class=byte_tokenizer(),
        callbacks=[moelora.Callback()],
    )  # fmt: skip
    check_learns(trainer)
