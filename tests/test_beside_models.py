"""Whole models whose experts are in host memory, on a device whose streams are late on purpose."""

import copy

import late_device
import model_tiny
import moelora
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import attach_align_device_hook_on_blocks
from beside_layers import BF16, LATE, same
from model_tiny import one_thread  # noqa: F401
from moelora import experts
from moelora.errors import MoeloraError
from moelora.placement.beside import settling
from packed_files import LAYOUTS, write
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)


def put(model: torch.nn.Module) -> torch.nn.Module:
    """Experts and their LoRA in host memory, all else on the device."""
    model.to(LATE)
    for module in model.modules():
        if experts.is_experts(module):
            module.to("cpu")
        if type(module).__name__ == "ParamWrapper":
            module.lora_A.to("cpu")
            module.lora_B.to("cpu")
    return model


def step(model: torch.nn.Module, times: int = 1) -> list[Tensor]:
    """The loss and all gradients, of `times` forwards before their backwards."""
    model.zero_grad()
    tokens = [model_tiny.tokens(length=12 + i).to(LATE) for i in range(times)]
    losses = [model(input_ids=t, labels=t).loss for t in tokens]
    sum(losses).backward()
    return [t.detach().cpu() for t in (*losses, *(p.grad for p in model.parameters() if p.requires_grad))]


@pytest.fixture
def served_there(monkeypatch):
    """Lets weights be on the late device itself."""
    monkeypatch.setattr(experts, "DEVICES", (*experts.DEVICES, late_device.NAME))


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "mixtral_tanh"])
def kind(request):
    return request.param


def test_models(kind, served_there):
    """Beside to the bit what all on the accelerator gives; checkpointed and several forwards at once, too."""
    there = model_tiny.adapt(model_tiny.build(kind, BF16)).to(LATE)
    moelora.enable(there)
    expected, three = step(there), step(there, 3)
    model = put(model_tiny.adapt(model_tiny.build(kind, BF16)))
    told = str(moelora.enable(model))
    assert "on cpu beside late:0" in told and "not measured yet" in told
    for way in ("compute", "bring"):
        moelora.place(model, way=way)
        assert same([step(model)], [expected])
        assert same([step(model, 3)], [three])
        for reentrant in (True, False):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            model.train()
            assert same([step(model)], [expected])
            model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    moelora.place(model, way="auto")
    assert same([step(model)], [expected])
    assert "GF/s" in str(moelora.report(model))
    places = {p.device.type for n, p in model.named_parameters() if p.requires_grad}
    assert places == {"cpu"}


def test_hot_experts_are_the_most_used():
    model = put(model_tiny.adapt(model_tiny.build("qwen3_moe", BF16)))
    moelora.enable(model)
    batches = [{"input_ids": model_tiny.tokens().to(LATE)}]
    chosen = []
    for block in model.base_model.model.model.layers:
        block.mlp.gate.register_forward_hook(lambda m, a, out: chosen.append(out[-1].cpu()))
    report = moelora.place(model, hot=2, batches=batches)
    assert "2 of them there" in str(report)
    for module, ids in zip((m for m in model.modules() if experts.is_experts(m)), chosen[:2], strict=True):
        counts = torch.bincount(ids.flatten(), minlength=5)
        hot = settling.beside(module).ids
        assert counts[hot].min() >= counts[[e for e in range(5) if e not in hot]].max()
    names = {name: [3] for name in ("model.layers.0.mlp.experts",)}
    moelora.place(model, hot=names)
    found = [settling.beside(m).ids for m in model.modules() if experts.is_experts(m)]
    assert found == [[3], []]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"hot": 6}, "expected 0 to 5 experts"),
        ({"hot": {"model.layers.9": [0]}}, "expected names of expert layers"),
        ({"hot": {"model.layers.0.mlp.experts": [5]}}, "expected experts 0 to 4"),
        ({"way": "fly"}, "way: expected one of auto, compute, bring, got 'fly'"),
    ],
)
def test_bad_arguments(arguments, told):
    model = put(model_tiny.build("qwen3_moe", layers=1))
    moelora.enable(model)
    with pytest.raises(MoeloraError, match=told):
        moelora.place(model, **arguments)


def test_not_over_ranks_as_well(tmp_path):
    """Hot experts are those of one process, whichever is said first."""
    model = put(model_tiny.build("qwen3_moe", layers=1))
    moelora.enable(model)
    told = "hot is for experts that one process has"
    with pytest.raises(MoeloraError, match=told):
        moelora.place(model, "spread", hot=2)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        moelora.place(model, hot=2)
        with pytest.raises(MoeloraError, match="has hot experts on an accelerator"):
            moelora.place(model, "spread")
        moelora.place(model, hot=0)
        moelora.place(model, "spread")
        with pytest.raises(MoeloraError, match=told):
            moelora.place(model, hot=2)
    finally:
        dist.destroy_process_group()


def test_without_an_accelerator_in_the_model():
    model = model_tiny.build("qwen3_moe", layers=1)
    report = moelora.enable(model)
    assert report.layers[0].places == ()
    with pytest.raises(MoeloraError, match="no layer's are"):
        moelora.place(model, hot=1)


