"""What other projects packed, saved in our own layout, tuned and merged."""

from __future__ import annotations

import moelora
import pytest
import torch
from model_tiny import one_thread  # noqa: F401  (autouse)
from moelora.__main__ import main
from packed_models import adapted, checkpoints  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("layout", ["awq"])
def test_merged_by_way_of_our_layout(layout, checkpoints, tmp_path, capsys):  # noqa: F811
    """The line that refuses it says how, and plain transformers computes what was tuned."""
    there, saved, adapter, out = (checkpoints(layout), *(tmp_path / n for n in ("saved", "adapter", "out")))
    tuned = adapted(there.model(dtype=torch.float32))
    moelora.enable(tuned)
    tuned.save_pretrained(adapter)
    assert main(["merge", str(there.packed), str(adapter), str(out)]) == 2
    assert "moelora.from_pretrained(DIR).save_pretrained(OUT) writes" in capsys.readouterr().err
    there.model().save_pretrained(saved)
    assert main(["merge", str(saved), str(adapter), str(out), "--format", "float32"]) == 0
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        expected = tuned(input_ids=tokens).logits
        found = AutoModelForCausalLM.from_pretrained(out)(tokens).logits
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert main(["merge", str(saved), str(adapter), str(tmp_path / "same")]) == 0
