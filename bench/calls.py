"""What a call costs when the tensors are tiny: the host's side of everything."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import fastdiff
from fastdiff import ops
from fastdiff.ops import OPS

from . import loops, peers, step, work
from .records import COPY, FASTDIFF, PLAIN, Record, Settings, of_race, without_time
from .timing import Contender, Option, Spread, race

SECTION = "calls"
SHAPE = (1, 3, 32, 32)
SHORT, LONG = 50, 550
PROCESSES = 5


@dataclass(frozen=True)
class Row:
    """Options to race for one call, fastdiff's first; a figure is the call's time over `each`.

    `wrong` says of which options the result is, and why: see `work.faults`.
    """

    name: str
    op: str
    options: list[Option]
    each: int = 1
    wrong: Mapping[tuple[str, str], str] = field(default_factory=dict)


class Free(nn.Module):
    """A model whose output is made beforehand; only modules are captured as CUDA graphs."""

    def __init__(self, m: Tensor) -> None:
        super().__init__()
        self.register_buffer("m", m, persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.m


def measure(settings: Settings, refused: Mapping[str, str]) -> Iterator[Record]:
    """Single calls, loops on a model that costs nothing, their allocations, and the import."""
    x, m = torch.randn(2, *SHAPE, device=settings.device)
    rows = [
        *_steps(x, m, settings),
        _noising(x, settings),
        *(_loop(n, x, m) for n in (SHORT, LONG)),
    ]
    medians: dict[tuple[int, str], float] = {}
    for row in tqdm(rows, desc=SECTION, leave=False):
        if reason := refused.get(row.op) or row.wrong.get(row.options[0][:2]):
            yield without_time(SECTION, row.name, f"refused: wrong ({reason})")
            continue
        for record in _raced(row, settings):
            medians[row.each, record.provider] = record.p50 or 0.0
            yield record
    if "step" not in refused:
        yield from _further(medians)
        more = _allocations(2 * SHORT, x, m) - _allocations(SHORT, x, m)
        yield Record(SECTION, "tensor allocations a step", FASTDIFF, "each", more / SHORT)
    yield _import(1 if settings.quick else PROCESSES)


def _raced(row: Row, settings: Settings) -> list[Record]:
    contenders = [
        Contender(o.provider, o.how, (o.call,)) for o in row.options if o[:2] not in row.wrong
    ]
    raced = race(contenders, settings.device, settings.seconds, settings.rounds, peers.AT_BEST)
    each = {provider: (who, us / row.each) for provider, (who, us) in raced.items()}
    return of_race(each, section=SECTION, row=row.name, shape=SHAPE, dtype="float32")


def _steps(x: Tensor, m: Tensor, settings: Settings) -> Iterator[Row]:
    for name, solver in (("DDIM", step.DDIM), ("DDPM", step.DDPM)):
        sampler = solver.sampler()
        streams = ops.streams_of(0, len(x), device=x.device) if sampler.table.noisy else None
        inputs = (x, m, *(None,) * 7, streams, 0)
        made = step.work(solver, OPS["step"], inputs, settings, allocating=True)
        through = Option(FASTDIFF, "through its sampler", partial(sampler.step, m, step.ROW, x))
        wrong = work.faults(replace(made, options=[through, *made.options]))
        direct, *others = (o for o in made.options if o.provider != COPY)
        yield Row(f"sampler.step, {name}", "step", [through, *others], wrong=wrong)
        yield Row(f"ops.step, {name}", "step", [direct, *others], wrong=wrong)


def _noising(x: Tensor, settings: Settings) -> Row:
    inputs = (x, torch.tensor([3], device=x.device), None, None, None, 0)
    made = work.noising(OPS["noising"], inputs, settings)
    options = [o for o in made.options if o.provider != COPY]
    return Row("ops.noising, noise made, v", "noising", options, wrong=work.faults(made))


def _loop(steps: int, x: Tensor, m: Tensor) -> Row:
    """A whole loop on a model whose output is made beforehand, a step of it."""
    sampler, scheduler = step.DDIM.sampler(steps), step.DDIM.peer(steps)

    def free(x: Tensor, t: Tensor) -> Tensor:
        return m

    model = free if x.device.type == "cpu" else Free(m)

    def run(loop: loops.Loop) -> None:
        for _ in loop:
            pass

    options = [
        Option(FASTDIFF, "", lambda: sampler.sample(model, SHAPE, x_T=x)),
        Option(peers.EAGER, "int t", lambda: run(loops.of_diffusers(scheduler, steps, free, x))),
        Option(PLAIN, "in place", lambda: run(loops.of_plain(sampler.table, free, x, x.dtype))),
    ]
    return Row(f"a step of a {steps}-step loop, free model", "step", options, each=steps)


def _further(medians: Mapping[tuple[int, str], float]) -> Iterator[Record]:
    """The slope between both loops: what a step costs without the preparation of a run."""
    slopes = {
        provider: (LONG * us - SHORT * medians[SHORT, provider]) / (LONG - SHORT)
        for (each, provider), us in medians.items()
        if each == LONG
    }
    for provider, us in slopes.items():
        ratio = us / slopes[FASTDIFF]
        yield Record(SECTION, "a further step of that loop", provider, "us", us, ratio=ratio)


def _allocations(steps: int, x: Tensor, m: Tensor) -> int:
    """Tensor allocations of a whole loop, as torch's allocator tells the profiler."""
    sampler = step.DDIM.sampler(steps)
    activities = [ProfilerActivity.CPU]
    if x.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True) as seen:
        sampler.sample(lambda x, t: m, SHAPE, x_T=x)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sum(e["name"] == "[memory]" and e["args"]["Bytes"] > 0 for e in events)


def _import(processes: int) -> Record:
    """Seconds that `import fastdiff` takes in a fresh process that has imported torch."""
    code = (
        "import time, torch; start = time.perf_counter(); import fastdiff; "
        "print(time.perf_counter() - start)"
    )
    source = Path(fastdiff.__file__).parents[1]
    seconds = [
        float(subprocess.check_output([sys.executable, "-c", code], text=True, cwd=source))
        for _ in range(processes)
    ]
    spread = vars(Spread.of(seconds))
    return Record(SECTION, "import fastdiff, after torch", FASTDIFF, "s", **spread)
