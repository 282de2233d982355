"""The default base: a small byte-level Qwen3-MoE, pretrained on the source of Python's standard library."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_ASSETS_CACHE
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

import moelora
from moelora.commands import data, options, threads, training
from moelora.errors import MoeloraError, writing

END_OF_TEXT = "<|endoftext|>"

MODEL: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "initializer_range": 0.08,  # about 1/sqrt(hidden_size): learns faster than the usual 0.02
    "norm_topk_prob": True,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "bos_token_id": None,
}
PRETRAINING: dict[str, Any] = {
    "characters": 1_200_000,
    "seq_length": 128,
    "batch_size": 16,
    "steps": 350,
    "learning_rate": 6e-3,
}


def default_cache() -> Path:
    """Where pretrained bases are kept unless the user says otherwise."""
    return Path(HF_ASSETS_CACHE) / "moelora"


def inspect() -> tuple[Qwen3MoeConfig, PreTrainedTokenizerFast]:
    """The base's configuration and tokenizer, whether it is pretrained yet or not."""
    return Qwen3MoeConfig(**MODEL), byte_tokenizer()


def outline() -> Qwen3MoeForCausalLM:
    """The base on the meta device."""
    with torch.device("meta"):
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MODEL))


def directory(cache: Path) -> Path:
    """Where the base is, or will be, in `cache`. Its name covers everything that decides its content."""
    recipe = {"model": MODEL, "pretraining": PRETRAINING, "python": sys.version_info[:3], "version": 1}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return cache / f"base-{digest}"


def ensure(cache: Path, fixed_threads: bool = False) -> Path:
    """The directory of the pretrained base in `cache`: pretrained now if it is not there.

    Pretraining leaves torch with the number of threads that suits it, unless `fixed_threads`.
    It appears under its name only when complete.
    """
    final = directory(cache)
    if not final.is_dir():
        with writing(cache):
            cache.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=cache))
        try:
            print(f"first use: pretraining a small model, to be kept in {final}")
            model, tokenizer = pretrain(staging, MODEL, PRETRAINING, fixed_threads)
            with writing(final):
                model.save_pretrained(staging)
                tokenizer.save_pretrained(staging)
                _publish(staging, final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return final


def _publish(staging: Path, directory: Path) -> None:
    try:
        os.rename(staging, directory)
    except OSError:
        if not directory.is_dir():  # else another process was first, with the same content
            raise


def pretrain(
    scratch: Path, config: dict[str, Any], settings: dict[str, Any], fixed_threads: bool
) -> tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast]:
    """A model of `config` pretrained on the standard library, and its tokenizer; `scratch` is Trainer's."""
    tokenizer = byte_tokenizer()
    train, held_out = data.split(standard_library(settings["characters"]), 0.05, seed=0)
    length = settings["seq_length"]
    tokens = data.Tokens(
        data.blocks(tokenizer, train, length, "standard library's text"),
        data.blocks(tokenizer, held_out, length, "standard library's held-out text"),
        data.WRAPPED,
    )
    set_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))
    moelora.enable(model)
    if not fixed_threads:
        inputs = data.batch(tokens.train.select(range(settings["batch_size"])), tokenizer, bordered=False)
        threads.choose(lambda: model(**inputs).loss.backward())
        model.zero_grad()
    trainer, progress = training.trainer(
        model,
        tokenizer,
        tokens,
        scratch,
        "pretraining",
        options.DEFAULTS["eval_rows"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        warmup_steps=settings["steps"] // 20,
        save_strategy="no",
        router_aux_loss_coef=0.01,
        seed=0,
    )
    try:
        trainer.train()
        # The balancing loss is no part of what the model predicts, and not for its later trainings.
        trainer.aux_loss_enabled = model.config.output_router_logits = False
        loss = training.held_out_loss(trainer)
    finally:
        progress.close()
    print(f"pretrained on {progress.tokens:,} tokens: held-out loss {loss:.3f}\n")
    moelora.disable(model)
    return model, tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def standard_library(characters: int) -> list[str]:
    """About that many characters of Python's own standard library, one document a source file.

    Raises: MoeloraError if this Python comes without its source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: list[str] = []
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        if path.parent.name in {"site-packages", "dist-packages", "test", "tests", "pydoc_data", "idlelib"}:
            continue  # pydoc_data is what the demonstration tunes on
        text = path.read_text(encoding="utf-8", errors="ignore")
        documents += [text] if text.strip() else []
        characters -= len(text)
        if characters <= 0:
            break
    if len(documents) < 10:
        raise MoeloraError(
            f"expected the standard library's source in {root}, found {len(documents)} files: use --model"
        )
    return documents
