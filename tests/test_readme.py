"""The README's Python runs as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block):
    if "fashion_mnist(" in block and not DEBIAN.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    exec(compile(block, README.name, "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) >= 3
