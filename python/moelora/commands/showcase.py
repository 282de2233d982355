"""What a run shows at its end: a sampled text, a race with transformers + PEFT, a reload by plain PEFT."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

import moelora
from moelora.errors import MoeloraError
from moelora.standin import installed

RACE_SECONDS = 60.0


def sample(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: Tensor, tokens: int, seed: int
) -> str:
    """A continuation of `prompt` [n] int64, sampled with `seed`, as text."""
    set_seed(seed)
    model.eval()
    prompt = prompt.to(model.device).unsqueeze(0)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            pad_token_id=padding,
        )
    return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


def race(model: PeftModel, inputs: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Median seconds of a forward and backward on a batch, in turn with the operators and without.

    Leaves the model enabled and without gradients. Stops early once a minute is over. Where transformers
    cannot run the model (some sizes and dtypes, packed experts), the result only says so.
    """
    if any(installed(model)):  # known without a step, which takes a minute where it matters
        return {"error": "its experts are packed, and nothing but the operators computes with them"}
    ours, theirs = [], []
    model.train()
    started = time.perf_counter()
    while len(ours) <= pairs and (len(ours) < 2 or time.perf_counter() - started < RACE_SECONDS):
        ours.append(_step(model, inputs))
        moelora.disable(model)
        try:
            theirs.append(_step(model, inputs))
        except (RuntimeError, MoeloraError) as error:
            return {"error": str(error).splitlines()[0]}
        finally:
            moelora.enable(model)
    ours, theirs = ours[1:], theirs[1:]  # the first of each warms up
    medians = statistics.median(ours), statistics.median(theirs)
    return {
        "tokens": inputs["input_ids"].numel(),
        "pairs": len(ours),
        "operators_seconds": medians[0],
        "transformers_peft_seconds": medians[1],
        "speedup": medians[1] / medians[0],
    }


def _step(model: PeftModel, inputs: dict[str, Any]) -> float:
    started = time.perf_counter()
    model(**inputs).loss.backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    spent = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return spent
