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
STEP = ["--rank", "4", "--target-modules", "q_proj", "v_proj", "--seq-length", "256"]


@pytest.mark.slow
def test_the_estimate_is_near_the_measured_peak(tmp_path):
    """0.2 GB of files and 0.6 GB of activations, beside what Python and its libraries take."""
    Qwen3MoeConfig(vocab_size=257, **SIZES).save_pretrained(tmp_path / "config")
    base = tmp_path / "base"
    made = ["synthesize", str(tmp_path / "config"), str(base), "--format", "nf4", "--nested"]
    assert main([*made, "--threads", "1"]) == 0
    (tmp_path / "text.txt").write_text(TEXT * 3)
    asked = [*MOELORA, "inspect", str(base), *STEP, "--tokens", "2048", "--no-measure"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert "Warning" not in done.stderr
    told = done.stdout
    estimate = float(re.search(r"memory +([\d.]+) GB at the peak", told).group(1)) * 1e9
    tune = [*MOELORA, "finetune", "--model", str(base), "--data", str(tmp_path / "text.txt"), *STEP]
    tune += ["--output", str(tmp_path / "out"), "--batch-size", "8", "--steps", "2", "--eval-rows", "1"]
    tune += ["--compare", "0", "--sample", "0", "--threads", "1"]
    seen = watch(tune, period=0.02, stdout=subprocess.DEVNULL)
    assert seen.status == 0
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["losses"]) == 2
    assert sum(seen.peak()) == pytest.approx(estimate, rel=0.1), told
