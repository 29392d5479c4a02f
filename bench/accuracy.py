"""What a bfloat16 model costs in accuracy, and what a bfloat16 state would.

Data N(mu, s^2), of which the perfect eps is known: eps = sigma (x - alpha mu) / (alpha^2 s^2 +
sigma^2). DDIM's limit of many steps carries x_T to mu + s (x_T - alpha_T mu) / sqrt(alpha_T^2 s^2
+ sigma_T^2), the flow of its ODE (Song et al. 2021, equation 14).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import DDIMSampler, NoiseSchedule
from fastdiff.ops import randn

from . import loops, peers
from .records import FASTDIFF, PLAIN, Record, Settings, without_time

SECTION, ROW = "accuracy", "bf16 model, 1000 DDIM steps"
MU, S = 0.3, 0.5
STEPS, SHAPE = 1000, (16, 3, 32, 32)


class Gaussian(nn.Module):
    """The perfect eps of N(MU, S^2) at bfloat16 x, itself rounded to bfloat16: a bf16 network."""

    def __init__(self, schedule: NoiseSchedule, device: str) -> None:
        super().__init__()
        self.dtype_of_it = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16, device=device))
        self.alpha, self.sigma = (
            torch.tensor(level, device=device) for level in (schedule.alpha, schedule.sigma)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        now = t.flatten()[:1].to(x.device)  # as an index, a number would be read back from a GPU
        shape = (1,) * x.dim()
        alpha, sigma = (level[now].reshape(shape) for level in (self.alpha, self.sigma))
        eps = sigma * (x.double() - alpha * MU) / (alpha**2 * S**2 + sigma**2)
        return eps.bfloat16()


def measure(settings: Settings, refused: Mapping[str, str]) -> Iterator[Record]:
    """The relative error of the result in the 2-norm, by who keeps which state."""
    if "step" in refused:
        yield without_time(SECTION, ROW, f"refused: wrong ({refused['step']})")
        return
    schedule = NoiseSchedule.linear(STEPS)
    model = Gaussian(schedule, settings.device)
    x_T = randn(SHAPE, seed=0, device=settings.device)
    sampler = DDIMSampler(schedule, steps=STEPS)
    alpha, sigma = schedule.alpha[-1], schedule.sigma[-1]
    true = MU + S * (x_T.double() - alpha * MU) / (alpha**2 * S**2 + sigma**2) ** 0.5

    low = x_T.bfloat16()
    theirs = loops.of_diffusers(peers.ddim(STEPS, clip_sample=False), STEPS, model, low)
    for i, t in enumerate(sampler.timesteps.tolist()):
        low = sampler.step(model(low, torch.tensor(t)), i, low.float()).bfloat16()
    found = {
        (FASTDIFF, "fp32 state"): sampler.sample(model, SHAPE, x_T=x_T),
        (PLAIN, "bf16 state"): low,
        (peers.EAGER, "bf16 state"): deque(theirs, maxlen=1)[0],
    }
    errors = {
        who: float((state.double() - true).norm() / true.norm()) for who, state in found.items()
    }
    about: dict[str, Any] = {"shape": SHAPE, "dtype": "bfloat16"}
    for (provider, how), error in errors.items():
        ratio = error / errors[FASTDIFF, "fp32 state"]
        yield Record(SECTION, ROW, provider, "error", error, ratio=ratio, how=how, **about)
