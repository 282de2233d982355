"""The training stack around an enabled model: compile, checkpointing, mixed precision, the trainers."""

import moelora
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from model_tiny import (
    adapt,
    build,
    difference,
    fill,
    gradients,
    one_thread,  # noqa: F401  (autouse)
    tokens,
)
from moelora.commands.default_model import byte_tokenizer
from peft import LoraConfig
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointError
from transformers import Trainer, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

SHAPES = [(2, 16), (1, 9), (3, 16), (2, 24), (4, 7), (1, 16)]


@pytest.fixture(autouse=True)
def _own_accelerator_state():
    """accelerate keeps one state for the process, whatever the precision asked for next."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _model(enabled: bool, layers: int | None = None, **keywords) -> nn.Module:
    torch.manual_seed(3)
    model = adapt(build("qwen3_moe", layers=layers), targets=["o_proj"], **keywords)
    if enabled:
        moelora.enable(model)
    return model.train()


# ---- torch.compile


@pytest.mark.slow
def test_compiled_training_follows_eager_over_shapes():
    """No graph break, one compilation for a batch of one and one for all others, the same losses."""

    def curve(compiled: bool) -> list[float]:
        model = _model(enabled=True, layers=1)  # tracing takes the time
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        step = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else model
        losses = []
        for shape in SHAPES:
            rows = tokens(*shape)
            loss = step(input_ids=rows, labels=rows).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert not moelora.report(model).untrained
        return losses

    torch._dynamo.reset()
    counters.clear()
    assert curve(compiled=True) == pytest.approx(curve(compiled=False), rel=1e-6)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]


@pytest.mark.slow
def test_what_peft_computes_breaks_the_graph_with_our_reason():
    """PEFT's own path cannot be traced; a compilation that allows breaks runs it."""
    model = _model(enabled=True, layers=1)
    for module in model.modules():
        if type(module).__name__ == "ParamWrapper":
            module.lora_A.to(torch.bfloat16)
            module.lora_B.to(torch.bfloat16)
    expected = gradients(model)[0]
    torch._dynamo.reset()
    reason = "down_proj to a copy of the weights: its factors are torch.bfloat16 beside torch.float32 weights"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=reason):
        torch.compile(model, fullgraph=True, backend="eager")(input_ids=tokens())
    found = torch.compile(model, backend="eager")(input_ids=tokens()).logits
    assert difference(found, expected) < 1e-5


@pytest.mark.slow
def test_adapters_are_switched_under_compile():
    """One, the other, both and back: one graph for each of the three, and the gradients are those of PEFT."""

    def two(enabled: bool) -> nn.Module:
        model = _model(enabled, layers=1)
        names = ["experts.gate_up_proj", "experts.down_proj"]
        second = LoraConfig(r=2, lora_alpha=7, target_modules=["o_proj"], target_parameters=names)
        model.add_adapter("second", second)
        fill(model, seed=4)
        if enabled:
            moelora.enable(model)
        return model

    plain, enabled = two(enabled=False), two(enabled=True)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(enabled, fullgraph=True, backend="aot_eager")
    for active in (["default"], ["second"], ["default", "second"], ["default"], ["second"]):
        for model in (plain, enabled):
            model.base_model.set_adapter(active)
            model.zero_grad(set_to_none=True)
        expected = plain(input_ids=tokens(), labels=tokens())
        found = compiled(input_ids=tokens(), labels=tokens())
        assert difference(found.logits, expected.logits) < 1e-5
        expected.loss.backward()
        found.loss.backward()
        grads = {n: p.grad for n, p in enabled.named_parameters() if p.grad is not None}
        assert len(grads) == 6 * len(active) and all(any(f".{a}." in n for a in active) for n in grads)
        for name, parameter in plain.named_parameters():
            assert parameter.grad is None or difference(grads[name], parameter.grad) < 1e-5, name
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


# ---- checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = _model(enabled=True)
    expected_logits, expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    logits, found = gradients(model)
    assert torch.equal(logits, expected_logits) and found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def _drift(model: nn.Module) -> list[int]:
    """Routing that differs in each call, as rounding makes it. Returns where the calls are counted."""
    calls = [0]

    def other_experts(module, arguments):
        x, ids, gates = arguments
        calls[0] += 1
        return x, torch.where(ids == 0, calls[0] % 5, ids), gates

    for module in model.modules():
        if moelora.experts.is_experts(module):
            module.register_forward_pre_hook(other_experts)
    return calls


