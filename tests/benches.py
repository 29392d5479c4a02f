"""What the tests of the benchmark share: it on the path, its clock in hand, a tiny network."""

import sys
from pathlib import Path

import pytest
import torch

from fastdiff import NoiseSchedule, UNet, UNetConfig

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # the benchmark is not a part of the installed package

from bench import networks, subjects  # noqa: E402
from bench.records import Settings  # noqa: E402
from bench.timing import Contender  # noqa: E402

QUICK = Settings(quick=True)


class Clock:
    """A clock that only `spend` moves, in place of the time module of bench.timing."""

    def __init__(self):
        self.ns = 0

    def spend(self, us):
        self.ns += round(1e3 * us)

    def perf_counter_ns(self):
        return self.ns

    def perf_counter(self):
        return self.ns / 1e9

    def contender(self, provider, us, how=""):
        return Contender(provider, how, (lambda: self.spend(us),))


def tiny():
    config = UNetConfig(
        image_size=8, in_channels=1, channels=32, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(8,), norm_groups=8, num_classes=3,
    )  # fmt: skip
    model = UNet(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    schedule = NoiseSchedule.cosine(1000)
    described = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    return subjects.Subject(model, (1, 8, 8), schedule, "v", described, classes=3)


def row(dtype=torch.float32):
    return networks.Row("tiny", tiny, 2, dtype)
