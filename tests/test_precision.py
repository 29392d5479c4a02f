"""bfloat16 is for machines that compute in it."""

import pytest
import torch

from fastdiff import precision


@pytest.mark.parametrize("pays", [False, True])
def test_autocast_is_for_where_it_pays(monkeypatch, pays):
    monkeypatch.setattr(precision, "bfloat16_pays", lambda device: pays)
    x = torch.randn(4, 4)
    with precision.autocast("cpu", True):
        assert (x @ x).dtype == (torch.bfloat16 if pays else torch.float32)
    with precision.autocast("cpu", False):
        assert (x @ x).dtype == torch.float32


def test_it_pays_on_gpus():
    assert precision.bfloat16_pays("cuda:1")
