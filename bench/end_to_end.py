"""End to end: whole sampling loops on real networks, which decide nearly all of the time.

All loops run one network in one dtype and mode, so a ratio tells the loops apart and is near 1 by
nature. Other rows set fastdiff's network beside diffusers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fastdiff import DDIMSampler
from fastdiff.ops import randn

from . import loops, peers, subjects
from .records import FASTDIFF, PLAIN, RATE, Record, Settings, of_race, without_time
from .subjects import Subject
from .timing import Contender, race

SECTION = "end to end"
GUIDANCE = 1.0
SECONDS = 45.0  # a row runs fewer steps than asked for rather than take longer
FEWEST_STEPS = 4
SAME_IMAGES = 1e-3  # relative difference in the 2-norm, in fp32

fp32, bf16 = torch.float32, torch.bfloat16
NAMES = {fp32: "fp32", bf16: "bf16"}


@dataclass(frozen=True)
class Row:
    """A subject at a batch size and dtype; `compile`: torch.compile may be tried on it."""

    name: str
    build: Callable[[], Subject]
    batch: int
    dtype: torch.dtype
    compile: bool = False

    @property
    def about(self) -> dict[str, Any]:
        title = f"{self.name}, batch {self.batch}, {NAMES[self.dtype]}"
        return {"section": SECTION, "row": title, "dtype": NAMES[self.dtype]}


GUIDED, CIFAR = "fashion-mnist, guided", "CIFAR-10 network"
ROWS = (
    Row(GUIDED, subjects.fashion_mnist, 16, fp32, compile=True),
    Row(GUIDED, subjects.fashion_mnist, 16, bf16, compile=True),
    Row(CIFAR, subjects.cifar10, 1, fp32),
    Row(CIFAR, subjects.cifar10, 1, bf16, compile=True),  # elsewhere it gains a percent or none
    Row(CIFAR, subjects.cifar10, 16, fp32),
    Row(CIFAR, subjects.cifar10, 16, bf16),
)


def measure(settings: Settings, refused: Mapping[str, str]) -> Iterator[Record]:
    """Loops in turns, a step each, then the networks alone."""
    most = 2 if settings.quick else max(row.batch for row in ROWS)
    for row in tqdm(ROWS, desc=SECTION, leave=False):
        row = replace(row, batch=min(row.batch, most))
        if "step" in refused:
            yield without_time(SECTION, row.about["row"], f"refused: wrong ({refused['step']})")
            continue
        try:
            subject = row.build()
        except FileNotFoundError as error:
            yield without_time(SECTION, row.about["row"], f"left out: {error}")
            continue
        yield from _loops(row, subject, settings)
        if row.build is subjects.cifar10:
            yield from _alone(row, subject, settings)


def _loops(row: Row, subject: Subject, settings: Settings) -> Iterator[Record]:
    device, dtype, shape = settings.device, row.dtype, (row.batch, *subject.size)
    x_T = randn(shape, seed=0, device=device)
    labels: tuple[Tensor, ...] = ()
    guided: dict[str, Any] = {}
    if subject.classes is not None:
        cond = torch.arange(row.batch, device=device) % subject.classes
        guided = {"cond": cond, "uncond": torch.full_like(cond, -1), "guidance": GUIDANCE}
        labels = (torch.cat([cond, guided["uncond"]]),)
    copies = 1 + len(labels)

    network = subjects.prepared(subject.network, dtype, device)
    t = torch.full((copies * row.batch,), 500, device=device)
    example = (torch.cat([x_T.to(dtype)] * copies), t, *labels)
    how, network, ms = _best_mode(network, example, row.compile and settings.compile, device)
    steps = min(settings.steps, max(FEWEST_STEPS, int(SECONDS * 1e3 / (3 * ms))))

    def model(x: Tensor, t: Tensor) -> Tensor:  # as loops that are not fastdiff's call it
        out = network(torch.cat([x] * copies), t.expand(copies * len(x)), *labels)
        out = getattr(out, "sample", out)
        if not labels:
            return out
        c, u = out.chunk(2)
        return peers.guided(c, u, GUIDANCE)

    clip = 1.0 if subject.config.get("clip_sample", True) else None
    options: dict[str, Any] = {"prediction": subject.prediction, "clip": clip}
    sampler = DDIMSampler.like("diffusers", subject.schedule, steps, **options)
    scheduler = peers.ddim(steps, **subject.config)
    others = {
        peers.EAGER: loops.of_diffusers(scheduler, steps, model, x_T.to(dtype)),
        PLAIN: loops.of_plain(sampler.table, model, x_T, dtype),
    }
    turns = loops.Turns(network, others, device)
    x = sampler.sample(turns, shape, x_T=x_T, **guided)
    times = {provider: np.array(us) for provider, us in turns.steps().items()}
    apart = max(float((s.float() - x).norm() / x.norm()) for s in turns.states.values())
    if dtype == fp32 and not apart <= SAME_IMAGES:
        note = f"refused: wrong (its images are off by {apart:.1e} from another loop's)"
        yield without_time(SECTION, row.about["row"], note)
        return
    if steps < settings.steps:
        how += f", {steps} of {settings.steps} steps"
    yield from _records(row, how, times, shape, settings.steps)


def _records(
    row: Row, how: str, times: dict[str, NDArray[Any]], shape: tuple[int, ...], steps: int
) -> Iterator[Record]:
    """Microseconds a step, and images a second of a whole run."""
    raced = {provider: (Contender(provider, how, ()), us) for provider, us in times.items()}
    yield from of_race(raced, shape=shape, **row.about)
    for provider, us in times.items():
        rate = float(row.batch * 1e6 / (us.mean() * steps))
        yield Record(provider=provider, metric=RATE, p50=rate, shape=shape, **row.about)


def _best_mode(
    network: Any, example: tuple[Tensor, ...], compile: bool, device: str
) -> tuple[str, Any, float]:
    """The faster of eager and compiled: its name, the network in it, and milliseconds a call."""
    modes = {"eager": network}
    if compile:
        modes["compiled"] = torch.compile(network, dynamic=False)
    contenders = [Contender("network", how, (partial(n, *example),)) for how, n in modes.items()]
    best, us = race(contenders, device, 0.0, 1)["network"]
    return best.how, modes[best.how], float(us[0]) / 1e3


def _alone(row: Row, subject: Subject, settings: Settings) -> Iterator[Record]:
    """fastdiff's network and diffusers', of the same layers, both eager."""
    device, shape = settings.device, (row.batch, *subject.size)
    x = torch.randn(shape, device=device).to(row.dtype)
    t = torch.full(shape[:1], 500, device=device)
    networks = {FASTDIFF: subjects.cifar10_of_fastdiff(), peers.EAGER: subject.network}
    contenders = [
        Contender(who, "eager", (partial(subjects.prepared(network, row.dtype, device), x, t),))
        for who, network in networks.items()
    ]
    raced = race(contenders, device, settings.seconds, 3)
    yield from of_race(raced, shape=shape, **replace(row, name=f"{CIFAR} alone").about)