@pytest.mark.parametrize("reentrant", [True, False])
def test_routing_may_drift_on_recompute(reentrant):
    def run(enabled: bool) -> dict[str, torch.Tensor]:
        model = _model(enabled)
        calls = _drift(model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found = gradients(model)[1]
        assert calls[0] == 4  # two layers, twice
        return found

    assert all(gradient.isfinite().all() and gradient.any() for gradient in run(True).values())
    if not reentrant:  # what transformers' own experts save depends on the routing
        with pytest.raises(CheckpointError):
            run(False)


def test_what_is_kept_does_not_depend_on_the_routing():
    """Shapes of T·top_k, E and R: the same for a balanced batch and for one that all goes to one expert."""
    model = _model(enabled=True)
    layer = model.get_base_model().model.layers[0].mlp.experts
    x, gates = torch.randn(12, 24, requires_grad=True), torch.rand(12, 2)

    def kept(ids: torch.Tensor) -> list[tuple[int, ...]]:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
        ):
            layer(x, ids, gates)
        return shapes

    balanced = kept(torch.arange(24).view(12, 2) % 5)
    assert balanced == kept(torch.zeros(12, 2, dtype=torch.int64)) == kept(torch.full((12, 2), 5))
    assert (24, 40) in balanced and (24, 20) not in balanced  # h, and not what the activation makes of it


# ---- accelerate and the trainers


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    """Autocast, accumulation over two batches, clipping."""

    def run(enabled: bool) -> tuple[list[float], list[float]]:
        accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        model = _model(enabled)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        model, optimizer = accelerator.prepare(model, optimizer)
        losses, norms = [], []
        for step in range(6):
            rows = tokens(4)[step % 2 :: 2]
            with accelerator.accumulate(model):
                loss = model(input_ids=rows, labels=rows).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses, norms

    tolerance = 1e-5 if precision == "no" else 3e-2
    (losses, norms), (expected, expected_norms) = run(True), run(False)
    assert losses == pytest.approx(expected, rel=tolerance) and losses[-2:] < losses[:2]
    assert len(norms) == 3 and norms == pytest.approx(expected_norms, rel=10 * tolerance)


_ARGUMENTS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "gradient_checkpointing": True,
    "save_strategy": "no",
}


def _losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _trainer(model: nn.Module, out: str) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tokens(16)]
    return Trainer(model, TrainingArguments(out, **_ARGUMENTS, max_grad_norm=0.5), train_dataset=rows)


def _sft_trainer(model: nn.Module, out: str, **keywords) -> Trainer:
    texts = Dataset.from_dict({"text": [f"{i} and {i} is {2 * i}" for i in range(16)]})
    arguments = SFTConfig(out, **_ARGUMENTS, max_length=32, bf16=False)
    return SFTTrainer(model, arguments, train_dataset=texts, processing_class=byte_tokenizer(), **keywords)


def test_sft_trainer_that_attaches_the_adapter_itself(tmp_path):
    def run(enabled: bool) -> list[float]:
        set_seed(0)
        base = build("qwen3_moe")
        base.resize_token_embeddings(257, mean_resizing=False)
        names = ["experts.gate_up_proj", "experts.down_proj"]
        lora = LoraConfig(r=3, target_modules=[], target_parameters=names, task_type="CAUSAL_LM")
        trainer = _sft_trainer(base, str(tmp_path), peft_config=lora)
        if enabled:
            assert moelora.enable(trainer.model).trainable == 4
        return _losses(trainer)

    losses, expected = run(True), run(False)
    assert len(losses) == 4 and losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("make", [_trainer, _sft_trainer])
def test_trainer_unmodified(make, tmp_path):
    def run(enabled: bool) -> list[float]:
        set_seed(0)
        base = build("qwen3_moe")
        base.resize_token_embeddings(257, mean_resizing=False)
        model = adapt(base, targets=["o_proj"])
        if enabled:
            moelora.enable(model)
        losses = _losses(make(model, str(tmp_path)))
        assert not enabled or not moelora.report(model).untrained
        return losses

    losses, expected = run(True), run(False)
    assert len(losses) == 4 and losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_callback_enables_and_tells(frozen, tmp_path, caplog):
    """As in a framework that builds everything itself; what is attached but never trained is told of."""
    set_seed(0)
    model = adapt(build("qwen3_moe"), targets=["o_proj"])
    for name, parameter in model.named_parameters():
        if frozen and "experts" in name:
            parameter.requires_grad_(False)
    with caplog.at_level("INFO", logger="moelora"):
        trainer = _trainer(model, str(tmp_path))
        trainer.add_callback(moelora.Callback())
        _losses(trainer)
    assert "model.layers.*.mlp.experts  ×2" in caplog.text
    assert ("nothing on the experts was trained" in caplog.text) == frozen
    assert moelora.report(model).trainable == (0 if frozen else 4) and not moelora.report(model).untrained


def test_generation_of_a_bf16_model_that_was_trained():
    """Training mode, then generation under autocast: the same tokens as eager in most places."""
    model = adapt(build("qwen3_moe", torch.bfloat16)).eval()
    arguments = {"input_ids": tokens(), "max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    arguments |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**arguments).logits[0]
    moelora.enable(model)
    assert difference(model.generate(**arguments).logits[0], expected) < 3e-2
