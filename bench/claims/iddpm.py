"""python bench/claims/iddpm.py: cosine and linear schedules, learned and fixed variances."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.claims.claim import RUNS, Claim, Point, Points, plus_minus
from bench.claims.networks import QUICK, SMALL, trained
from bench.claims.quality import quality
from fastdiff import DDPMSampler, DiffusionLoss, NoiseSchedule, load, optimize
from fastdiff.data import fashion_mnist
from fastdiff.draw import draw_batches
from fastdiff.losses import LossAwareTimesteps, UniformTimesteps, bits_per_dim
from fastdiff.models import UNet

STEPS = (25, 50, 100)
FULL, FEWER = 1000, 20  # and all of them, for a twentieth of the images
JUDGED = 64  # images whose bits are counted
SCHEDULES = {"linear": NoiseSchedule.linear(1000), "cosine": NoiseSchedule.cosine(1000)}
VARIANCES = {"fixed, small": "small", "fixed, large": "large", "learned": "learned_range"}
LEARNED = replace(SMALL, learned_variance=True)
HYBRID = replace(QUICK, prediction="eps", weighting="hybrid")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "L_simple": {"weighting": "simple"},
    "L_vlb": {"weighting": "vlb"},
    "L_vlb, importance sampling": {"weighting": "vlb", "timesteps": "loss_aware"},
    "L_hybrid": {"weighting": "hybrid"},
}
BATCH, BATCHES = 64, 48  # whose gradients are compared
COLOURS = ("#9aa0a6", "#c8a24a", "#54a24b", "#4c78a8")


def network(objective: str, schedule: str) -> UNet:
    """Trained for 1,500 steps by an objective on a schedule: about five minutes."""
    how = OBJECTIVES[objective]
    shape = replace(SMALL, learned_variance=how["weighting"] != "simple")
    name = f"iddpm-{schedule}-{'-'.join(how.values())}"
    return trained(name, shape, SCHEDULES[schedule], replace(HYBRID, **how))


@lru_cache(maxsize=2)
def fast(objective: str, schedule: str) -> Any:
    return optimize(network(objective, schedule), "bfloat16")


def measure(points: Points, images: int, seeds: Sequence[int]) -> None:
    for schedule in SCHEDULES:
        for name, variance in VARIANCES.items():
            for steps in (*STEPS, FULL):
                count = images if steps < FULL else images // FEWER
                draw = partial(drawn, schedule, variance, steps)
                quality(count).measure(points, f"{schedule}, {name}, {steps} steps", seeds, draw)
            points.measure(f"{schedule}, {name}: bits", partial(bits, schedule, variance))
    for objective in OBJECTIVES:
        points.measure(f"{objective}: curve", partial(curve, objective))
    for objective in OBJECTIVES:
        points.measure(f"{objective}: gradients", partial(agreement, objective))
    for objective, how in OBJECTIVES.items():
        variance = "small" if how["weighting"] == "simple" else "learned_range"
        draw = partial(drawn, "cosine", variance, STEPS[1], objective=objective)
        quality(images).measure(points, f"{objective}: samples", seeds, draw)


def drawn(
    schedule: str,
    variance: str,
    steps: int,
    seed: int,
    labels: Tensor,
    count: int,
    objective: str = "L_hybrid",
) -> Tensor:
    sampler = DDPMSampler(SCHEDULES[schedule], steps, variance, "linspace", "eps", clip=1.0)
    network = fast(objective, schedule)
    made = draw_batches(network, sampler, (1, 32, 32), count, labels, seed=seed)
    return torch.cat(list(made))


def judged() -> tuple[Tensor, Tensor]:
    data = fashion_mnist(split="test", pad=2)
    assert data.labels is not None
    return data.load(torch.arange(JUDGED)), data.labels[:JUDGED]


def bits(schedule: str, variance: str) -> Point:
    x0, cond = judged()
    network = fast("L_hybrid", schedule)
    found = bits_per_dim(network, SCHEDULES[schedule], x0, "eps", variance, cond=cond)
    return {"bits": found.total}


def curve(objective: str) -> Point:
    """Training's loss by step, and the test images' bits at its end."""
    model = network(objective, "cosine")
    folder = RUNS / f"iddpm-cosine-{'-'.join(OBJECTIVES[objective].values())}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    x0, cond = judged()
    variance = "learned_range" if model.config.learned_variance else "small"
    schedule = SCHEDULES["cosine"]
    found = bits_per_dim(fast(objective, "cosine"), schedule, x0, "eps", variance, cond=cond)
    return {
        "steps": [line["step"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "bits": found.total,
    }


def agreement(objective: str) -> Point:
    """The mean cosine of the objective's gradients at two batches, of one network, the hybrid's.

    Without noise it is 1. It is 1 / (1 + noise) where noise is that of McCandlish et al. 2018,
    tr(Cov g) / |E g|^2, and all gradients are of a length; a few long ones do not decide it.
    """
    how = OBJECTIVES[objective]
    model = load(RUNS / "iddpm-cosine-hybrid").fuse_blocks()
    weighting, data = how["weighting"], fashion_mnist(pad=2)
    assert data.labels is not None
    if weighting == "simple":
        plain = DiffusionLoss(SCHEDULES["cosine"], "eps")
        network = lambda x, t, cond: model(x, t, cond).chunk(2, 1)[0]  # noqa: E731
    else:
        plain = DiffusionLoss(SCHEDULES["cosine"], "eps", weighting, learned_variance=True)
        network = model
    aware = "timesteps" in how
    timesteps = (LossAwareTimesteps if aware else UniformTimesteps)(1000)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    total = torch.zeros(())
    rehearsals = 320 if aware else 0  # until every timestep has its ten losses
    for step in range(rehearsals + BATCHES):
        chosen = order[step * BATCH : (step + 1) * BATCH]
        x0, cond = data.load(chosen), data.labels[chosen]
        t, weight = timesteps.draw(BATCH, seed=1, row=step)
        with torch.set_grad_enabled(step >= rehearsals):
            losses, _ = plain.with_sums(network, x0, t, cond, seed=1, row=step)
        timesteps.update(t, losses.detach())
        if step >= rehearsals:
            model.zero_grad()
            (weight * losses).mean().backward()
            g = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            total = total + g / g.norm()
    return {"cosine": (total.square().sum().item() - BATCHES) / (BATCHES * (BATCHES - 1))}


def table(points: Mapping[str, Point]) -> list[str]:
    columns = [f"{s} steps" for s in (*STEPS, FULL)]
    lines = [
        "FD after DDPM steps (of all 1000 with a twentieth of the images: all distances are "
        f"larger), and bits a dimension of {JUDGED} test images over all 1000. The networks are "
        "small, trained for 1,500 steps by L_hybrid; a fixed variance ignores what was learned.",
        "",
        f"| schedule, variance | {' | '.join(columns)} | bits/dim |",
        "|---" + "|---:" * (len(columns) + 1) + "|",
    ]
    for schedule in SCHEDULES:
        for name in VARIANCES:
            rows = [points[f"{schedule}, {name}, {c}"] for c in columns]
            cells = [plus_minus(p["fd"], p["fd_sd"]) for p in rows]
            found = points[f"{schedule}, {name}: bits"]["bits"]
            lines.append(f"| {schedule}, {name} | {' | '.join(cells)} | {found:.2f} |")
    lines += [
        "",
        f"| objective (cosine schedule) | bits/dim | cosine of two gradients | FD, {STEPS[1]} "
        "steps |",
        "|---|---:|---:|---:|",
    ]
    for objective in OBJECTIVES:
        bits, cosine, fd = of_objective(points, objective)
        lines.append(f"| {objective} | {bits:.2f} | {cosine:.3g} | {plus_minus(*fd)} |")
    lines += [
        "",
        f"The cosine is of the gradients at two batches of {BATCH}, of one network: nearer 1 "
        "with less noise. The network of L_simple has the small fixed variance.",
        "",
    ]
    return [*lines, *verdict(points)]


def of_objective(
    points: Mapping[str, Point], objective: str
) -> tuple[float, float, tuple[float, float]]:
    """Its network's bits, how its gradients agree, and its samples' FD with its error."""
    samples = points[f"{objective}: samples"]
    return (
        points[f"{objective}: curve"]["bits"],
        points[f"{objective}: gradients"]["cosine"],
        (samples["fd"], samples["fd_sd"]),
    )


def verdict(points: Mapping[str, Point]) -> list[str]:
    """The paper's claims, one by one."""

    def fd(schedule: str, variance: str, steps: int) -> float:
        return points[f"{schedule}, {variance}, {steps} steps"]["fd"]

    few, fixed = STEPS[0], [name for name in VARIANCES if name != "learned"]
    simple, vlb, sampled, hybrid = (of_objective(points, name) for name in OBJECTIVES)
    claims = {
        f"the cosine schedule is better at {few} steps, with each variance": all(
            fd("cosine", name, few) < fd("linear", name, few) for name in VARIANCES
        ),
        f"the learned variance is better than both fixed ones at {few} steps": all(
            fd(schedule, "learned", few) < min(fd(schedule, name, few) for name in fixed)
            for schedule in SCHEDULES
        ),
        "a learned variance costs fewer bits than both fixed ones": all(
            points[f"{schedule}, learned: bits"]["bits"]
            < min(points[f"{schedule}, {name}: bits"]["bits"] for name in fixed)
            for schedule in SCHEDULES
        ),
        "L_vlb's gradient is noisier than L_hybrid's": vlb[1] < hybrid[1],
        "importance sampling makes it less noisy": sampled[1] > vlb[1],
        "L_vlb has the fewest bits": min(vlb[0], sampled[0]) < min(simple[0], hybrid[0]),
        "L_hybrid has better samples than L_vlb": hybrid[2][0] < min(vlb[2][0], sampled[2][0]),
    }
    return [
        f"- **{'Holds' if true else 'Does not hold'}**: {said}." for said, true in claims.items()
    ]


