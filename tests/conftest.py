"""Fixtures that several files use."""

import os

os.environ.setdefault("FASTDIFF_CACHE", "off")  # of the user's; and every test measures

import pytest
import torch
from pretended import pretended_gpu  # noqa: F401


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same numbers whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def clock(monkeypatch):
    """A clock of one's own in place of the benchmark's."""
    from benches import Clock

    from bench import timing

    monkeypatch.setattr(timing, "time", clock := Clock())
    return clock


@pytest.fixture
def two_runtimes(monkeypatch):
    """Without OpenVINO and the like, which take seconds to prepare even a tiny network."""
    import benches  # noqa: F401, which sets the path

    from bench import end_to_end, runtimes
    from bench.records import FASTDIFF

    chosen = [r for r in runtimes.RUNTIMES if r.name in (runtimes.EAGER.name, FASTDIFF)]
    monkeypatch.setattr(runtimes, "RUNTIMES", chosen)
    end_to_end._ready.cache_clear()
