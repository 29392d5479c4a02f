"""python bench/claims/guidance.py: guidance by a classifier against guidance without one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.claims.claim import RUNS, Claim, Point, Points, plus_minus
from bench.claims.quality import quality
from fastdiff import DDIMSampler, DDPMSampler, load, optimize
from fastdiff.cli import main
from fastdiff.guidance import ClassifierGuidance, load_classifier
from fastdiff.images import to_uint8
from fastdiff.models.encoder import EncoderUNet
from fastdiff.precision import autocast
from fastdiff.store import Store

STEPS, BATCH = 25, 250
RECIPE = Path(__file__).parents[2] / "recipes" / "fashion-mnist-classifier.json"
MIDDLE = {"guidance_interval": (0.3, 5.0)}  # noise levels sigma / alpha
# the schedule's last level has alpha = 5e-5, by whose inverse a shift of eps is magnified in x0:
# there a classifier, which should say nothing, must not be asked
BELOW = {"guidance_interval": (0.0, 20.0)}


@dataclass(frozen=True)
class Kind:
    """A kind of guidance, and the weights it is tried at."""

    name: str
    sampler: type[Any]
    by_classifier: bool
    weights: tuple[float, ...]
    how: dict[str, Any] = field(default_factory=dict)


KINDS = (
    Kind("no classifier, DDIM", DDIMSampler, False, (0.25, 0.5, 1.0, 2.0, 4.0)),
    Kind("no classifier, noise levels 0.3 to 5", DDIMSampler, False, (2.0, 4.0), MIDDLE),
    Kind("classifier, DDIM (score shift)", DDIMSampler, True, (1.0, 2.0, 4.0, 8.0), BELOW),
    Kind("classifier, DDIM, every noise level", DDIMSampler, True, (1.0,)),
    Kind("classifier, noise levels 0.3 to 5", DDIMSampler, True, (4.0, 8.0), MIDDLE),
    Kind("classifier, DDPM (mean shift)", DDPMSampler, True, (1.0, 4.0)),
    Kind(
        "classifier, DDPM, gradient at the mean",
        DDPMSampler,
        True,
        (1.0, 4.0),
        {"gradient_at": "mean"},
    ),
)
COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#9aa0a6", "#c8a24a", "#b279a2", "#72b7b2")


@lru_cache(maxsize=1)
def noisy_classifier() -> EncoderUNet:
    """The shipped model's way down, trained to tell noisy images apart: about eight minutes."""
    folder = RUNS / "classifier"
    if not (folder / "config.json").is_file():
        how = ["train", "--task", "classifier", "--config", str(RECIPE), "--out", str(folder)]
        if main([*how, *(["--resume"] if Store(folder).exists() else [])]):
            raise KeyboardInterrupt
    return load_classifier(folder).fuse_blocks().requires_grad_(False)


def measure(points: Points, images: int, seeds: Sequence[int]) -> None:
    network, judge = optimize(load("fashion-mnist"), "bfloat16"), quality(images)
    for kind in KINDS:
        for weight in kind.weights:
            draw = partial(drawn, network, kind, weight)
            name = f"{kind.name}, {weight:g}"
            judge.measure(points, name, seeds, draw, kind=kind.name, weight=weight)


def drawn(network: Any, kind: Kind, weight: float, seed: int, labels: Tensor, _: int) -> Tensor:
    """Images of the labels. Where a classifier guides, the network is told no class."""
    how: dict[str, Any] = {"classifier_scale": weight} if kind.by_classifier else {}
    sampler = kind.sampler(
        network.schedule, STEPS, spacing="trailing", prediction=network.prediction, **how
    )
    images = []
    for first in range(0, len(labels), BATCH):
        some = labels[first : first + BATCH]
        given = {"cond": some, "guidance": weight}
        if kind.by_classifier:
            given = {"gradient": ClassifierGuidance(noisy_classifier(), some)}
        shape = len(some), 1, 32, 32
        with autocast("cpu", True):
            x = sampler.sample(network, shape, seed, first_index=first, **given, **kind.how)
        images.append(to_uint8(x))
    return torch.cat(images)