def test_weights_that_change_are_copied_anew():
    model = put(model_tiny.adapt(model_tiny.build("qwen3_moe", torch.float32)))
    moelora.enable(model)
    tokens = model_tiny.tokens().to(LATE)
    for arguments in ({"hot": 3, "way": "compute"}, {"hot": 0, "way": "bring"}):
        moelora.place(model, **arguments)
        with torch.no_grad():
            adapted = model(input_ids=tokens).logits.cpu()
            model.merge_adapter()
            merged = model(input_ids=tokens).logits.cpu()
            model.unmerge_adapter()
        assert model_tiny.difference(merged, adapted) < 1e-5


def test_accelerate_offloads(served_there):
    """Its hooks, which would bring dense weights in every call, are away while enabled, and back then."""
    model = model_tiny.build("qwen3_moe", BF16)
    there = model_tiny.build("qwen3_moe", BF16).to(LATE)
    tokens = model_tiny.tokens().to(LATE)
    moelora.enable(there)
    names = [n for n, m in model.named_modules() if experts.is_experts(m)]
    state = {k: v for k, v in model.state_dict().items() if ".experts." in k}
    attach_align_device_hook_on_blocks(
        model,
        execution_device={"": LATE} | dict.fromkeys(names, LATE),
        offload={"": False} | dict.fromkeys(names, True),
        weights_map=state,
    )
    module = model.get_submodule(names[0])
    assert module.down_proj.device.type == "meta"
    report = moelora.enable(model)
    assert module.down_proj.device.type == "cpu" and all(layer.places for layer in report.layers)
    moelora.place(model, way="compute")
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits.cpu(), there(input_ids=tokens).logits.cpu())
    moelora.disable(model)
    assert module.down_proj.device.type == "meta" and hasattr(module, "_hf_hook")


def test_packed_checkpoints(tmp_path, served_there):
    """A device_map that keeps packed experts in host memory; the rest of transformers' loading is as ever."""
    write(LAYOUTS["ours nf4 nested"], tmp_path)
    there = moelora.from_pretrained(tmp_path, device_map=str(LATE))
    names = [n for n, m in there.named_modules() if experts.is_experts(m)]
    model = moelora.from_pretrained(tmp_path, device_map={"": str(LATE)} | dict.fromkeys(names, "cpu"))
    moelora.enable(there)
    report = moelora.enable(model)
    assert all(layer.format == "nf4" and "on cpu beside late:0" in layer.places[0] for layer in report.layers)
    tokens = model_tiny.tokens().to(LATE)
    for way in ("compute", "bring"):
        moelora.place(model, way=way)
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens).logits.cpu(), there(input_ids=tokens).logits.cpu())


def test_trainer(tmp_path):
    """transformers' Trainer on a model that accelerate has spread by a device_map: as on the CPU alone."""
    model_tiny.build("qwen3_moe").save_pretrained(tmp_path / "base")
    names = [f"model.layers.{number}.mlp.experts" for number in range(2)]
    rows = [{"input_ids": row, "labels": row} for row in model_tiny.tokens(8)]
    adapters = []
    for devices in (None, {"": str(LATE)} | dict.fromkeys(names, "cpu")):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=devices)
        moelora.enable(base)
        torch.manual_seed(4)
        model = model_tiny.adapt(base, targets=["o_proj"])
        before = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if "lora_" in n}
        report = moelora.enable(model)
        assert all(bool(layer.places) == bool(devices) for layer in report.layers)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1.0, report_to=[],
            optim="sgd", save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, callbacks=[moelora.Callback()]).train()
        assert not moelora.report(model).untrained
        after = {n: p.detach().cpu() for n, p in model.named_parameters() if "lora_" in n}
        assert all((after[n] - before[n]).norm() > 1e-3 * before[n].norm() for n in before)
        adapters.append({n: after[n] - before[n] for n in before})
        places = {p.device.type for n, p in model.named_parameters() if "lora_" in n and ".experts." in n}
        assert places == {"cpu"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=devices)
    with pytest.raises(MoeloraError, match="before adapters are added"):
        moelora.enable(model_tiny.adapt(base))
    for name, expected in adapters[0].items():
        assert model_tiny.difference(adapters[1][name], expected) < 1e-5, name


def test_copies():
    """A copy of placed layers has its own buffers and hot experts."""
    model = put(model_tiny.build("qwen3_moe", BF16))
    moelora.enable(model)
    layers = nn.ModuleList(m for m in model.modules() if experts.is_experts(m))
    gen = torch.Generator().manual_seed(0)
    gates, ids = (t.to(LATE) for t in torch.rand(9, 5, generator=gen).topk(2))
    x = torch.randn(9, 24, generator=gen).to(LATE, BF16)
    for arguments in ({"hot": 2, "way": "compute"}, {"way": "bring"}):
        moelora.place(model, **arguments)
        with torch.no_grad():
            expected = [layer(x, ids, gates).cpu() for layer in layers]
            twins = copy.deepcopy(layers)
            found = [layer(x, ids, gates).cpu() for layer in twins]
        assert same([found], [expected])
        together = settling.beside(twins[0]).together
        assert together is not settling.beside(layers[0]).together
        assert [one.module for one in together.layers] == list(twins)
