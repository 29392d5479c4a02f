"""python bench/growth.py: how a network's time grows with the batch, the resolution and threads.

Each point is the fastest of a few calls in turns, drawn beside the roofline of this machine: the
longer of the time of its FLOPs at the rate of torch's best 3x3 convolution, and of the time to read
the weights at the rate of a copy from memory. Below it is who does fewer products (Winograd).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import networks, subjects
from bench.records import Settings, machine
from bench.runtimes import EAGER, OPENVINO, OURS, Runtime, fp32
from bench.subjects import Subject
from bench.timing import burst

PICTURE = Path(__file__).parents[1] / "docs" / "growth.png"
REPEATS, ENOUGH_SECONDS = 7, 3.0  # calls a point, and when fewer do
COPIED = 2**28  # bytes, out of every cache
STYLES = {1: "--", 2: "-"}
COLOURS = {"fastdiff": "#3b6ea5", "OpenVINO": "#c8a24a", "PyTorch": "#8fb8de"}
ROOF = "roofline"


@dataclass(frozen=True)
class Point:
    """One network at one size: `x` is the batch or the image's side."""

    panel: str
    provider: str
    threads: int
    x: int
    gflop: float
    ms: float


@dataclass(frozen=True)
class Panel:
    """A network, the sizes it is run at as (x, batch, side), and on which runtimes."""

    name: str
    build: Callable[[], Subject]
    sizes: tuple[tuple[int, int, int], ...]
    runtimes: tuple[Runtime, ...]


CIFAR = Panel(
    "CIFAR-10 network, by batch", subjects.cifar10,
    tuple((n, n, 32) for n in (1, 4, 16, 64)), (OURS, OPENVINO, EAGER),
)  # fmt: skip
ADM = Panel(
    "ADM-256 network, by resolution", partial(subjects.adm, 256),
    tuple((side, 1, side) for side in (32, 128, 256)),
    (replace(OURS, prepare=partial(OURS.prepare, memory="low")), EAGER),  # 554 M weights
)  # fmt: skip


def measure(panel: Panel, threads: tuple[int, ...]) -> Iterator[Point]:
    """Every size on every runtime, one network in one runtime in memory at a time."""
    subject = panel.build()
    weights = sum(p.nbytes for p in subject.network.parameters())
    works = {x: networks.gflop(_sized(subject, side)) * batch for x, batch, side in panel.sizes}
    chosen = [r for r in panel.runtimes if r.installed]
    for count in tqdm(threads, desc=panel.name, leave=False):
        torch.set_num_threads(count)
        rate, bandwidth = _ceilings()
        for x, work in works.items():
            roof = max(work / rate, weights / 1e9 / bandwidth)
            yield Point(panel.name, ROOF, count, x, work, 1e3 * roof)
        for runtime in chosen:
            kept: dict[int, Callable[..., Tensor]] = {}
            for x, batch, side in panel.sizes:
                ms = _fastest(runtime, kept, _sized(subject, side).example(batch, "cpu"), subject)
                yield Point(panel.name, runtime.name, count, x, works[x], ms)


def _sized(subject: Subject, side: int) -> Subject:
    return replace(subject, size=(subject.size[0], side, side))


def _fastest(
    runtime: Runtime, kept: dict[int, Any], example: tuple[Tensor, ...], subject: Subject
) -> float:
    """Milliseconds; `kept` holds the prepared network where it serves every shape."""
    call = kept.get(0) or runtime.prepare(subject.network, example, fp32)
    if runtime is not OPENVINO:
        kept[0] = call
    call(*example)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < REPEATS and (not times or time.perf_counter() - began < ENOUGH_SECONDS):
        start = time.perf_counter()
        call(*example)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def _ceilings() -> tuple[float, float]:
    """GFLOP/s of a convolution and GB/s of a copy, at the threads of now."""
    convolution, work = networks.convolution_of(fp32, Settings())
    source = torch.ones(COPIED // 4)
    to = torch.empty_like(source)
    us = [
        min(burst((call,), 1, "cpu") for _ in range(REPEATS))
        for call in (*convolution.calls, partial(to.copy_, source))
    ]
    return 1e6 * work / us[0], 2 * COPIED / us[1] / 1e3


def draw(path: Path, points: list[Point]) -> None:
    """Milliseconds over the size, a panel a network; dashed is one thread."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(p.panel for p in points))
    figure = Figure(figsize=(5 * len(panels), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        lines = dict.fromkeys((p.provider, p.threads) for p in points if p.panel == panel)
        for provider, threads in lines:
            of = [
                p for p in points if (p.panel, p.provider, p.threads) == (panel, provider, threads)
            ]
            axes.plot(
                [p.gflop for p in of], [p.ms for p in of], STYLES.get(threads, ":"),
                color=COLOURS.get(provider, "black"), marker="" if provider == ROOF else ".",
                linewidth=0.8 if provider == ROOF else 1.5,
                label=f"{provider}, {threads} thread{'s' * (threads > 1)}",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", ylabel="ms a call, float32")
        axes.set_title(panel, fontsize=9)
        first = [p for p in points if (p.panel, p.provider) == (panel, ROOF)]
        ticks = {p.gflop: f"{p.x}\n{p.gflop:.0f}" for p in first}
        axes.set_xticks(list(ticks), list(ticks.values()), fontsize=7)
        axes.set_xticks([], minor=True)
        axes.set_xlabel(f"{panel.rsplit(' ', 1)[1]}, and GFLOP", fontsize=8)
        axes.legend(fontsize=7, frameon=False, handlelength=3.5)  # a dashed one is seen
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None, panels: tuple[Panel, ...] = (CIFAR, ADM)) -> int:
    """Measure, print, and write the picture and, beside it, the figures."""
    parser = argparse.ArgumentParser(prog="bench/growth.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURE, help="PNG; a JSON goes beside it")
    out = parser.parse_args(argv).out
    before = torch.get_num_threads()
    threads = tuple(n for n in (1, 2) if n <= (os.cpu_count() or 1))
    try:
        with torch.no_grad():
            points = [point for panel in panels for point in measure(panel, threads)]
    finally:
        torch.set_num_threads(before)
    for p in points:
        print(
            f"{p.panel:32} {p.provider:10} {p.threads} threads {p.x:4} "
            f"{p.gflop:8.1f} GFLOP {p.ms:9.1f} ms {1e3 * p.gflop / p.ms:7.0f} GFLOP/s"
        )
    draw(out, points)
    content = {"machine": machine(Settings()), "points": [asdict(p) for p in points]}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {out}, {out.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
