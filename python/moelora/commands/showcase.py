"""What a run shows at its end: a sampled text, a race with transformers + PEFT, a reload by plain PEFT."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

import moelora
from moelora.errors import MoeloraError

# Relative difference of logits, by the base's dtype: PEFT rounds W + scaling·B·A to it, the operators do not.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
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
    cannot run the model (some sizes and dtypes), the result only says so.
    """
    ours, theirs = [], []
    model.train()
    started = time.perf_counter()
    while len(ours) <= pairs and (len(ours) < 2 or time.perf_counter() - started < RACE_SECONDS):
        ours.append(_step(model, inputs))
        moelora.disable(model)
        try:
            theirs.append(_step(model, inputs))
        except RuntimeError as error:
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


def reload(model: PeftModel, adapter: Path, rows: Tensor) -> float:
    """Relative difference of the logits on `rows` between `model` and its base with `adapter` in plain PEFT.

    The median over tokens: in half precision, rounding sends a few tokens to other experts. The tuned adapter
    is unloaded first, so that a large base is not in memory twice; `model` is used up.

    Raises: MoeloraError if the logits differ by more than rounding, or the adapter's tensors at all.
    """
    model.eval()
    rows = rows.to(model.device)
    with torch.no_grad():
        tuned = model(input_ids=rows).logits.double()
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    moelora.disable(model)
    base = model.unload()
    base.set_experts_implementation("eager")  # the one that runs whatever the sizes and the dtype
    plain = PeftModel.from_pretrained(base, adapter).eval()
    for name, tensor in get_peft_model_state_dict(plain).items():
        if name not in tensors or not torch.equal(tensor, tensors.pop(name)):
            raise MoeloraError(f"{adapter} reloaded with plain PEFT has another {name} than the one trained")
    if tensors:
        raise MoeloraError(f"{adapter} reloaded with plain PEFT lacks {next(iter(tensors))}")
    with torch.no_grad():
        reloaded = plain(input_ids=rows).logits.double()
    difference = ((tuned - reloaded).norm(dim=-1) / reloaded.norm(dim=-1)).median().item()
    allowed = TOLERANCE[plain.dtype]
    if not difference <= allowed:
        raise MoeloraError(
            f"{adapter} reloaded with plain PEFT gives other logits: relative difference {difference:.1e}, "
            f"expected at most {allowed:.0e}"
        )
    return difference
