"""A GPU that is this CPU: tensors asked for on "cuda" come on the CPU, and torch.cuda answers.

It shows that the benchmark's code for GPUs runs, with real tensors; no more than that.
"""

import time
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastdiff import op

PROPERTIES = SimpleNamespace(
    name="Pretended", major=9, minor=0, total_memory=2**33, L2_cache_size=50_000_000,
    memory_clock_rate=1_000_000, memory_bus_width=1024,
)  # fmt: skip


class OnThisCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = {name: _here(value) for name, value in (kwargs or {}).items()}
        return func(*map(_here, args), **given)


def _here(value):
    named = isinstance(value, (str, torch.device)) and str(value).split(":")[0] == "cuda"
    return "cpu" if named else value


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def triton_alone(monkeypatch):
    """Of the backends for GPUs; the CPU keeps its own, for its launchers outlive the test."""
    usable = {"triton": True, "cuda": False, "cpp": op._usable("cpp")}
    monkeypatch.setattr(op, "_usable", usable.get)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """What the GPU was asked to wait, in its clock's cycles."""
    slept = []
    answers = {
        "is_available": lambda: True, "device_count": lambda: 1, "_sleep": slept.append,
        "synchronize": lambda device=None: None, "get_device_properties": lambda i=0: PROPERTIES,
        "empty_cache": lambda: None, "Event": Event,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    triton_alone(monkeypatch)
    with OnThisCpu():
        yield slept
