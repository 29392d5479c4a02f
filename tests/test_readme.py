"""The README's Python, and the migration page's, runs as printed."""

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


def test_the_migration_page_runs():
    """Its blocks, one after the other."""
    pytest.importorskip("diffusers")
    page = Path(__file__).parents[1] / "docs/migration.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 5
    exec(compile("\n".join(blocks), page.name, "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) >= 3
