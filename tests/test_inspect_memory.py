"""What `inspect` says that a step takes, beside what `finetune` is seen to take."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_tiny import TEXT
from moelora.__main__ import main
from transformers import Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed

from benchmarks.watch import watch

MOELORA = [sys.executable, "-m", "moelora"]
SIZES = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
}
STEP = ["--target-modules", "q_proj", "v_proj", "--seq-length", "256"]
NF4, SMALL = ["--format", "nf4", "--nested"], ["--optimizer", "adamw_8bit", "--rank", "16"]
CASES = {
    "nf4": (NF4, ["--rank", "4"]),
    "nf4, recomputed, stepped in the backward": (
        NF4,
        [*SMALL, "--gradient-checkpointing", "--step-in-backward"],
    ),
    "mxfp4, 8 bits": (["--format", "mxfp4"], SMALL),
    # Where the adapter, its moments and its gradients are most of it.
    "nf4, rank 64": (NF4, [*SMALL[:2], "--rank", "64", "--gradient-checkpointing", "--step-in-backward"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[pytest.mark.long] * (name != "nf4")) for name in CASES],
)
def test_the_estimate_is_near_the_measured_peak(case, tmp_path):
    """0.2 GB of files and up to 0.6 GB of activations, beside what Python and its libraries take."""
    packed, options = CASES[case]
    Qwen3MoeConfig(vocab_size=257, **SIZES).save_pretrained(tmp_path / "config")
    base, step = tmp_path / "base", [*STEP, *options]
    made = ["synthesize", str(tmp_path / "config"), str(base), *packed]
    assert main([*made, "--threads", "1"]) == 0
    (tmp_path / "text.txt").write_text(TEXT * 3)
    asked = [*MOELORA, "inspect", str(base), *step, "--tokens", "2048", "--no-measure"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert "Warning" not in done.stderr
    told = done.stdout
    estimate = float(re.search(r"memory +([\d.]+) GB at the peak", told).group(1)) * 1e9
    tune = [*MOELORA, "finetune", "--model", str(base), "--data", str(tmp_path / "text.txt"), *step]
    tune += ["--output", str(tmp_path / "out"), "--batch-size", "8", "--steps", "2", "--eval-rows", "1"]
    tune += ["--compare", "0", "--sample", "0", "--threads", "1"]
    seen = watch(tune, period=0.02, stdout=subprocess.DEVNULL)
    assert seen.status == 0
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["losses"]) == 2
    private, mapped = seen.peak()
    assert private + mapped == pytest.approx(estimate, rel=0.1), f"{told}\n{private / 1e9} {mapped / 1e9}"