def table(points: Mapping[str, Point]) -> list[str]:
    lines = [
        f"The shipped network at {STEPS} steps. A noisy classifier (its way down, attention "
        "pooling, 5,000 steps) guides it where it is told no class; without a classifier it is "
        "told the class. Weight is s of the classifier's gradient, or w of (w + 1) m_cond - w "
        "m_uncond. With DDIM the classifier is asked below noise level 20: at the first step, of "
        "alpha = 5e-5, its small error is twenty thousand times as large in x0.",
        "",
        "| guidance | weight | FD | precision | recall | class accuracy |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for p in points.values():
        lines.append(
            f"| {p['kind']} | {p['weight']:g} | {plus_minus(p['fd'], p['fd_sd'])} | "
            f"{p['precision']:.3f} | {p['recall']:.3f} | {p['accuracy']:.1%} |"
        )
    return [*lines, "", verdict(points)]


def verdict(points: Mapping[str, Point]) -> str:
    by = {kind.name: [p for p in points.values() if p["kind"] == kind.name] for kind in KINDS}
    free, middle, classifier = by[KINDS[0].name], by[KINDS[1].name], by[KINDS[2].name]
    trades = all(
        rows[0]["precision"] < rows[-1]["precision"] and rows[0]["recall"] > rows[-1]["recall"]
        for rows in (free, classifier)
    )
    best, other = (min(rows, key=lambda p: p["fd"]) for rows in (free, classifier))
    kept, whole = middle[0], next(p for p in free if p["weight"] == middle[0]["weight"])
    said = [
        f"{way}, precision goes from {rows[0]['precision']:.3f} to {rows[-1]['precision']:.3f} and "
        f"recall from {rows[0]['recall']:.3f} to {rows[-1]['recall']:.3f}"
        for way, rows in (("Without a classifier", free), ("With one", classifier))
    ]
    return (
        f"{'. '.join(said)}, from the smallest weight to the largest: **the claim "
        f"{'holds' if trades else 'fails'} here**. At weight {whole['weight']:g} the middle noise "
        f"levels alone have FD {kept['fd']:.3g} and recall {kept['recall']:.3f}, all levels "
        f"{whole['fd']:.3g} and {whole['recall']:.3f}. The best FD with a classifier is "
        f"{other['fd']:.3g} (class accuracy {other['accuracy']:.1%}), without one "
        f"{best['fd']:.3g} ({best['accuracy']:.1%})."
    )


def draw(points: Mapping[str, Point], figure: Figure) -> None:
    figure.set_size_inches(9, 6.6)
    panels = figure.subplots(2, 2).flat
    shown = ("fd", "Fréchet distance"), ("accuracy", "class accuracy")
    shown += ("precision", "precision"), ("recall", "recall")
    for axes, (key, label) in zip(panels, shown, strict=True):
        for kind, colour in zip(KINDS, COLOURS, strict=True):
            rows = [p for p in points.values() if p["kind"] == kind.name]
            values, errors = [p[key] for p in rows], [p[f"{key}_sd"] for p in rows]
            style = {"color": colour, "marker": "o", "markersize": 4, "capsize": 2}
            axes.errorbar([p["weight"] for p in rows], values, errors, label=kind.name, **style)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="weight", ylabel=label)
        axes.xaxis.set_major_formatter(lambda weight, _: f"{weight:g}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_yscale("log")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )


CLAIM = Claim(
    name="guidance",
    title="Guidance trades variety for fidelity, with a classifier and without",
    says=(
        "A classifier's gradient moves precision up and recall down as its scale grows (Dhariwal & "
        "Nichol 2021, figure 4); guidance without a classifier does the same (Ho & Salimans 2022, "
        "figure 4), and keeping it to middle noise levels keeps more variety (Kynkäänniemi et al. "
        "2024)."
    ),
    measure=measure,
    table=table,
    draw=draw,
)

if __name__ == "__main__":
    raise SystemExit(CLAIM.main())
