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

SECONDS, STEPS = 240.0, 25
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
RATES = "steps in the time"
AGAIN = ("the base, trained from another seed", "the base, from a third")


def measure(points: Points, images: int, seeds: Sequence[int]) -> None:
    shapes = list(CHANGES.values())
    rates = points.measure(RATES, lambda: {"steps": steps_within(SECONDS, shapes, QUICK)})
    for k, (name, shape) in enumerate(CHANGES.items()):
        steps = rates["steps"][k]
        points.measure(name, partial(judged, f"adm-{k}", shape, steps, images, seeds))
    for seed, name in enumerate(AGAIN, 1):
        how = f"adm-0-{seed}", BASE, rates["steps"][0], images, seeds, seed
        points.measure(name, partial(judged, *how))


def judged(
    name: str, shape: UNetConfig, steps: int, images: int, seeds: Sequence[int], seed: int = 0
) -> Point:
    config = replace(QUICK, steps=steps, seed=seed)
    model = trained(name, shape, NoiseSchedule.cosine(1000), config)
    count = sum(p.numel() for p in model.parameters())
    found = quality(images).over(seeds, partial(drawn, optimize(model, "bfloat16")))
    return {"steps": steps, "parameters": count, **found}


def drawn(network: Any, seed: int, labels: Tensor, count: int) -> Tensor:
    sampler = DDIMSampler(network.schedule, STEPS, spacing="trailing", prediction="v")
    made = draw_batches(network, sampler, (1, 32, 32), count, labels, seed=seed)
    return torch.cat(list(made))


def table(points: Mapping[str, Point]) -> list[str]:
    lines = [
        f"Each network trains for {SECONDS / 60:.0f} minutes, so that a slower one makes fewer "
        f"steps; then {STEPS} DDIM steps, told the class, without guidance. The errors are the "
        "images' alone; the base trained again from other seeds shows the training's own.",
        "",
        "| network | parameters, millions | steps in the time | FD | class accuracy |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in (*CHANGES, *AGAIN):
        p = points[name]
        lines.append(
            f"| {name} | {p['parameters'] / 1e6:.2f} | {p['steps']:,} | "
            f"{plus_minus(p['fd'], p['fd_sd'])} | {p['accuracy']:.1%} |"
        )
    return [*lines, "", *verdict(points)]


def verdict(points: Mapping[str, Point]) -> list[str]:
    """The paper's claims, one by one; within the base's own spread nothing is decided."""
    base, deeper, wider, *_ = CHANGES
    own = [points[name]["fd"] for name in (base, *AGAIN)]

    def better(name: str) -> bool | None:
        fd = points[name]["fd"]
        return None if min(own) <= fd <= max(own) else fd < min(own)

    adagn = better("embedding added, no AdaGN")
    rescaled = better("residuals times 1/sqrt(2)")
    claims = {
        "AdaGN is better than adding the embedding": None if adagn is None else not adagn,
        "4 heads are better than one": better("4 heads"),
        "heads of 32 channels are better than one": better("heads of 32 channels"),
        "attention at more resolutions is better": better("attention at 16x16, 8x8, 4x4"),
        "BigGAN's up and down are better": better("BigGAN up and down"),
        "rescaled residuals are not better": not rescaled,
        "width gains more than depth in the same time": points[wider]["fd"] < points[deeper]["fd"],
    }
    verdicts = {True: "Holds", False: "Does not hold", None: "Undecided"}
    return [
        f"Three trainings of the base have FDs of {min(own):.3g} to {max(own):.3g}; between these "
        "nothing is decided. The paper trains for days, which larger networks need.",
        "",
        *(f"- **{verdicts[found]}**: {said}." for said, found in claims.items()),
    ]


def draw(points: Mapping[str, Point], figure: Figure) -> None:
    axes = figure.subplots()
    names = [*CHANGES, *AGAIN][::-1]
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
