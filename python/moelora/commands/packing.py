"""Whether a model keeps the texts of one row apart."""

from __future__ import annotations

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from moelora.commands import data
from moelora.commands.reloading import TOLERANCE
from moelora.errors import MoeloraError, one_line

_FIRST, _SECOND = 9, 7  # tokens


def check_borders(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compares the logits of a text behind another one in a row with those of the text alone.

    Attention may tell texts apart by their positions or by their lengths, some implementations by neither,
    and linear attention by an optional kernel: nothing but the logits tells.

    Raises: MoeloraError if they differ by more than rounding, or if the model refuses.
    """
    generator = torch.Generator().manual_seed(0)
    limit = min(len(tokenizer), model.config.get_text_config().vocab_size)
    ids = torch.randint(limit, (_FIRST + _SECOND,), generator=generator).tolist()
    row = {"input_ids": ids, "labels": ids, "seq_lengths": [_FIRST, _SECOND]}
    packed = data.batch(Dataset.from_list([row]), tokenizer, True, model.device)
    del packed["labels"]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            behind = model(**packed, use_cache=False).logits[0, _FIRST:].double()
            alone = torch.tensor([ids[_FIRST:]], device=model.device)
            expected = model(input_ids=alone, use_cache=False).logits[0].double()
    except (ValueError, RuntimeError, TypeError) as error:
        raise MoeloraError(
            f"this model cannot keep packed texts apart here: {one_line(error)}. --packing none and "
            "wrapped do not need it"
        ) from None
    finally:
        model.train(training)
    difference = ((behind - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
    if not difference <= TOLERANCE[model.dtype]:
        raise MoeloraError(
            "this model does not keep packed texts apart here: its logits for a text change by "
            f"{difference:.0%} with the text before it. --packing none and wrapped do not need it"
        )
