"""python bench/claims/adm.py: ADM's changes to the U-Net, one by one, at equal time."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.claims.claim import Claim, Point, Points, plus_minus
from bench.claims.networks import QUICK, SMALL, steps_within, trained
from bench.claims.quality import quality
from fastdiff import DDIMSampler, NoiseSchedule, UNetConfig, optimize
from fastdiff.draw import draw_batches

SECONDS, STEPS = 240.0, 50
# Dhariwal & Nichol 2021, tables 1 to 3, on a network of one head and no more attention than at 8x8
BASE = replace(SMALL, head_channels=None, heads=1)
CHANGES: dict[str, UNetConfig] = {
    "the base: one head, attention at 8x8, AdaGN": BASE,
    "deeper: 2 blocks a level": replace(BASE, num_res_blocks=2),
    "wider: 48 channels": replace(BASE, channels=48),
    "4 heads": replace(BASE, heads=4),
    "heads of 32 channels": replace(BASE, head_channels=32),
    "attention at 16x16, 8x8, 4x4": replace(BASE, attention_resolutions=(16, 8, 4)),
    "BigGAN up and down": replace(BASE, resblock_updown=True),
    "residuals times 1/sqrt(2)": replace(BASE, rescale_residual=True),
    "embedding added, no AdaGN": replace(BASE, scale_shift=False),
}


def measure(points: Points, images: int, seeds: Sequence[int]) -> None:
    # all rates first, so that the machine is in one state for all
    for name, shape in CHANGES.items():
        points.measure(f"{name}: rate", lambda shape=shape: rate(shape))
    for k, (name, shape) in enumerate(CHANGES.items()):
        steps = points.found[f"{name}: rate"]["steps"]
        points.measure(name, partial(judged, f"adm-{k}", shape, steps, images, seeds))


def rate(shape: UNetConfig) -> Point:
    return {"steps": steps_within(SECONDS, shape, QUICK)}


def judged(name: str, shape: UNetConfig, steps: int, images: int, seeds: Sequence[int]) -> Point:
    model = trained(name, shape, NoiseSchedule.cosine(1000), replace(QUICK, steps=steps))
    count = sum(p.numel() for p in model.parameters())
    found = quality(images).over(seeds, partial(drawn, optimize(model, "bfloat16")))
    return {"steps": steps, "parameters": count, **found}


def drawn(network: Any, seed: int, labels: Tensor, count: int) -> Tensor:
    sampler = DDIMSampler(network.schedule, STEPS, spacing="trailing", prediction="v")
    made = draw_batches(network, sampler, (1, 32, 32), count, labels, guidance=0.5, seed=seed)
    return torch.cat(list(made))


def table(points: Mapping[str, Point]) -> list[str]:
    lines = [
        f"Each network trains for {SECONDS / 60:.0f} minutes, so that a slower one makes fewer "
        f"steps; then {STEPS} DDIM steps, guidance 0.5. One training each: its own noise is not "
        "in the spread, which is the images' alone.",
        "",
        "| network | parameters, millions | steps in the time | FD | class accuracy |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in CHANGES:
        p = points[name]
        lines.append(
            f"| {name} | {p['parameters'] / 1e6:.2f} | {p['steps']:,} | "
            f"{plus_minus(p['fd'], p['fd_sd'])} | {p['accuracy']:.1%} |"
        )
    return lines


def draw(points: Mapping[str, Point], figure: Figure) -> None:
    axes = figure.subplots()
    names = list(CHANGES)[::-1]
    found = [points[name] for name in names]
    fd, spread = [p["fd"] for p in found], [p["fd_sd"] for p in found]
    axes.barh(names, fd, xerr=spread, color=["#9aa0a6"] * (len(names) - 1) + ["#4c78a8"])
    axes.axvline(points[names[-1]]["fd"], color="#4c78a8", linestyle=":")
    axes.set(xlabel="Fréchet distance")
    axes.grid(alpha=0.3, axis="x")


CLAIM = Claim(
    name="adm",
    title="ADM's changes to the U-Net, one by one, at equal time",
    says=(
        "Dhariwal & Nichol 2021 (tables 1 to 3): more heads, or heads of 64 channels, attention at "
        "several resolutions, BigGAN's blocks for up and down, and AdaGN each lower FID; depth "
        "does too but costs training time; rescaled residuals do not."
    ),
    measure=measure,
    table=table,
    draw=draw,
)

if __name__ == "__main__":
    raise SystemExit(CLAIM.main())
