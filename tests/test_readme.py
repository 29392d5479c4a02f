"""The README's Python, and the migration page's, runs as printed."""

import re
from pathlib import Path

import pytest
from helpers import needs_data

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


@needs_data
def test_the_page_of_methods_runs(tmp_path, monkeypatch):
    """Its blocks, one after the other, but with next to no training."""
    page = Path(__file__).parents[1] / "docs/methods.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    code, shortened = re.subn(r"^STEPS = \d+", "STEPS = 1", "\n".join(blocks), flags=re.MULTILINE)
    assert len(blocks) == 11 and shortened == 1
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(code, page.name, "exec"), found)
    assert all(found[name].isfinite().all() for name in ("x", "y", "z"))
    assert (found["again"] - found["alike"][1]).square().mean() < 0.01  # of a range of 2
    assert (found["alike"][0] - found["alike"][1]).square().mean() < 0.05


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


def test_every_ratio_that_the_bench_knows_is_printed():
    """On the page of AVX2 alone, all but those in bfloat16."""
    import benches  # noqa: F401, which sets the path

    from bench import readme

    cells, pages = readme.cells(), (readme.README.read_text(), readme.AVX2.read_text())
    ours, avx2 = ([cell.ratio(page) for cell in cells] for page in pages)
    assert len(cells) > 50 and all(ratio and ratio > 1 for ratio in ours)
    lacking = {cell.row for cell, ratio in zip(cells, avx2, strict=True) if ratio is None}
    assert lacking == {cell.row for cell in cells if "bf16" in cell.row}


def test_a_ratio_below_the_readme_is_told():
    import benches  # noqa: F401, which sets the path

    from bench import readme
    from bench.records import Record

    cell, page = readme.cells()[0], readme.README
    printed = cell.ratio(page.read_text())

    def measured(ratio):
        return Record(cell.section, cell.row, cell.provider, "", 1.0, ratio=ratio)

    said = readme.fallen([measured(0.9 * printed)], [cell.section], page)
    assert any(f"README.md says {printed:g} x {cell.provider}, now" in line for line in said)
    rest = readme.fallen([measured(0.99 * printed)], [cell.section], page)
    assert len(rest) == len(said) - 1 and all("not measured" in line for line in rest)
