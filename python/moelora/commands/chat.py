"""`python -m moelora chat`: talk to a model with an adapter."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

import moelora
from moelora import adapter_deltas, checkpoints
from moelora.commands import finite, options
from moelora.errors import MoeloraError, one_line


def main(explicit: dict[str, Any]) -> None:
    """Answers each line of the standard input. MoeloraError tells the user what to mend."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    options.check_text(explicit["system"], "--system")
    model, tokenizer = load(Path(explicit["model_dir"]), explicit.get("adapter"), explicit["dtype"])
    set_seed(explicit["seed"])
    chats = bool(tokenizer.chat_template)
    messages: list[dict[str, str]] = []
    if explicit["system"]:
        messages.append({"role": "system", "content": explicit["system"]})
    kind = "a conversation" if chats else "texts, each by itself, since the tokenizer has no chat template"
    print(f"{kind}: a line is a turn, an empty one ends", file=sys.stderr)
    while line := _line():
        if chats:
            messages.append({"role": "user", "content": line})
            ids = _templated(tokenizer, messages)
        else:
            ids = torch.tensor([tokenizer(line)["input_ids"]])
        answer = _answer(model, tokenizer, ids, explicit)
        messages.append({"role": "assistant", "content": answer})


def load(directory: Path, adapter: str | None, dtype: str) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """A model, with an adapter if one is named, on the operators, and the tokenizer beside the adapter.

    Raises: MoeloraError if either cannot be loaded, or does not belong to the other.
    """
    _, tokenizer = checkpoints.inspect(directory)
    if adapter is None:
        model, _ = checkpoints.load(directory, dtype)
    else:
        if not Path(adapter).is_dir():  # PEFT would look for it on the network
            raise MoeloraError(f"cannot load {adapter} onto {directory}: it is not a directory")
        if not (Path(adapter) / "adapter_model.safetensors").exists():
            raise MoeloraError(f"cannot load {adapter} onto {directory}: it has no adapter_model.safetensors")
        try:
            PeftConfig.from_pretrained(adapter)  # before the base, which may take minutes
            if (Path(adapter) / "tokenizer_config.json").exists():
                tokenizer = AutoTokenizer.from_pretrained(adapter, local_files_only=True)
            base, _ = checkpoints.load(directory, dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of missing tensors, which are told below
                model = PeftModel.from_pretrained(base, adapter)
        except MoeloraError:
            raise
        except Exception as error:  # whatever is in the files
            raise MoeloraError(f"cannot load {adapter} onto {directory}: {one_line(error)}") from None
        adapter_deltas.tensors_of(Path(adapter), model)
    moelora.enable(model)
    checkpoints.check_runs(model, directory)
    return model.eval(), tokenizer


def _line() -> str:
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    try:
        line = sys.stdin.readline().strip()
    except UnicodeDecodeError:
        raise MoeloraError("the standard input is no UTF-8 text") from None
    options.check_text(line, "the standard input")
    return line


class _Finite(LogitsProcessor):
    """Stops where no token can be chosen: sampling raises in words of its own, and the likeliest of NaN is
    some token. Looks through the weights only then, for the one to blame.
    """

    def __init__(self, model: torch.nn.Module, directory: Path) -> None:
        self._model, self._directory = model, directory

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bool((scores.isnan() | scores.isposinf()).any()):
            for name, weight in finite.weights(self._model):
                finite.check_weight(name, weight, self._directory)
            raise MoeloraError("the logits have NaN or Inf, from finite weights: the model overflows")
        return scores


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> torch.Tensor:
    try:
        told = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # a template raises what it likes
        raise MoeloraError(f"the chat template does not take the turns: {one_line(error)}") from None
    return told["input_ids"]


def _answer(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, given: dict[str, Any]
) -> str:
    """What the model says to the tokens [1, n], printed as it comes."""
    ids = ids.to(model.device)
    warm = given["temperature"] > 0
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=given["tokens"],
            do_sample=warm,
            logits_processor=[_Finite(model, Path(given["model_dir"]))],
            **({"temperature": given["temperature"], "top_p": 0.95} if warm else {}),
            pad_token_id=padding,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
