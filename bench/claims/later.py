"""python bench/claims/later.py: after the survey: saturation, editing, the first level."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from bench.claims.claim import Claim, Point, Points, plus_minus
from bench.claims.quality import Quality
from fastdiff import DDIMSampler, DDPMSampler, image_to_image, inpaint, load, optimize
from fastdiff.data import fashion_mnist
from fastdiff.evaluate import balanced
from fastdiff.guidance import APG, DynamicThreshold, GuidanceRescale, Guided, cfg_plus_plus
from fastdiff.images import to_uint8

STEPS, BATCH = 25, 250
LARGE = 4.0  # a weight at which plain guidance saturates
WHITE = 254
REAL = "real test images"
PLAIN, SMALL = f"plain, w = {LARGE:g}", "plain, w = 0.5"
# what runs, and how it is told to, of a network and its sampler
How = tuple[Any, dict[str, Any]]
GUIDANCE: dict[str, Callable[[Any, DDIMSampler], How]] = {
    SMALL: lambda net, sampler: (net, {"guidance": 0.5}),
    PLAIN: lambda net, sampler: (net, {"guidance": LARGE}),
    "noise levels 0.3 to 5 (Kynkäänniemi et al. 2024)": lambda net, sampler: (
        net,
        {"guidance": LARGE, "guidance_interval": (0.3, 5.0)},
    ),
    "rescaled by 0.7 (Lin et al. 2023)": lambda net, sampler: (GuidanceRescale(net, LARGE), {}),
    "dynamic threshold (Saharia et al. 2022)": lambda net, sampler: (
        DynamicThreshold(Guided(net, LARGE), net.schedule, net.prediction),
        {},
    ),
    "APG (Sadat et al. 2024)": lambda net, sampler: (
        APG(net, LARGE, net.schedule, net.prediction),
        {},
    ),
    "CFG++, 0.6 (Chung et al. 2024)": lambda net, sampler: (
        net,
        {"guidance": cfg_plus_plus(sampler, 0.6)},
    ),
}
RESAMPLINGS, JUMP, ROWS = (1, 3, 10), 5, 50
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
CRUDE = 4  # pixels a side that image to image's input is averaged over
SPACINGS, FEW = ("leading", "trailing"), (5, 10, 25)


class Judge(Quality):
    """How good images are, how many of their pixels are white, and how bright they are."""

    def hits(self, images: Tensor, classes: Tensor, first: int) -> dict[str, Tensor]:
        white = (images >= WHITE).double().mean((1, 2, 3))
        return {**super().hits(images, classes, first), "white": white}


judge = lru_cache(maxsize=2)(Judge)


@lru_cache(maxsize=1)
def network() -> Any:
    return optimize(load("fashion-mnist"), "bfloat16")


def ddim(steps: int = STEPS, spacing: str = "trailing") -> DDIMSampler:
    net = network()
    return DDIMSampler(net.schedule, steps, spacing=spacing, prediction=net.prediction)


def measure(points: Points, images: int, seeds: Sequence[int]) -> None:
    held = judge(images)
    points.measure(REAL, lambda: held.of(real(images)[0]))
    for name, how in GUIDANCE.items():
        net, told = how(network(), ddim())
        draw = partial(drawn, net, ddim(), told)
        held.measure(points, name, seeds, draw)
    for steps in FEW:
        for spacing in SPACINGS:
            draw = partial(drawn, network(), ddim(steps, spacing), {"guidance": 0.0})
            held.measure(points, f"{spacing}, {steps} steps", seeds, draw)
    for times in RESAMPLINGS:
        points.measure(f"inpainting, {times}", lambda times=times: inpainted(times, images // 10))
    for strength in STRENGTHS:
        points.measure(f"image to image, {strength:g}", lambda s=strength: redrawn(s, images // 10))


def drawn(
    net: Any, sampler: DDIMSampler, told: dict[str, Any], seed: int, labels: Tensor, _: int
) -> Tensor:
    images = []
    for first in range(0, len(labels), BATCH):
        some = labels[first : first + BATCH]
        shape = len(some), 1, 32, 32
        images.append(
            to_uint8(sampler.sample(net, shape, seed, cond=some, first_index=first, **told))
        )
    return torch.cat(images)


def real(count: int) -> tuple[Tensor, Tensor]:
    """uint8 test images [count, 1, 28, 28], their classes in turn; and the same for networks."""
    data = fashion_mnist(split="test")
    assert data.labels is not None
    order = balanced(data.labels)[:count]
    return data.images[order], data.load(order)


def inpainted(times: int, count: int) -> Point:
    """The right half anew, of networks told no class: is it then still what the left half is of?"""
    net, (_, x) = network(), real(count)
    known = torch.ones_like(x, dtype=torch.bool)
    known[..., 16:] = False
    sampler = DDPMSampler(net.schedule, ROWS, "small", "trailing", net.prediction, clip=1.0)
    parts = [
        to_uint8(inpaint(
            sampler, net, x[k : k + BATCH], known[k : k + BATCH], jump=JUMP, resamplings=times,
            first_index=k,
        ))
        for k in range(0, count, BATCH)
    ]  # fmt: skip
    return judge(count).over([0], lambda *_: torch.cat(parts))


def redrawn(strength: float, count: int) -> Point:
    """From images averaged over squares, told the class: how good, and how far from the squares."""
    x = real(count)[1]
    crude = F.avg_pool2d(x, CRUDE)
    start = F.interpolate(crude, scale_factor=CRUDE)
    labels, made = torch.arange(count) % 10, []
    for k in range(0, count, BATCH):
        how = {"cond": labels[k : k + BATCH], "first_index": k}
        made.append(image_to_image(ddim(50), network(), start[k : k + BATCH], strength, **how))
    off = (F.avg_pool2d(torch.cat(made), CRUDE) - crude).square().mean((1, 2, 3)).sqrt() / 2
    found = judge(count).over([0], lambda *_: to_uint8(torch.cat(made)))
    return {**found, "off": off.mean().item()}


def table(points: Mapping[str, Point]) -> list[str]:
    def cell(p: Point, key: str, digits: int = 3) -> str:
        return plus_minus(p[key], p.get(f"{key}_sd", 0.0), digits)

    lines = [
        f"Guidance of the shipped network, DDIM in {STEPS} steps. White is the part of the pixels "
        f"that are {WHITE} or more.",
        "",
        f"| guidance, w = {LARGE:g} if not said | FD | precision | recall | accuracy | white |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in (REAL, *GUIDANCE):
        p = points[name]
        cells = [cell(p, key) for key in ("fd", "precision", "recall")]
        lines.append(f"| {name} | {' | '.join(cells)} | {p['accuracy']:.1%} | {p['white']:.2%} |")
    lines += [
        "",
        "Timesteps that leave out the schedule's last level, which is noise alone (leading), or "
        "begin with it (trailing): FD without guidance (Lin et al. 2023, section 3.3).",
        "",
        "| | " + " | ".join(f"S = {s}" for s in FEW) + " |",
        "|---" + "|---:" * len(FEW) + "|",
    ]
    for spacing in SPACINGS:
        cells = [cell(points[f"{spacing}, {s} steps"], "fd") for s in FEW]
        lines.append(f"| {spacing} | {' | '.join(cells)} |")
    lines += [
        "",
        f"The right half of test images made anew, the network told no class: DDPM, {ROWS} steps, "
        f"each run so many times (RePaint, jumps of {JUMP}). Of a tenth of the images.",
        "",
        "| times | FD | class of the whole is the image's |",
        "|---:|---:|---:|",
    ]
    for times in RESAMPLINGS:
        p = points[f"inpainting, {times}"]
        lines.append(f"| {times} | {cell(p, 'fd')} | {p['accuracy']:.1%} |")
    lines += [
        "",
        f"Image to image, from test images averaged over squares of {CRUDE} pixels: how good, and "
        "how far off the squares (root mean square, of 0 .. 1). Of a tenth of the images.",
        "",
        "| strength | " + " | ".join(f"{s:g}" for s in STRENGTHS) + " |",
        "|---" + "|---:" * len(STRENGTHS) + "|",
    ]
    edited = [points[f"image to image, {s:g}"] for s in STRENGTHS]
    lines.append(f"| FD | {' | '.join(cell(p, 'fd') for p in edited)} |")
    off = [f"{p['off']:.3f}" for p in edited]
    lines.append(f"| off | {' | '.join(off)} |")
    return [*lines, "", *verdict(points)]


def verdict(points: Mapping[str, Point]) -> list[str]:
    """The papers' claims, one by one."""
    plain, others = points[PLAIN], [points[name] for name in list(GUIDANCE)[2:6]]
    spaced = {s: [points[f"{s}, {k} steps"]["fd"] for k in FEW] for s in SPACINGS}
    filled = [points[f"inpainting, {times}"] for times in RESAMPLINGS]
    edited = [points[f"image to image, {s:g}"] for s in STRENGTHS]
    claims = {
        f"each of the four has a lower FD at w = {LARGE:g} than plain guidance": all(
            p["fd"] < plain["fd"] for p in others
        ),
        "each of the four has fewer white pixels": all(p["white"] < plain["white"] for p in others),
        "CFG++ has a lower FD than plain guidance at its better weight": (
            points[list(GUIDANCE)[6]]["fd"] < min(plain["fd"], points[SMALL]["fd"])
        ),
        "trailing timesteps are better than leading ones at every S": all(
            a > b for a, b in zip(*spaced.values(), strict=True)
        ),
        "more resamplings fit the known half better": (
            filled[0]["accuracy"] < filled[-1]["accuracy"] and filled[0]["fd"] > filled[-1]["fd"]
        ),
        "strength trades likeness for quality, up to a point": (
            edited[0]["fd"] > edited[2]["fd"] and edited[0]["off"] < edited[2]["off"]
        ),
    }
    verdicts = {True: "Holds", False: "Does not hold"}
    return [f"- **{verdicts[true]}**: {said}." for said, true in claims.items()]


