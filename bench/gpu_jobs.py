"""What `bench.gpu_check` asks of a GPU, a job at a time, each in words that a process is told.

    op BACKEND OP       the op in every case of its record, by the rule of fastdiff.verify
    sampler NAME        its loop as CUDA graphs against its plain loop, and that neither waits
    predictions         the ops' large cases, timed, beside what compiled code and data sheets allow
    bench SECTION       a section of the benchmark

A GPU that was sent out of bounds stays broken for its process, so `bench.gpu_check` runs this file
as another one, and starts it again behind the job that broke it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff import (
    DDIMSampler,
    DDPMSampler,
    DPMSolverSampler,
    HeunSampler,
    NoiseSchedule,
    Sampler,
    UNet,
    UNetConfig,
    gpu,
)
from fastdiff.op import BACKENDS, Op, backend, missing
from fastdiff.ops import OPS
from fastdiff.verify import fault

from .records import FASTDIFF, LACKS, Settings
from .timing import Contender, busy, race

OK, NOTE, WRONG = "ok", "note", "wrong"
BROKEN = 3  # exit status: the GPU takes no more work from this process
ROUNDING = 1e-5  # relative: a library may sum in another order while a graph is captured
SHAPE, STEPS = (4, 3, 16, 16), 6


@dataclass(frozen=True)
class Finding:
    """What a job found out: `mark` is "ok", "note" for what was left undone, or "wrong".

    `figures` are a line of the table of predictions, or a record of the benchmark.
    """

    job: str
    mark: str
    text: str = ""
    figures: dict[str, Any] | None = None


def backends(op: Op, device: str) -> list[str]:
    """Those that have a kernel of the op for a device and can be used here."""
    elsewhere = {"cuda": ("cpp",), "cpu": ("triton", "cuda")}[device]
    return [b for b in BACKENDS if b not in elsewhere and not missing(b) and _has(op, b, device)]


def _has(op: Op, name: str, device: str) -> bool:
    with backend(name):
        try:
            return op.backend(device) == name
        except RuntimeError:
            return False


def correctness(job: str, settings: Settings, name: str, op: Op) -> Iterator[Finding]:
    """Every case, the large ones included; a case that fails does not keep others from running."""
    right = 0
    cases = [c for c in op.cases() if not (c.large and settings.quick)]
    for case in cases:
        release(settings.device)
        try:
            with backend(name):
                complaint = fault(op, case, settings.device)
        except Exception as error:
            yield failure(job, error, f"case {case.name!r}")
            broken(settings.device)
            continue
        right += complaint is None
        if complaint:
            yield Finding(job, WRONG, complaint)
    figures = {"op": op.name, "backend": name, "right": right, "of": len(cases)}
    yield Finding(job, OK, f"{right} of {len(cases)} cases", figures)


def samplers() -> dict[str, tuple[Sampler, dict[str, Any]]]:
    """Samplers that use each part of a row, and the options of their runs."""
    schedule = NoiseSchedule.linear(1000)
    return {
        "ddim": (DDIMSampler(schedule, STEPS, clip=1.0), {}),
        "ddim-interval": (
            DDIMSampler(schedule, STEPS, eta=1.0),
            {"guidance": 1.5, "guidance_interval": (0.5, 20.0)},
        ),
        "ddpm": (DDPMSampler(schedule, STEPS), {"guidance": 1.0}),
        "dpmpp": (DPMSolverSampler(schedule, STEPS), {"guidance": 1.0}),
        "heun": (HeunSampler(schedule, STEPS), {}),
    }


def loop(job: str, settings: Settings, sampler: Sampler, how: dict[str, Any]) -> Iterator[Finding]:
    """The second run of a kind replays the graphs of the first, with other numbers in them."""
    torch.manual_seed(0)
    model = UNet(
        UNetConfig(image_size=16, channels=32, num_res_blocks=1, channel_mult=(1, 2),
                   attention_resolutions=(8,), num_classes=3, norm_groups=8)
    )  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    model = model.eval().to(settings.device)
    cond = torch.arange(SHAPE[0], device=settings.device) % 3
    run = partial(sampler.sample, model, SHAPE, cond=cond, **how)
    captured = True if settings.device == "cuda" else None
    for _ in range(2):  # a kind of row is captured the second time it comes
        run(seed=0, graph=captured)
    wanted, x = run(seed=1, graph=False), run(seed=1, graph=captured)
    yield compared(job, "the loop as graphs", x, wanted)
    for name, graph in (("plain loop", False), ("loop as graphs", captured)):
        for _ in range(2):
            run(seed=0, graph=graph, callback=lambda *state: None)
        with forbidding(settings.device) as callback:
            x = run(seed=1, graph=graph, callback=callback)
        yield compared(job, f"the {name}, forbidden to wait for the GPU,", x, wanted)


def compared(job: str, what: str, x: Tensor, wanted: Tensor) -> Finding:
    if torch.equal(x, wanted):
        return Finding(job, OK, f"{what} equals the plain loop bit for bit")
    error = float((x - wanted).norm() / wanted.norm())
    mark = NOTE if error <= ROUNDING else WRONG
    return Finding(job, mark, f"{what} is off by {error:.1e} from the plain loop")


@contextmanager
def forbidding(device: str) -> Iterator[Callable[..., None]]:
    """A callback after whose first call it is an error to wait for the GPU."""

    def callback(*state: Any) -> None:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")

    try:
        yield callback
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def predictions(job: str, settings: Settings) -> Iterator[Finding]:
    """A line for each large case of each op that has a kernel on the device."""
    from . import kernels

    copied = gpu.copy_bandwidth(settings.device, 2**20 if settings.quick else gpu.COPIED)
    try:
        allowed = predicted(settings)
    except Exception as error:
        yield failure(job, error, "static predictions")
        allowed = {}
    for op in OPS.values():
        if op.backend(settings.device) == "reference":
            continue
        for case in op.cases():
            if not case.large or (settings.quick and (op.name, case.name) not in allowed):
                continue
            release(settings.device)
            try:
                inputs = case.inputs(settings.device)
                moved = op.moved(*inputs)
                works = [inputs]
                for _ in range(kernels.sets(settings, moved) - 1):
                    works.append(case.inputs(settings.device))
                calls = tuple(writing(op, each) for each in works)
                raced = race([Contender(FASTDIFF, "", calls)], settings.device, 0.2, 3, None, busy)
            except Exception as error:
                yield failure(job, error, f"{op.name}, case {case.name!r}")
                broken(settings.device)
                continue
            seconds = float(np.median(raced[FASTDIFF][1])) / 1e6
            yield Finding(job, OK, figures={
                "op": op.name, "case": case.name, "backend": op.backend(settings.device),
                "measured": seconds, "predicted": allowed.get((op.name, case.name)),
                "copying": moved / copied, "moved": moved,
            })  # fmt: skip


def predicted(settings: Settings) -> dict[tuple[str, str], float]:
    """(op, case) -> seconds that compiled code and the data sheet allow a GPU of this kind."""
    from fastdiff import aot

    major, minor = gpu.found()[0].capability if settings.device == "cuda" else (9, 0)
    rows = aot.reports(
        lambda op, case, target: (
            case.large
            and target.name == f"sm_{major}{minor}"
            and (not settings.quick or op.name == "cfg")
        )
    )
    return {(p.op, p.case): max(p.roofline, p.issue or 0.0) for p in aot.predictions(rows)}


def writing(op: Op, inputs: tuple[Any, ...]) -> Callable[[], None]:
    names = [name.rstrip("?") for name in op.outputs]
    return partial(op.write, *inputs, **dict(zip(names, op.allocate(*inputs), strict=True)))


@torch.no_grad()
def section(job: str, settings: Settings, name: str, refused: dict[str, str]) -> Iterator[Finding]:
    from . import accuracy, calls, ceiling, end_to_end, kernels, networks

    if name == ceiling.SECTION:
        records = ceiling.measure(settings)
    else:
        modules = {m.SECTION: m for m in (kernels, calls, networks, end_to_end, accuracy)}
        records = modules[name].measure(settings, refused)
    for record in records:
        wrong = record.note.startswith("refused") and record.provider == FASTDIFF
        lacks = record.p50 is None
        text = f"{record.row}: {record.provider} {record.note}" if lacks else ""
        yield Finding(job, WRONG if wrong else NOTE if lacks else OK, text, asdict(record))


def failure(job: str, error: Exception, where: str) -> Finding:
    """An error as a finding: too little memory or a peer that is not there is no fault of ours."""
    said = (str(error).splitlines() or [""])[0]
    text = f"{type(error).__name__}: {said}"
    mark = NOTE if isinstance(error, LACKS) else WRONG
    return Finding(job, mark, f"{where}: {text}" if where else text)


def broken(device: str) -> None:
    """Leave, for another process to go on, if the GPU answers this one no more."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            sys.exit(BROKEN)


