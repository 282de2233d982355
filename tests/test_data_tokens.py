"""Rows of tokens: what the loss counts, what is cut, what a row holds, and who sees whom in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from model_tiny import (
    build,
    one_thread,  # noqa: F401  (autouse)
)
from moelora import MoeloraError
from moelora.commands import data, default_model, formats, packing
from transformers import AutoConfig, AutoModelForCausalLM

TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text()
ANSWERS = ["yes", "a longer answer", "no", "perhaps", "certainly not"]
CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": f"let me see {i}"},
            {"role": "user", "content": "well?"},
            {"role": "assistant", "content": answer},
        ]
    }
    for i, answer in enumerate(ANSWERS)
]
PAIRS = [{"prompt": f"question {i}: ", "completion": answer} for i, answer in enumerate(ANSWERS)]


@pytest.fixture
def tokenizer():
    tokenizer = default_model.byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _rows(format: str, rows: list[dict]) -> formats.Rows:
    return formats.Rows(format, Dataset.from_list(rows), "these rows")


def _tokens(tokenizer, rows: formats.Rows, **options) -> data.Tokens:
    given = {"length": 200, "packing": None, "loss": None, "held_out": 0.2, "seed": 0}
    return data.tokens(rows, tokenizer, **given | options)


def _learnt(tokenizer, row: dict) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != data.IGNORED])


def _all(tokens: data.Tokens) -> list[dict]:
    return [*tokens.train, *tokens.held_out]


def test_chat_learns_the_assistants_turns(tokenizer):
    tokens = _tokens(tokenizer, _rows("chat", CHAT))
    assert (len(tokens.train), len(tokens.held_out)) == (4, 1)
    found = {_learnt(tokenizer, row) for row in _all(tokens)}
    end = tokenizer.eos_token
    assert found == {f"let me see {i}{end}{answer}{end}" for i, answer in enumerate(ANSWERS)}
    row = tokens.train[0]
    assert tokenizer.decode(data.prompt(row, 4)).endswith("<assistant>")
    everything = _tokens(tokenizer, _rows("chat", CHAT), loss="all")
    assert everything.train[0]["labels"] == everything.train[0]["input_ids"]
    assert data.count(tokens.train, learnt=True) < data.count(tokens.train)
    assert "of them in the loss" in tokens.told() and "of them" not in everything.told()


@pytest.mark.parametrize("turns", [True, False])
def test_pairs_learn_the_completion(tokenizer, turns):
    rows = PAIRS
    if turns:
        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in PAIRS
        ]
    found = {_learnt(tokenizer, row) for row in _all(_tokens(tokenizer, _rows("prompt-completion", rows)))}
    assert found == {answer + tokenizer.eos_token for answer in ANSWERS}


def test_what_is_cut_or_left_out_is_counted(tokenizer):
    tokens = _tokens(tokenizer, _rows("prompt-completion", PAIRS), length=15)
    assert max(len(row["input_ids"]) for row in _all(tokens)) == 15
    assert tokens.dropped == {"rows cut to --seq-length (15)": 4}
    with pytest.raises(MoeloraError, match="0 rows are left to train on"):
        _tokens(tokenizer, _rows("prompt-completion", PAIRS), length=8)


def test_texts_of_their_own_rows(tokenizer):
    texts = [{"text": answer} for answer in ANSWERS]
    rows = _all(_tokens(tokenizer, _rows("text", texts), packing="none"))
    assert {_learnt(tokenizer, row) for row in rows} == {answer + tokenizer.eos_token for answer in ANSWERS}


def test_wrapped_texts_fill_every_row(tokenizer):
    texts = [{"text": f"text {i} " * 20} for i in range(12)]
    tokens = _tokens(tokenizer, _rows("text", texts), length=16)
    assert {len(row["input_ids"]) for row in _all(tokens)} == {16}
    lost = sum(len(text["text"].encode()) + 1 for text in texts) - 16 * len(_all(tokens))
    assert tokens.dropped == {"tokens at the ends, which fill no row": lost}
    joined = tokenizer.decode([i for row in tokens.train for i in row["input_ids"]])
    assert joined.count(tokenizer.eos_token) >= 7


def test_packed_rows_hold_whole_texts(tokenizer):
    tokens = _tokens(tokenizer, _rows("prompt-completion", PAIRS * 4), length=64, packing="bfd")
    assert tokens.bordered and "seq_lengths" in tokens.train.column_names
    assert len(tokens.train) < 16 and all(len(row["input_ids"]) <= 64 for row in tokens.train)
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) for row in tokens.train)
    long = [{"text": "x" * 100}, {"text": "y" * 30}, {"text": "z" * 10}]
    split = _tokens(tokenizer, _rows("text", long), length=40, packing="bfd_split", held_out=0.3)
    assert data.count(split.train) + data.count(split.held_out) == 143 and not split.dropped


def test_rows_to_evaluate_on(tokenizer):
    aside = _rows("prompt-completion", PAIRS[:2])
    tokens = _tokens(tokenizer, _rows("prompt-completion", PAIRS), held_out=aside)
    assert (len(tokens.train), len(tokens.held_out)) == (5, 2)


def test_errors_of_templates(tokenizer):
    strict = _rows("chat", [*CHAT, {"messages": [{"role": "assistant", "content": "first"}]}])
    with pytest.raises(MoeloraError, match="does not take row 6 of these rows: users begin"):
        _tokens(tokenizer, strict)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(MoeloraError, match=r"does not tell which tokens are the assistant's .*--loss all"):
        _tokens(tokenizer, _rows("chat", CHAT))
    assert len(_tokens(tokenizer, _rows("chat", CHAT), loss="all").train) == 4
    tokenizer.chat_template = None
    with pytest.raises(MoeloraError, match="has no chat template"):
        _tokens(tokenizer, _rows("chat", CHAT))
    with pytest.raises(MoeloraError, match="--loss answers needs conversations"):
        _tokens(tokenizer, _rows("text", [{"text": "x"}] * 3), loss="answers", packing="none")


# ---- borders


def _sum_of_losses(model, tokenizer, rows: Dataset, bordered: bool) -> float:
    inputs = data.batch(rows, tokenizer, bordered)
    with torch.no_grad():
        loss = model(**inputs, use_cache=False).loss.item()
    return loss * (inputs["labels"][:, 1:] != data.IGNORED).sum().item()


def test_packed_texts_have_the_losses_of_texts_alone(tokenizer):
    model = build("qwen3_moe").eval()
    model.resize_token_embeddings(257)
    rows = _rows("prompt-completion", PAIRS)
    apart = _tokens(tokenizer, rows)
    together = _tokens(tokenizer, rows, packing="bfd", length=128)
    expected = sum(_sum_of_losses(model, tokenizer, rows, False) for rows in (apart.train, apart.held_out))
    found = sum(_sum_of_losses(model, tokenizer, rows, True) for rows in (together.train, together.held_out))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral_gelu"])
def test_models_that_keep_texts_apart(tokenizer, kind):
    packing.check_borders(build(kind), tokenizer)


def _linear_attention() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    config = AutoConfig.for_model("minimax", vocab_size=64, head_dim=16, **sizes, **experts)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model", [lambda: build("gpt_oss"), _linear_attention], ids=["gpt_oss", "linear"])
def test_models_that_do_not(tokenizer, model):
    with pytest.raises(
        MoeloraError, match="does not keep packed texts apart here: its logits for a text change"
    ):
        packing.check_borders(model(), tokenizer)
