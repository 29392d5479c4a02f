"""One forward of a network: fastdiff's engine against every other runtime.

A contender is first held to a float64 run: its error, in the 2-norm, is at most a few times what
eager PyTorch's is in the same dtype. A peer that rounds more is timed all the same, with a note, so
that no rival is left out for it. A row of times has two companions, of error and of memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fastdiff.engine import Engine

from . import memory, runtimes, subjects
from .records import CONVOLUTION, FASTDIFF, OWN, Record, Settings, in_dtype, of_race, without_time
from .runtimes import EAGER, Call, Runtime, bf16, fp32
from .subjects import Bare, Subject
from .timing import Contender, now, race

SECTION = "networks"
ROUNDS = 5
ROUGH = 0.2  # the error to which a peer is the network at all, only rounded
NAMES = {fp32: "fp32", bf16: "bf16"}


@dataclass(frozen=True)
class Row:
    """A subject at a batch size and dtype; `compile`: whether peers may take minutes to compile."""

    name: str
    build: Callable[[], Subject]
    batch: int
    dtype: torch.dtype
    compile: bool = True

    @property
    def title(self) -> str:
        return f"{self.name}, batch {self.batch}, {NAMES[self.dtype]}"

    @property
    def about(self) -> dict[str, Any]:
        return {"section": SECTION, "row": self.title, "dtype": NAMES[self.dtype]}


CIFAR = partial(Row, "CIFAR-10 network", subjects.cifar10)
ROWS = tuple(CIFAR(batch, dtype) for batch in (16, 1) for dtype in (fp32, bf16))
STABLE_DIFFUSION = Row("Stable Diffusion 1.5 network", subjects.stable_diffusion, 2, bf16, False)
MORE_ON_GPUS = (CIFAR(64, bf16), Row("ADM-64 network", partial(subjects.adm, 64), 16, bf16))


@dataclass(frozen=True)
class Runner:
    """A network, prepared. `error` is against float64, `ms` what a call took once, `mb` what it
    added to the memory of this process: the peak of that call. `held`: what it says of this.
    `rough`: of a peer, that it rounds more than is allowed.
    """

    runtime: Runtime
    call: Call
    error: float
    ms: float
    mb: float | None
    held: str = ""
    rough: str = ""


def measure(settings: Settings, refused: Mapping[str, str]) -> Iterator[Record]:
    """Each network in turns: its time, error and memory, by contender."""
    rows = ROWS + MORE_ON_GPUS if settings.device == "cuda" else ROWS
    if not settings.quick:
        rows += (STABLE_DIFFUSION,)
    for row in tqdm(rows, desc=SECTION, leave=False):
        row = replace(row, batch=min(row.batch, 2)) if settings.quick else row
        yield from in_dtype(
            SECTION, row.title, row.dtype, settings.device, _measured(row, settings)
        )


def _measured(row: Row, settings: Settings) -> Iterator[Record]:
    subject = row.build()
    example = subject.example(row.batch, settings.device)
    runners, left_out = ready(subject, example, row.dtype, settings, compile=row.compile)
    yield from (without_time(SECTION, row.title, why, who) for who, why in left_out.items())
    if FASTDIFF in runners:
        yield from _times(row, subject, example, runners, settings)
        yield from _companions(row, runners)


def ready(
    subject: Subject,
    example: tuple[Tensor, ...],
    dtype: torch.dtype,
    settings: Settings,
    also: tuple[Runtime, ...] = (),
    compile: bool = True,
) -> tuple[dict[str, Runner], dict[str, str]]:
    """The runtimes that compute the network rightly, and why others are left out."""
    torch._dynamo.reset()  # else it gives up at the eighth network that runs the same code
    double = Bare(copy.deepcopy(subject.network)).to(settings.device).double()
    with torch.no_grad():
        truth = double(*(a.double() if a.is_floating_point() else a for a in example))
    del double
    runners: dict[str, Runner] = {}
    left_out: dict[str, str] = {}
    for runtime in (*runtimes.RUNTIMES, *also):
        if runtime.compiles and not (compile and settings.compile):
            continue
        if settings.device not in runtime.devices:
            if settings.device == "cuda":
                left_out[runtime.name] = "left out: runs on the CPU alone here"
            continue
        if not runtime.takes(subject.network, dtype):
            continue
        if not runtime.installed:
            left_out[runtime.name] = "not installed: pip install 'fastdiff[bench]'"
            continue
        try:
            runner = _prepared(runtime, subject.network, example, dtype, truth)
        except Exception as error:  # a peer that cannot run here is told, not fatal
            left_out[runtime.name] = f"left out: {type(error).__name__}: {error}".splitlines()[0]
            continue
        allowed = runtime.allowed * runners.get(EAGER.name, runner).error
        off = f"error {runner.error:.1e}, allowed {allowed:.1e}"
        if runner.error <= allowed:
            runners[runtime.name] = runner
        elif runtime.name != FASTDIFF and runner.error <= ROUGH:
            runner = replace(runner, rough=f"is timed, though it rounds more ({off})")
            runners[runtime.name] = runner
        else:
            left_out[runtime.name] = f"refused: wrong ({off})"
    return runners, left_out


def _prepared(
    runtime: Runtime, network: Any, example: tuple[Tensor, ...], dtype: torch.dtype, truth: Tensor
) -> Runner:
    device = example[0].device.type
    before = memory.resident(device)
    call = runtime.prepare(network, example, dtype)
    call(*example)
    memory.resident(device)
    memory.reset_peak(device)
    began = now(device)
    out = call(*example)
    ms = 1e3 * (now(device) - began)
    after = memory.peak(device)
    error = float((out.double() - truth).norm() / truth.norm())
    mb = after - before if after and before else None
    engine = getattr(call, "network", None)
    held = engine.extra_repr().splitlines()[-1] if isinstance(engine, Engine) else ""
    return Runner(runtime, call, error, ms, mb, held)


def _times(
    row: Row,
    subject: Subject,
    example: tuple[Tensor, ...],
    runners: Mapping[str, Runner],
    settings: Settings,
) -> Iterator[Record]:
    contenders = [
        Contender(name, r.runtime.setting, (partial(r.call, *example),))
        for name, r in runners.items()
    ]
    convolution, its_gflop = convolution_of(row.dtype, settings)
    raced = race([*contenders, convolution], settings.device, settings.seconds, ROUNDS)
    work = gflop(subject) * row.batch
    raced[CONVOLUTION] = convolution, raced[CONVOLUTION][1] * (work / its_gflop)
    for record in of_race(raced, shape=tuple(example[0].shape), gflop=work, **row.about):
        runner = runners.get(record.provider)
        yield record if runner is None else replace(record, note=runner.rough)


def _companions(row: Row, runners: Mapping[str, Runner]) -> Iterator[Record]:
    """Rows of the same runners' errors and memory, as ratios to fastdiff's."""
    errors = {name: r.error for name, r in runners.items() if name != EAGER.name}
    errors[OWN] = runners[EAGER.name].error
    mb = {name: r.mb for name, r in runners.items() if r.mb is not None}
    for what, metric, figures in (("error", "of its norm", errors), ("memory", "MB", mb)):
        about = {**row.about, "row": f"{row.title}: {what}", "metric": metric}
        for provider, figure in figures.items():
            ratio = figure / figures[FASTDIFF] if figures[FASTDIFF] else None
            note = runners[provider].held if metric == "MB" else ""
            yield Record(provider=provider, p50=figure, ratio=ratio, note=note, **about)


def gflop(subject: Subject) -> float:
    """1e9 FLOPs of the network for one image, by the direct algorithms of its layers."""
    state = {name: t.to("meta") for name, t in subject.network.state_dict().items()}
    example = tuple(a.to("meta") for a in subject.example(1, "cpu"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(subject.network, state, example)
    return counter.get_total_flops() / 1e9


def convolution_of(dtype: torch.dtype, settings: Settings) -> tuple[Contender, float]:
    """torch's 3x3 convolution at a size that suits it, and its work in 1e9 FLOPs: the ceiling."""
    batch, channels, side = (1, 32, 8) if settings.quick else (16, 512, 16)
    if settings.device == "cuda" and not settings.quick:
        batch = 256
    x, weight = (
        torch.randn(size, device=settings.device).to(dtype, memory_format=torch.channels_last)
        for size in ((batch, channels, side, side), (channels, channels, 3, 3))
    )
    call = partial(F.conv2d, x, weight, padding=1)
    return Contender(CONVOLUTION, "", (call,)), 18 * x.numel() * channels / 1e9