def release(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


def refuse(refused: dict[str, str], finding: Finding, device: str) -> None:
    """Remember by the name of an op that its kernel is wrong, so that nobody times it."""
    kind, *rest = finding.job.split(" ")
    if kind == "op" and finding.mark == WRONG and OPS[rest[1]].backend(device) == rest[0]:
        refused.setdefault(rest[1], finding.text)


def do(job: str, settings: Settings, refused: dict[str, str]) -> Iterator[Finding]:
    kind, *rest = job.split(" ", 2)
    if kind == "op":
        yield from correctness(job, settings, rest[0], OPS[rest[1]])
    elif kind == "sampler":
        yield from loop(job, settings, *samplers()[rest[0]])
    elif kind == "predictions":
        yield from predictions(job, settings)
    else:
        yield from section(job, settings, job.removeprefix("bench "), refused)


def main(order: Path, out: Path) -> None:
    """Do the jobs of an order, writing a line for each finding and after each job."""
    told = json.loads(order.read_text())
    settings = Settings(**told["settings"])
    with out.open("a") as file:

        def write(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for job in told["jobs"]:
            print(job, flush=True)
            try:
                for finding in do(job, settings, told["refused"]):
                    refuse(told["refused"], finding, settings.device)
                    write(**asdict(finding))
            except Exception as error:
                write(**asdict(failure(job, error, "")))
            write(ends=job)
            broken(settings.device)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
