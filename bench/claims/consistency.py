"""python bench/claims/consistency.py: what one noise becomes, and back (DDIM's table 2)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.claims.claim import Claim, Point, Points, mean_and_spread, plus_minus
from fastdiff import DDIMSampler, interpolate, load, ops, optimize
from fastdiff.data import fashion_mnist
from fastdiff.images import to_uint8

STEPS = (10, 20, 50, 100, 200, 500)
PUBLISHED = (0.014, 0.0065, 0.0023, 0.0009, 0.0004, 0.0001)  # Song et al. 2021, table 2: CIFAR-10
BATCH, SHOWN = 100, 8


@lru_cache(maxsize=1)
def network() -> Any:
    return optimize(load("fashion-mnist"))


def sampler(steps: int) -> DDIMSampler:
    model = network()
    return DDIMSampler(model.schedule, steps, spacing="trailing", prediction=model.prediction)


def measure(points: Points, images: int, seeds: Sequence[int]) -> None:
    for steps in STEPS:
        points.measure(f"{steps} steps", partial(there_and_back, steps, images))
    like = ops.randn((SHOWN, 1, 32, 32), 0)
    end = drawn(STEPS[-1], like)
    for steps in STEPS[:-1]:
        points.measure(
            f"the same noise, {steps} steps",
            lambda steps=steps: {"off": (drawn(steps, like) - end).square().mean().item() / 4},
        )


def there_and_back(steps: int, images: int) -> Point:
    """The squared error, in pixels of 0 .. 1, of test images encoded as noise and decoded."""
    data = fashion_mnist(split="test", pad=2)
    assert data.labels is not None
    errors = []
    for first in range(0, images, BATCH):
        chosen = torch.arange(first, min(first + BATCH, images))
        x, cond = data.load(chosen), data.labels[chosen]
        x_T = sampler(steps).invert(network(), x, cond)
        back = sampler(steps).sample(network(), x.shape, x_T=x_T, cond=cond)
        errors += (back - x).square().mean((1, 2, 3)).div(4).tolist()
    mean, spread = mean_and_spread(errors)
    return {"steps": steps, "error": mean, "error_of_mean": spread / len(errors) ** 0.5}


def drawn(steps: int, x_T: Tensor) -> Tensor:
    labels = torch.arange(len(x_T)) % 10
    return sampler(steps).sample(network(), x_T.shape, x_T=x_T, cond=labels)


def table(points: Mapping[str, Point]) -> list[str]:
    lines = [
        "Test images encoded as noise and decoded again in S steps each, with their class: the "
        "mean squared error in pixels of 0 .. 1. And how far images that begin with the same noise "
        f"are, after S steps, from those after {STEPS[-1]}.",
        "",
        "| | " + " | ".join(f"S = {s}" for s in STEPS) + " |",
        "|---" + "|---:" * len(STEPS) + "|",
    ]
    rows = [points[f"{s} steps"] for s in STEPS]
    cells = [plus_minus(p["error"], p["error_of_mean"], 2) for p in rows]
    lines.append(f"| there and back | {' | '.join(cells)} |")
    lines.append(f"| CIFAR-10 as published | {' | '.join(f'{v:g}' for v in PUBLISHED)} |")
    off = [points[f"the same noise, {s} steps"]["off"] for s in STEPS[:-1]]
    lines.append(f"| the same noise | {' | '.join(f'{v:.2g}' for v in off)} | |")
    errors = [p["error"] for p in rows]
    falls = all(a > b for a, b in pairwise(errors)) and all(a > b for a, b in pairwise(off))
    said = "**The claim holds here**" if falls else "**The claim fails here**"
    return [*lines, "", f"{said}: both errors {'fall' if falls else 'do not always fall'} with S."]


def draw(points: Mapping[str, Point], figure: Figure) -> None:
    """Above, columns of one noise at growing S; below, from a noise to another, and back again."""
    like = ops.randn((SHOWN, 1, 32, 32), 0)
    few = STEPS[:4]
    left, right = figure.subplots(1, 2)
    left.imshow(tiled([drawn(steps, like) for steps in few]), cmap="gray", vmin=0, vmax=255)
    left.set_yticks([32 * i + 16 for i in range(len(few))], [f"S = {s}" for s in few])
    left.set(title="one noise a column", xticks=[])
    ends = ops.randn((8, 1, 32, 32), 1)
    between = interpolate(ends[:4], ends[4:], torch.linspace(0, 1, SHOWN)).transpose(0, 1)
    rows = []
    for x_T, label in zip(between, (1, 7, 8, 3), strict=True):
        cond = torch.full((SHOWN,), label)
        rows.append(sampler(50).sample(network(), x_T.shape, x_T=x_T.contiguous(), cond=cond))
    right.imshow(tiled(rows), cmap="gray", vmin=0, vmax=255)
    right.set(title="from one noise to another, spherically", xticks=[], yticks=[])


def tiled(rows: Sequence[Tensor]) -> Any:
    return torch.cat([torch.cat(list(to_uint8(row)[:, 0]), 1) for row in rows]).numpy()


CLAIM = Claim(
    name="consistency",
    title="A noise is a code: the same image at any number of steps, and back",
    says=(
        "Song et al. 2021 (DDIM, sections 5.2 to 5.4): with eta 0 images of one noise share their "
        "features whatever S; noise encodes an image, decoded with an error that falls with S "
        "(table 2); and between two noises lie images between theirs."
    ),
    measure=measure,
    table=table,
    draw=draw,
    images=500,
    seeds=1,
)

if __name__ == "__main__":
    raise SystemExit(CLAIM.main())
