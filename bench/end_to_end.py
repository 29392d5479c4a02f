"""End to end: whole sampling loops, fastdiff's optimized, the others on each other runtime.

The others' loop is diffusers': its DDIMScheduler, and guidance as its pipelines write it.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff import DDIMSampler
from fastdiff.ops import randn

from . import loops, networks, peers, subjects
from .networks import Row, Runner, bf16, fp32
from .records import FASTDIFF, PLAIN, RATE, Record, Settings, in_dtype, of_race, without_time
from .runtimes import EAGER, PIPELINE
from .subjects import Bare, Subject
from .timing import Contender, race

SECTION = "end to end"
GUIDANCE = 1.0
FEW = 4  # steps
LEAST_STEPS = 12  # that a figure rests on: short loops run several times
SECONDS = 240.0  # a row runs fewer steps than asked for rather than take longer
# two loops' images may differ, relatively and in the 2-norm, by the first, and by the second times
# the error that the dtype (on GPUs, TF32 too) makes in one call of the network
SAME_IMAGES, TIMES_THE_NETWORKS = 1e-3, 10
COMPILED = "each step compiled whole, CUDA graphs, channels-last"


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
MORE_ON_GPUS = (replace(CIFAR, batch=64, dtype=bf16),)


def measure(settings: Settings, refused: Mapping[str, str]) -> Iterator[Record]:
    """Loops in turns: on the CPU a step each."""
    rows = ROWS + MORE_ON_GPUS if settings.device == "cuda" else ROWS
    for row in tqdm(rows, desc=SECTION, leave=False):
        row = replace(row, batch=min(row.batch, 2)) if settings.quick else row
        title = row.about["row"]
        if "step" in refused:
            yield without_time(SECTION, title, f"refused: wrong ({refused['step']})")
        else:
            yield from in_dtype(
                SECTION, title, row.dtype, settings.device, _measured(row, settings)
            )


def _measured(row: Loop, settings: Settings) -> Iterator[Record]:
    title = row.about["row"]
    try:
        subject, runners, left_out = _ready(row.build, row.batch, row.dtype, settings)
    except FileNotFoundError as error:
        yield without_time(SECTION, title, f"left out: {error}")
        return
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
    asked = row.steps or settings.steps
    cost = sum(r.ms for r in runners.values()) / 1e3
    steps = min(asked, max(FEW, int(SECONDS / cost)))
    cut = "" if steps == asked else f", {steps} of {asked} steps"
    loops_of = Loops(row, subject, runners, steps, settings)
    times, states = (loops_of.whole if settings.device == "cuda" else loops_of.in_step)()
    for name, note in loops_of.notes.items():
        yield without_time(SECTION, row.about["row"], note, name)
    error = runners[EAGER.name].error
    for name, why in _strays(states, SAME_IMAGES + TIMES_THE_NETWORKS * error).items():
        yield without_time(SECTION, row.about["row"], why, name)
        del times[name]
    if FASTDIFF not in times:
        return
    hows = {name: runner.runtime.setting for name, runner in runners.items()} | {PLAIN: COMPILED}
    shape = loops_of.shape
    raced = {name: (Contender(name, hows[name] + cut, ()), us) for name, us in times.items()}
    yield from of_race(raced, shape=shape, **row.about)
    for name, us in times.items():
        rate = row.batch * 1e6 / (np.mean(us) * asked)
        yield Record(provider=name, metric=RATE, p50=float(rate), shape=shape, **row.about)


class Loops:
    """A row's loops. Both ways to run them return each provider's microseconds a step, and where
    it ended; `notes` says of those that failed, or went without a graph, why."""

    def __init__(
        self,
        row: Loop,
        subject: Subject,
        runners: Mapping[str, Runner],
        steps: int,
        settings: Settings,
    ) -> None:
        assert subject.classes is not None
        self.subject, self.runners, self.steps, self.settings = subject, runners, steps, settings
        self.notes: dict[str, str] = {}
        self.shape, self.dtype = (row.batch, *subject.size), row.dtype
        self.x_T = randn(self.shape, seed=0, device=settings.device)
        self.cond = torch.arange(row.batch, device=settings.device) % subject.classes
        self.uncond = torch.full_like(self.cond, subject.null)
        self.labels = torch.cat([self.cond, self.uncond])
        clip = 1.0 if subject.config.get("clip_sample", True) else None
        options: dict[str, Any] = {"prediction": subject.prediction, "clip": clip}
        self.sampler = DDIMSampler.like("diffusers", subject.schedule, steps, **options)

    def in_step(self) -> tuple[dict[str, NDArray[np.float64]], dict[str, Tensor]]:
        """All loops take turns step by step: whatever happens to the machine, they share."""
        times: dict[str, list[float]] = {}
        for _ in range(1 if self.settings.quick else math.ceil(LEAST_STEPS / self.steps)):
            others = {name: self._theirs(name) for name in self.runners if name != FASTDIFF}
            turns = loops.Turns(others, self.settings.device)
            with self._network().register_forward_pre_hook(turns):
                x = self._ours()
            for name, us in turns.steps().items():
                times.setdefault(name, []).extend(us)
        return {n: np.array(us) for n, us in times.items()}, {FASTDIFF: x, **turns.states}

    def whole(self) -> tuple[dict[str, NDArray[np.float64]], dict[str, Tensor]]:
        """Loop after loop: one that is a CUDA graph calls no network in between."""
        others: dict[str, Callable[[], loops.Loop]] = {
            name: partial(self._theirs, name) for name in self.runners if name != FASTDIFF
        }
        if self.settings.compile:
            others[PLAIN] = self._compiled()
        runs: dict[str, Callable[[], Tensor]] = {FASTDIFF: self._ours}
        for name, loop in others.items():
            runs[name] = partial(_last, loop)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            states = {FASTDIFF: runs[FASTDIFF]().clone()}
        for warning in caught:
            if "CUDA graph" in str(warning.message):
                self.notes[FASTDIFF] = f"ran without CUDA graphs: {warning.message}"
        for name in others:
            try:
                states[name] = runs[name]().clone()
            except Exception as error:  # a peer that cannot run here is told, not fatal
                self.notes[name] = f"left out: {type(error).__name__}: {error}".splitlines()[0]
        contenders = [Contender(name, "", (runs[name],)) for name in states]
        settings = self.settings
        raced = race(contenders, settings.device, settings.seconds, settings.rounds)
        return {name: us / self.steps for name, (_, us) in raced.items()}, states

    def _network(self) -> nn.Module:
        call = self.runners[FASTDIFF].call
        assert isinstance(call, Bare)
        return call.network

    def _ours(self) -> Tensor:
        return self.sampler.sample(
            self._network(), self.shape, x_T=self.x_T, cond=self.cond, uncond=self.uncond,
            guidance=GUIDANCE,
        )  # fmt: skip

    def _theirs(self, name: str) -> loops.Loop:
        def guided(x: Tensor, t: Tensor) -> Tensor:
            labels = self.labels
            out = self.runners[name].call(torch.cat([x, x]), t.expand(2 * len(x)), labels)
            return peers.guided(*out.float().chunk(2), GUIDANCE)

        scheduler = peers.ddim(self.steps, **self.subject.config)
        return loops.of_diffusers(scheduler, self.steps, guided, self.x_T)

    def _compiled(self) -> Callable[[], loops.Loop]:
        network = copy.deepcopy(self.subject.network)
        bare = Bare(subjects.prepared(network, self.dtype, self.settings.device))
        step = loops.compiled_step(bare, self.labels, self.dtype)
        table = self.sampler.table.with_guidance(GUIDANCE)
        return partial(loops.of_compiled, step, table, self.x_T)


def _last(loop: Callable[[], loops.Loop]) -> Tensor:
    return deque(loop(), maxlen=1)[0]


def _strays(states: Mapping[str, Tensor], allowed: float) -> dict[str, str]:
    """Of which loops the images are not those of eager PyTorch, and by how much."""
    wanted = states[EAGER.name]
    apart = {name: float((x - wanted).norm() / wanted.norm()) for name, x in states.items()}
    return {
        name: f"refused: wrong (its images are off by {error:.1e} from {EAGER.name}'s)"
        for name, error in apart.items()
        if not error <= allowed
    }