def draw(points: Mapping[str, Point], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    for k, name in enumerate((REAL, *GUIDANCE)):
        p, style = points[name], {"marker": "o", "markersize": 4, "capsize": 2}
        xerr, yerr = 100 * p.get("white_sd", 0.0), p.get("fd_sd", 0.0)
        left.errorbar(100 * p["white"], p["fd"], yerr, xerr, color=f"C{k}", label=name, **style)
    left.set(xlabel="white pixels, %", ylabel="Fréchet distance", yscale="log")
    left.legend(fontsize=5.5)
    edited = [points[f"image to image, {s:g}"] for s in STRENGTHS]
    right.plot([p["off"] for p in edited], [p["fd"] for p in edited], marker="o", markersize=4)
    for strength, p in zip(STRENGTHS, edited, strict=True):
        right.annotate(
            f"{strength:g}", (p["off"], p["fd"]), (4, 3), textcoords="offset points", fontsize=7
        )
    right.set(
        xlabel="off the input's squares", ylabel="Fréchet distance", yscale="log",
        title="image to image, by strength",
    )  # fmt: skip
    for axes in (left, right):
        axes.grid(alpha=0.3)


CLAIM = Claim(
    name="later",
    title="After the survey: large weights without saturation, editing, and the first level",
    says=(
        "Large weights of guidance saturate; guiding at middle noise levels, rescaling, dynamic "
        "thresholds, and leaving out what is parallel to the prediction mend that, each by its "
        "authors' account; CFG++ renoises without guidance. A sampler must begin at the schedule's "
        "noisiest level (Lin et al. 2023). RePaint goes back and forth so that what is made fits "
        "what is known (Lugmayr et al. 2022, figure 3), and image to image trades likeness for "
        "quality (Meng et al. 2022, figure 3)."
    ),
    measure=measure,
    table=table,
    draw=draw,
)

if __name__ == "__main__":
    raise SystemExit(CLAIM.main())
