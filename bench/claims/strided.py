"""python bench/claims/strided.py: fewer steps, and noisier ones (DDIM's table 1)."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.claims.claim import Claim, Point, Points, plus_minus
from bench.claims.quality import quality
from fastdiff import DDIMSampler, DDPMSampler, load, optimize
from fastdiff.draw import draw_batches

FULL = 1000
BATCH = 400  # images at a time: all that a seed has of 2,000
STEPS = (10, 20, 50, 100, FULL)
FEWER = 2  # times fewer images where all steps are taken
ETAS: dict[str, Any] = {
    **{f"eta {eta:g}": partial(DDIMSampler, eta=eta) for eta in (0.0, 0.2, 0.5, 1.0)},
    "sigma-hat": partial(DDPMSampler, variance="large"),
}
# Song et al. 2021, table 1: FID of CIFAR-10 by S
PUBLISHED = {
    "eta 0": (13.36, 6.84, 4.67, 4.16, 4.04),
    "eta 0.2": (14.04, 7.11, 4.77, 4.25, 4.09),
    "eta 0.5": (16.66, 8.35, 5.25, 4.46, 4.29),
    "eta 1": (41.07, 18.36, 8.01, 5.78, 4.73),
    "sigma-hat": (367.43, 133.37, 32.72, 9.99, 3.17),
}
COLOURS = ("#4c78a8", "#54a24b", "#c8a24a", "#e45756", "#9aa0a6")


def measure(points: Points, images: int, seeds: Sequence[int]) -> None:
    network = optimize(load("fashion-mnist"), "bfloat16")
    for steps in STEPS:
        # the distance depends on the number of images: the longest run's few have a partner
        counts = [images] if steps < 100 else [images, images // FEWER]
        for count in counts if steps < FULL else counts[1:]:
            for name, kind in ETAS.items():
                quality(count).measure(
                    points,
                    f"{name}, {steps} steps, {count} images",
                    seeds,
                    partial(drawn, network, kind, steps),
                    kind=name,
                    steps=steps,
                    count=count,
                )


def drawn(network: Any, kind: Any, steps: int, seed: int, labels: Tensor, count: int) -> Tensor:
    """Images of the labels, without guidance or clip."""
    spacing = {"spacing": "trailing", "prediction": network.prediction}
    sampler = kind(network.schedule, steps, **spacing)
    shape = 1, 32, 32
    batches = draw_batches(network, sampler, shape, count, labels, seed=seed, batch=BATCH)
    return torch.cat(list(batches))


def by_kind(points: Mapping[str, Point], fewer: bool) -> dict[str, dict[int, Point]]:
    """The points of each kind by steps, of the larger sets or of the smaller."""
    largest = max(p["count"] for p in points.values())
    found: dict[str, dict[int, Point]] = {name: {} for name in ETAS}
    for p in points.values():
        if (p["count"] < largest) == fewer:
            found[p["kind"]][p["steps"]] = p
    return found


def table(points: Mapping[str, Point]) -> list[str]:
    many, few = by_kind(points, False), by_kind(points, True)
    count = min(p["count"] for p in points.values())
    lines = [
        "Fréchet distance of the shipped network with the class given, no guidance, no clip; in "
        "brackets what Song et al. print for CIFAR-10 (FID). The last two columns are of "
        f"{count:,} images, with which all distances are larger.",
        "",
        "| noise | " + " | ".join(f"S = {s}" for s in STEPS[:-1]) + " | 100 | 1000 |",
        "|---" + "|---:" * 6 + "|",
    ]
    for name in ETAS:
        cells = [
            f"{plus_minus(p['fd'], p['fd_sd'])} [{PUBLISHED[name][i]:g}]"
            if (p := many[name].get(s))
            else ""
            for i, s in enumerate(STEPS[:-1])
        ]
        cells += [
            plus_minus(p["fd"], p["fd_sd"]) + (f" [{PUBLISHED[name][-1]:g}]" if s == FULL else "")
            if (p := few[name].get(s))
            else ""
            for s in (100, FULL)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", verdict(many, few)]


def verdict(many: dict[str, dict[int, Point]], few: dict[str, dict[int, Point]]) -> str:
    most, plain, start = "sigma-hat", "eta 0", STEPS[0]
    best, rival = apart(many, start, plain, min)
    worst, above = apart(many, start, most, max)
    late, other = apart(few, FULL, most, min)
    noise = gap(few["eta 1"][FULL], few[plain][FULL])
    return (
        f"At {start} steps {plain} is {best.said} {rival}: that it is the best {best.standing}. "
        f"{most} is {worst.said} {above}: that it fails {worst.standing}. At {FULL} steps {most} "
        f"is {late.said} {other}: that it is the best {late.standing}. That DDPM (eta 1) is better "
        f"than DDIM ({plain}) there {noise.standing}: it is {noise.said}."
    )


class Gap(NamedTuple):
    """How far a distance is below another, or above it, and the standard error of that."""

    size: float
    error: float
    below: bool

    @property
    def said(self) -> str:
        word = "below" if self.below == (self.size > 0) else "above"
        return f"{abs(self.size):.2g} ± {self.error:.1g} {word}"

    @property
    def standing(self) -> str:
        """What it says of the claim that it is positive, within two standard errors."""
        if abs(self.size) <= 2 * self.error:
            return "**is undecided here**"
        return "**holds here**" if self.size > 0 else "**does not hold here**"


def apart(
    found: dict[str, dict[int, Point]], steps: int, name: str, nearest: Callable[..., str]
) -> tuple[Gap, str]:
    """How far a kind is below the best (nearest = min) of the others, or above the worst (max)."""
    other = nearest((k for k in found if k != name), key=lambda k: found[k][steps]["fd"])
    return gap(found[name][steps], found[other][steps], nearest is min), other


def gap(mine: Point, theirs: Point, below: bool = True) -> Gap:
    """How far a distance is below another, or above it."""
    size = theirs["fd"] - mine["fd"] if below else mine["fd"] - theirs["fd"]
    return Gap(size, math.hypot(mine["fd_sd"], theirs["fd_sd"]), below)


def draw(points: Mapping[str, Point], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    many = by_kind(points, False)
    for (name, rows), colour in zip(many.items(), COLOURS, strict=True):
        steps = sorted(rows)
        style = {"color": colour, "marker": "o", "markersize": 4, "label": name, "capsize": 2}
        left.errorbar(
            steps, [rows[s]["fd"] for s in steps], [rows[s]["fd_sd"] for s in steps], **style
        )
        right.plot(STEPS[:-1], PUBLISHED[name][:-1], color=colour, marker="o", markersize=4)
    for axes, title in ((left, "here, FD"), (right, "CIFAR-10 as published, FID")):
        axes.set(xscale="log", yscale="log", xlabel="steps S", title=title)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)


CLAIM = Claim(
    name="strided",
    title="Few steps want little noise; the most noise is best when all steps are taken",
    says=(
        "Song et al. 2021 (DDIM, table 1): at few steps the deterministic sampler (eta 0) is the "
        "best and DDPM's larger variance (sigma-hat) fails; at S = T = 1000 sigma-hat is the best "
        "of all."
    ),
    measure=measure,
    table=table,
    draw=draw,
)

if __name__ == "__main__":
    raise SystemExit(CLAIM.main())
