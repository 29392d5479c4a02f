"""End to end: whole sampling loops, fastdiff's on its engine, the others on each other runtime.

The others' loop is diffusers': its DDIMScheduler, and guidance as its pipelines write it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor
from tqdm import tqdm

from fastdiff import DDIMSampler
from fastdiff.ops import randn

from . import loops, networks, peers, subjects
from .networks import Row, Runner, bf16, fp32
from .records import FASTDIFF, RATE, Record, Settings, of_race, without_time
from .runtimes import EAGER, PIPELINE
from .subjects import Bare, Subject
from .timing import Contender

SECTION = "end to end"
GUIDANCE = 1.0
FEW = 4  # steps
LEAST_STEPS = 12  # that a figure rests on: short loops run several times
SECONDS = 240.0  # a row runs fewer steps than asked for rather than take longer
SAME_IMAGES = 1e-3  # relative difference in the 2-norm, in fp32


@dataclass(frozen=True)
class Loop(Row):
    """A guided loop on a network; `steps` None: as many as the command line says."""

    steps: int | None = None

    @property
    def about(self) -> dict[str, Any]:
        few = f", {self.steps} steps" if self.steps else ""
        return {**super().about, "section": SECTION, "row": self.title + few}


CIFAR = Loop("CIFAR-10 network, guided", partial(subjects.cifar10, classes=10), 8, fp32)
FASHION = Loop("fashion-mnist, guided", subjects.fashion_mnist, 16, fp32)
ROWS = (
    CIFAR,
    FASHION,
    replace(FASHION, steps=FEW),
    replace(FASHION, dtype=bf16),
    replace(FASHION, dtype=bf16, steps=FEW),
)


def measure(settings: Settings, refused: Mapping[str, str]) -> Iterator[Record]:
    """Loops in turns, a step each."""
    for row in tqdm(ROWS, desc=SECTION, leave=False):
        row = replace(row, batch=min(row.batch, 2)) if settings.quick else row
        title = row.about["row"]
        if "step" in refused:
            yield without_time(SECTION, title, f"refused: wrong ({refused['step']})")
            continue
        try:
            subject, runners, left_out = _ready(row.build, row.batch, row.dtype, settings)
        except FileNotFoundError as error:
            yield without_time(SECTION, title, f"left out: {error}")
            continue
        yield from (without_time(SECTION, title, why, who) for who, why in left_out.items())
        if FASTDIFF in runners:
            yield from _raced(row, subject, runners, settings)


@lru_cache(maxsize=1)
def _ready(
    build: Callable[[], Subject], batch: int, dtype: torch.dtype, settings: Settings
) -> tuple[Subject, dict[str, Runner], dict[str, str]]:
    """The network in every runtime, for the doubled batch of guidance; rows in turn share it."""
    subject = build()
    also = (PIPELINE,) if isinstance(subject.network, UNet2DModel) else ()
    example = subject.example(2 * batch, settings.device)
    return subject, *networks.ready(subject, example, dtype, settings, also)


def _raced(
    row: Loop, subject: Subject, runners: Mapping[str, Runner], settings: Settings
) -> Iterator[Record]:
    assert subject.classes is not None
    shape = (row.batch, *subject.size)
    steps = asked = row.steps or settings.steps
    cost = sum(r.ms for r in runners.values()) / 1e3
    steps = min(asked, max(FEW, int(SECONDS / cost)))
    cut = "" if steps == asked else f", {steps} of {asked} steps"

    x_T = randn(shape, seed=0, device=settings.device)
    cond = torch.arange(row.batch, device=settings.device) % subject.classes
    uncond = torch.full_like(cond, subject.null)
    labels = torch.cat([cond, uncond])

    def guided(runner: Runner, x: Tensor, t: Tensor) -> Tensor:
        out = runner.call(torch.cat([x, x]), t.expand(2 * len(x)), labels)
        return peers.guided(*out.float().chunk(2), GUIDANCE)

    clip = 1.0 if subject.config.get("clip_sample", True) else None
    options: dict[str, Any] = {"prediction": subject.prediction, "clip": clip}
    sampler = DDIMSampler.like("diffusers", subject.schedule, steps, **options)
    ours = runners[FASTDIFF].call
    assert isinstance(ours, Bare)
    times: dict[str, list[float]] = {}
    for _ in range(1 if settings.quick else math.ceil(LEAST_STEPS / steps)):
        others = {
            name: loops.of_diffusers(
                peers.ddim(steps, **subject.config), steps, partial(guided, runner), x_T
            )
            for name, runner in runners.items()
            if name != FASTDIFF
        }
        turns = loops.Turns(others, settings.device)
        with ours.network.register_forward_pre_hook(turns):
            x = sampler.sample(
                ours.network, shape, x_T=x_T, cond=cond, uncond=uncond, guidance=GUIDANCE
            )
        for name, us in turns.steps().items():
            times.setdefault(name, []).extend(us)
    states = {FASTDIFF: x, **turns.states}
    for name, why in (_strays(states) if row.dtype == fp32 else {}).items():
        yield without_time(SECTION, row.about["row"], why, name)
        del times[name]
    if FASTDIFF not in times:
        return
    raced = {
        name: (Contender(name, runners[name].runtime.setting + cut, ()), np.array(us))
        for name, us in times.items()
    }
    yield from of_race(raced, shape=shape, **row.about)
    for name, us in times.items():
        rate = row.batch * 1e6 / (np.mean(us) * asked)
        yield Record(provider=name, metric=RATE, p50=float(rate), shape=shape, **row.about)


def _strays(states: Mapping[str, Tensor]) -> dict[str, str]:
    """Of which loops the images are not those of eager PyTorch, and by how much."""
    wanted = states[EAGER.name]
    apart = {name: float((x - wanted).norm() / wanted.norm()) for name, x in states.items()}
    return {
        name: f"refused: wrong (its images are off by {error:.1e} from {EAGER.name}'s)"
        for name, error in apart.items()
        if not error <= SAME_IMAGES
    }