def draw(points: Mapping[str, Point], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    styles = {"linear": ":", "cosine": "-"}
    for schedule in SCHEDULES:
        for name, colour in zip(VARIANCES, COLOURS[1:], strict=True):
            rows = [points[f"{schedule}, {name}, {s} steps"] for s in STEPS]
            fd, spread = [p["fd"] for p in rows], [p["fd_sd"] for p in rows]
            left.errorbar(
                STEPS, fd, spread, color=colour, linestyle=styles[schedule], marker="o",
                markersize=4, label=f"{schedule}, {name}", capsize=2,
            )  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="steps", ylabel="Fréchet distance")
    left.legend(fontsize=7)
    for objective, colour in zip(OBJECTIVES, COLOURS, strict=True):
        if "vlb" in objective:
            curve = points[f"{objective}: curve"]
            right.plot(
                curve["steps"], curve["losses"], color=colour, label=objective, linewidth=0.8
            )
    right.set(yscale="log", xlabel="training step", ylabel="training loss, bits/dim")
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)


CLAIM = Claim(
    name="iddpm",
    title="A cosine schedule and a learned variance help where steps are few",
    says=(
        "Nichol & Dhariwal 2021: the cosine schedule is better than the linear one; with a learned "
        "variance few steps lose less (figure 8), and bits/dim fall (table 1); L_vlb's gradient is "
        "noisy, importance sampling of t mends it (figures 3, 5, 6), and L_hybrid is best for "
        "samples."
    ),
    measure=measure,
    table=table,
    draw=draw,
)

if __name__ == "__main__":
    raise SystemExit(CLAIM.main())
