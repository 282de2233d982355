"""docs/formats.md: its code runs, and its table is what the kernels have."""

import re
import subprocess
import sys
from pathlib import Path

from torch_moelora import support
from torch_moelora.formats import FORMATS

DOCUMENT = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
BLOCK = re.search(r"<!-- python -m torch_moelora formats -->\n(.*?)\n<!-- end -->", DOCUMENT, re.DOTALL)
PACKED = [name for name, row in FORMATS.items() if row.bits is not None]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_code_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_matrix_is_what_the_kernels_have():
    """In the columns of the instruction sets that this machine has."""
    written, now = cells(BLOCK.group(1)), cells(support.matrix())
    at = [written[0].index(name) for name in now[0]]
    assert [[line[i] for i in at] for line in written] == now, "python -m torch_moelora formats"
    assert [line[0].strip("`") for line in written[2:]] == PACKED


def test_every_set_unpacks_every_format():
    found = support.columns()
    assert {"portable", support.CUDA} <= set(found)
    for of in found.values():
        assert list(of) == PACKED and all("bf16" in dtypes for dtypes in of.values())


def test_layouts_name_every_format():
    layouts = DOCUMENT[DOCUMENT.index("| format | code of") : DOCUMENT.index("Nested (")]
    assert set(re.findall(r"`([a-z]+\d)`", layouts)) == set(PACKED)
