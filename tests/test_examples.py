"""The examples' loops run, and the lines that make them faster leave their losses as they were."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fastdiff
from fastdiff.inplace import Fast

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"plain_loop": "diffusers", "accelerate_loop": "accelerate", "lightning_loop": "lightning"}


@pytest.mark.parametrize("name", NEEDS)
def test_the_losses_are_the_originals(name, monkeypatch):
    pytest.importorskip("diffusers")
    pytest.importorskip(NEEDS[name])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module(name)
    kept, patched = [], []

    class Said(module.Said):
        def finish(self):
            kept.append(self.losses)

    pixels = torch.rand(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(module, "Said", Said)
    monkeypatch.setattr(module, "images", lambda batch: DataLoader(TensorDataset(pixels), batch))
    real = fastdiff.patch
    monkeypatch.setattr(fastdiff, "patch", lambda *parts: patched.append(real(*parts)))
    for more in ([], ["--plain"]):
        monkeypatch.setattr(sys, "argv", [name, "--steps", "3", "--batch", "4", *more])
        module.main()
    torch.testing.assert_close(*map(torch.tensor, kept), rtol=1e-4, atol=1e-5)
    assert len(kept[0]) == 3 and len(patched) == 1
    model, _ = patched[0]
    assert isinstance(model, Fast)


@pytest.mark.parametrize("name", NEEDS)
def test_the_change_is_at_most_three_lines(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert 1 <= sum(line.endswith("# fastdiff") for line in lines) <= 3
    ours = [line for line in lines if "fastdiff" in line and not line.endswith("# fastdiff")]
    assert not ours
