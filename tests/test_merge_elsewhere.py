"""What other projects packed, saved in our own layout, tuned and merged."""

from __future__ import annotations

from pathlib import Path

import moelora
import pytest
import torch
from model_tiny import one_thread  # noqa: F401  (autouse)
from moelora import weights
from moelora.__main__ import main
from moelora.layouts import Files
from packed_files import TABLE
from packed_models import adapted, checkpoints, experts  # noqa: F401  (checkpoints: a fixture)
from transformers import AutoModelForCausalLM, PreTrainedModel

ROUNDING = 0.2  # of random codes that are packed anew, relative to all of a weight
# Of the others `merge` reads the files as they are.
APART = [layout.name for layout in TABLE if not layout.stacked]


@pytest.mark.parametrize("layout", APART)
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
    merged = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        expected = tuned(input_ids=tokens).logits
        found = merged(tokens).logits
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert main(["merge", str(saved), str(adapter), str(tmp_path / "same")]) == 0
    _near(tmp_path / "same", saved, merged)


@pytest.mark.parametrize("form", ["same", "bfloat16", "float32", "int8"])
def test_gpt_oss_as_it_is_published(form, checkpoints, tmp_path):  # noqa: F811
    """The same bytes as from the same codes in our layout."""
    there, adapter, saved = checkpoints("gpt-oss mxfp4"), tmp_path / "adapter", tmp_path / "saved"
    tuned = adapted(there.model())
    moelora.enable(tuned)
    tuned.save_pretrained(adapter)
    there.model().save_pretrained(saved)
    found = {}
    for base in (there.packed, saved):
        out = tmp_path / f"{base.name}-out"
        assert main(["merge", str(base), str(adapter), str(out), "--format", form]) == 0
        files = Files(sorted(out.glob("*.safetensors")))
        found[base] = {name: files[name] for name in files.names}
    mine, other = found.values()
    assert mine.keys() == other.keys() and any("experts" in name for name in mine)
    assert all(mine[name].dtype == t.dtype and torch.equal(mine[name], t) for name, t in other.items())
    untouched = Files(saved.glob("*.safetensors"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    if form == "same":
        assert not torch.equal(mine[f"{name}.codes"], untouched[f"{name}.codes"])
    again = moelora.from_pretrained(tmp_path / "packed-out")
    assert again(torch.arange(8)[None]).logits.isfinite().all()


def _near(same: Path, saved: Path, merged: PreTrainedModel) -> None:
    """Packed again it is what was merged, but for rounding; what has no adapter has its very codes."""
    again, before = (moelora.from_pretrained(path, dtype=torch.float32) for path in (same, saved))
    for module, other, base in zip(experts(again), experts(merged), experts(before), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            packed, dense = weights.weight_of(module, name), getattr(other, name)
            assert packed.format == weights.weight_of(base, name).format
            error = (packed.dequantize(torch.float32) - dense).norm() / dense.norm()
            assert error < ROUNDING, (name, error)
    there, here = (Files(path.glob("*.safetensors")) for path in (same, saved))
    frozen = [name for name in here.names if ".o_proj." in name]
    assert len(frozen) > 2 and all(torch.equal(there[name], here[name]) for name in frozen)
