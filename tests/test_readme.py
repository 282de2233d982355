"""The README's code runs as it stands, and what it says of targets, switches and files is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks is not installed

from benchmarks import markdown  # noqa: E402

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: next(n for n in ("peft", "scatter_lora") if n in b))
def test_code_runs(block, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^ {4})make ([a-z]+)", (ROOT / document).read_text(), re.MULTILINE))
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / document).read_text()):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("document", ["README.md", "docs/cuda.md"])
def test_tables_are_what_the_result_files_give(document):
    """And none is a block that `--update` does not find."""
    text = (ROOT / document).read_text()
    assert len(markdown.BLOCK.findall(text)) == text.count("<!-- python -m benchmarks.markdown ") > 0
    assert markdown.update(text) == text


def test_every_switch_is_documented():
    sources = [*(ROOT / "torch_moelora").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    switches = {name for path in sources for name in re.findall(r'"(MOELORA_[A-Z_]+)"', path.read_text())}
    assert {"MOELORA_ISA", "MOELORA_BACKEND"} <= switches
    for name in switches:
        assert f"| `{name}" in README, name
