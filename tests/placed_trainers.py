"""transformers' and TRL's trainers on placed models: the part of tests/placed_checks.py that takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moelora
import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from datasets import Dataset
from model_tiny import adapt, build, difference, tokens
from moelora import MoeloraError
from moelora.commands.default_model import byte_tokenizer
from peft import LoraConfig
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

ROWS = 6  # of a global batch: that of 1, 2 and 3 processes
STEPS = 4


def _arguments(out: Path, here: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out), "per_device_train_batch_size": ROWS // here.world, "max_steps": STEPS,
        "save_steps": 2, "logging_steps": 1, "learning_rate": 0.01, "report_to": [], "use_cpu": True,
        "max_grad_norm": 0.5, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def _trainer(here: Any, out: Path, **more: Any) -> Trainer:
    arguments = TrainingArguments(**_arguments(out, here), **more)  # make torchrun's process group
    torch.manual_seed(4)
    model = adapt(build("qwen3_moe"), targets=["o_proj"])
    moelora.enable(model)
    if here.world > 1:
        moelora.place(model)
    rows = [{"input_ids": row, "labels": row} for row in tokens(STEPS * ROWS)]
    return Trainer(model, arguments, train_dataset=rows, callbacks=[moelora.Callback()])


def _like(one: Path, other: Path, limit: float = 1e-4) -> None:
    found, expected = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        apart = difference(found[name], tensor)
        assert apart < limit, f"{name}: {apart}"


def trainer(here: Any) -> None:
    """transformers' Trainer: trains as one process, and goes on from a checkpoint to the same bytes."""
    out = here.directory / f"trainer{here.world}"
    run = _trainer(here, out)
    run.train()
    run.save_model(str(out / "end"))
    if here.world > 1:
        again = _trainer(here, out)
        again.train(resume_from_checkpoint=str(out / "checkpoint-2"))
        again.model.save_pretrained(out / "again")
        torch.distributed.barrier()  # what the callback gathered is written without waiting for anybody
        last = (out / "checkpoint-4" / "adapter_model.safetensors").read_bytes()
        assert (out / "again" / "adapter_model.safetensors").read_bytes() == last
        assert (out / "end" / "adapter_model.safetensors").read_bytes() == last
        _like(out / "end", here.directory / "trainer1" / "end")


def _sharded(here: Any, out: Path, patch: pytest.MonkeyPatch, **more: Any) -> Trainer:
    """With the trainer's fsdp_config, and accelerate's own variable for what FSDP2 leaves alone."""
    patch.setenv("ACCELERATE_USE_FSDP", "true")  # accelerate sets it itself, for good
    patch.setenv("FSDP_IGNORED_MODULES", r".*\.experts")
    run = _trainer(
        here,
        out,
        fsdp=True,
        fsdp_config={"transformer_layer_cls_to_wrap": "Qwen3MoeDecoderLayer"},
        optim="adamw_torch",  # a fused step takes DTensors or others, not both
        **more,
    )
    # As accelerate does itself where processes have accelerators, but not where they have CPUs.
    patch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    patch.setattr(AcceleratorState, "is_fsdp2", True)
    run.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**run.args.fsdp_plugin_args)
    run.is_fsdp_enabled = True
    return run


def trainer_sharded(here: Any) -> None:
    """Trains and saves as one process does; writes no checkpoint that it could not go on from."""
    out = here.directory / "fsdp"
    with pytest.MonkeyPatch.context() as patch:
        with pytest.raises(MoeloraError, match="save_only_model is False, expected True: under FSDP"):
            _sharded(here, out, patch)
        run = _sharded(here, out, patch, save_only_model=True)
        run.train()
        for name, parameter in run.model.named_parameters():
            assert isinstance(parameter, DTensor) == (".experts." not in name), name
        run.save_model(str(out / "end"))
    torch.distributed.barrier()
    for name in ("end", "checkpoint-4"):
        _like(out / name, here.directory / "trainer1" / "end")


def trainer_elsewhere(here: Any) -> None:
    """A checkpoint of two processes, continued on another number."""
    run = _trainer(here, here.directory / f"elsewhere{here.world}")
    run.train(resume_from_checkpoint=str(here.directory / "trainer2" / "checkpoint-2"))
    run.save_model(str(here.directory / "elsewhere"))
    if here.rank == 0:
        _like(here.directory / "elsewhere", here.directory / "trainer1" / "end")


def sft_trainer(here: Any) -> None:
    """TRL's, which attaches the adapter to a placed model itself."""
    out = here.directory / f"sft{here.world}"
    arguments = SFTConfig(**_arguments(out, here), max_length=32, bf16=False, gradient_checkpointing=False)
    torch.manual_seed(0)
    base = build("qwen3_moe")
    base.resize_token_embeddings(257, mean_resizing=False)
    base.router_aux_loss_coef = 0.0  # which is no sum over tokens
    moelora.enable(base)
    if here.world > 1:
        moelora.place(base)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(r=3, target_modules=[], target_parameters=names, task_type="CAUSAL_LM")
    texts = Dataset.from_dict({"text": [f"{i} and {i} is {2 * i}" for i in range(STEPS * ROWS)]})
    torch.manual_seed(5)
    run = SFTTrainer(
        base, arguments, train_dataset=texts, processing_class=byte_tokenizer(), peft_config=lora,
        callbacks=[moelora.Callback()],
    )  # fmt: skip
    moelora.enable(run.model)
    run.train()
    assert not moelora.report(run.model).untrained
    run.save_model(str(out / "end"))
    if here.world > 1 and here.rank == 0:
        # B begins at zero, and Adam makes as much of the rounding of small gradients as of large ones.
        _like(out / "end", here.directory / "sft1" / "end", 1e-3)
