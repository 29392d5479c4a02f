"""python bench/fewer_steps.py: how good images are after few steps, by sampler and by student.

Fréchet distance, class accuracy and time an image of the shipped Fashion-MNIST model's samplers at
1 to 64 steps, and of its distilled students, all from the same noise. A point that docs/steps.json
has is not drawn again, so that the script may be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench.records import Settings, machine
from fastdiff import DDIMSampler, DDPMSampler, DPMSolverSampler, HeunSampler, load, optimize
from fastdiff.data import fashion_mnist
from fastdiff.draw import draw_batches
from fastdiff.evaluate import balanced, describe, framed, frechet_distance, load_classifier
from fastdiff.files import make_folder, write_bytes
from fastdiff.models import UNet
from fastdiff.sampler import Sampler

DOCS = Path(__file__).parents[1] / "docs"
STEPS = (1, 2, 4, 8, 16, 32, 64)
STUDENTS = (8, 4, 2, 1)
SAMPLERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "DDIM": (DDIMSampler, {}),
    "DDPM, small variance": (DDPMSampler, {"variance": "small"}),
    "DDPM, large variance": (DDPMSampler, {"variance": "large"}),
    "DPM-Solver++ 2M": (DPMSolverSampler, {}),
    "Heun": (HeunSampler, {}),
}
STUDENT, REAL = "distilled student", "real test images"
COLOURS = {
    "DDIM": "#4c78a8",
    "DDPM, small variance": "#c8a24a",
    "DDPM, large variance": "#9aa0a6",
    "DPM-Solver++ 2M": "#54a24b",
    "Heun": "#b279a2",
    STUDENT: "#e45756",
}
# FID of CIFAR-10 as published: Song et al. 2021, table 1 (DDIM: eta = 0; DDPM, large: sigma-hat),
# and Salimans & Ho 2022, figure 4
PUBLISHED = {
    "DDIM (Song et al. 2021)": {10: 13.36, 20: 6.84, 50: 4.67, 100: 4.16, 1000: 4.04},
    "DDPM, small variance (eta = 1)": {10: 41.07, 20: 18.36, 50: 8.01, 100: 5.78, 1000: 4.73},
    "DDPM, large variance": {10: 367.43, 20: 133.37, 50: 32.72, 100: 9.99, 1000: 3.17},
    "distilled (Salimans & Ho 2022)": {1: 9.12, 2: 4.51, 4: 3.00, 8: 2.57},
}


@dataclass(frozen=True)
class Point:
    """A set of images; `evaluations` are the network's, of one image."""

    method: str
    steps: int
    evaluations: int
    fd: float
    accuracy: float
    ms: float


class Bench:
    """What all points share: the real images' features, and how a set is drawn and judged."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self.classifier = load_classifier()
        training = fashion_mnist(split="train")
        assert training.labels is not None
        self.reference, _ = self.described(training.images[balanced(training.labels)[:count]])
        self.labels = torch.arange(count) % 10

    def described(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return describe(self.classifier, framed(images, self.classifier.shape))

    def judge(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        features, classes = self.described(images)
        distance = frechet_distance(self.reference, features)
        return distance, classes.eq(labels).double().mean().item()

    def point(
        self, method: str, network: Any, sampler: Sampler, w: float | None, steps: int
    ) -> Point:
        shape = network.config.in_channels, network.config.image_size, network.config.image_size

        def draw(count: int) -> list[Tensor]:
            how = {"batch": self.batch, "seed": self.seed, "progress": sys.stderr.isatty()}
            return list(draw_batches(network, sampler, shape, count, self.labels[:count], w, **how))

        draw(self.batch)  # packs the weights, and measures backends
        start = time.perf_counter()
        images = torch.cat(draw(self.count))
        seconds = time.perf_counter() - start
        evaluations = len(sampler.table) * (2 if w else 1)
        return Point(
            method, steps, evaluations, *self.judge(images, self.labels), 1e3 * seconds / self.count
        )


def karras(schedule: Any, steps: int, highest: float = 80.0, rho: float = 7.0) -> list[int]:
    """Timesteps nearest to the noise levels of Karras et al. 2022 (equation 5), descending.

    Heun's method in their x / alpha, from the trailing timesteps' level of 20,000 on, draws noise.
    """
    level = schedule.sigma / schedule.alpha
    ends = (min(highest, level[-1]) ** (1 / rho), level[0] ** (1 / rho))
    wanted = np.linspace(*ends, steps) ** rho
    nearest = np.abs(np.log(level)[:, None] - np.log(wanted)).argmin(0)
    return sorted(set(nearest.tolist()), reverse=True)


def points(
    bench: Bench,
    model: UNet,
    w: float,
    students: list[UNet],
    numbers: list[int],
    done: set[tuple[str, int]],
) -> Iterator[Point]:
    """The points that are not done, the students' first."""
    if (REAL, 0) not in done:
        test = fashion_mnist(split="test")
        assert test.labels is not None
        order = balanced(test.labels)[: bench.count]
        yield Point(REAL, 0, 0, *bench.judge(test.images[order], test.labels[order]), 0.0)
    jobs: list[tuple[str, UNet, Sampler, float | None, int]] = []
    for student in students:
        made = student.distilled
        assert made is not None
        own = DDIMSampler(student.schedule, spacing=made.timesteps, prediction=student.prediction)
        jobs.append((STUDENT, student, own, None, len(made.timesteps)))
    for steps in numbers:
        for name, (kind, options) in SAMPLERS.items():
            where: dict[str, Any] = {"steps": steps, "spacing": "trailing"}
            if name == "Heun":
                where = {"spacing": karras(model.schedule, steps)}
            sampler = kind(model.schedule, prediction=model.prediction, **where, **options)
            jobs.append((name, model, sampler, w, steps))
    engines: dict[int, Any] = {}
    for method, network, sampler, weight, steps in tqdm(jobs, desc="points", unit="point"):
        if (method, steps) not in done:
            fast = engines.setdefault(id(network), optimize(network, "bfloat16"))
            yield bench.point(method, fast, sampler, weight, steps)


def document(found: list[Point], facts: dict[str, Any]) -> str:
    """The table in Markdown, with the published one beside it."""
    real = next((p for p in found if p.method == REAL), None)
    lines = [
        "# Few steps",
        "",
        f"`python bench/fewer_steps.py`: {facts['images']} images a point, guidance "
        f"{facts['guidance']:g}, the network in bfloat16 on {facts['threads']} threads, seed "
        f"{facts['seed']}. FD is the Fréchet distance, in the features of the shipped classifier, "
        "to as many real training images; beside it the part to which the classifier gives the "
        "class asked for, and milliseconds an image.",
        "",
    ]
    if real:
        lines += [f"Real test images: FD {real.fd:.3g}, accuracy {real.accuracy:.1%}.", ""]
    methods = [*SAMPLERS, STUDENT]
    lines += [
        f"| steps | {' | '.join(methods)} |",
        "|---:" * (len(methods) + 1) + "|",
    ]
    by = {(p.method, p.steps): p for p in found}
    for steps in sorted({p.steps for p in found} - {0}):
        cells = [
            f"{p.fd:.3g}, {p.accuracy:.1%}, {p.ms:.2f} ms" if (p := by.get((m, steps))) else ""
            for m in methods
        ]
        lines.append(f"| {steps} | {' | '.join(cells)} |")
    lines += [
        "",
        "Guided samplers evaluate the network twice a step, Heun's method twice more; a student, "
        "which has the guidance in it, once.",
        "",
        "![FD against steps](steps.png)",
        "",
        "FID of CIFAR-10 as published, by steps:",
        "",
    ]
    columns = sorted({steps for row in PUBLISHED.values() for steps in row})
    lines += [f"| | {' | '.join(map(str, columns))} |", "|---" + "|---:" * len(columns) + "|"]
    for name, row in PUBLISHED.items():
        lines.append(f"| {name} | {' | '.join(str(row.get(s, '')) for s in columns)} |")
    return "\n".join([*lines, ""])


def picture(found: list[Point], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((9, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method in [*SAMPLERS, STUDENT]:
        rows = sorted((p for p in found if p.method == method), key=lambda p: p.steps)
        style = {"color": COLOURS[method], "marker": "o", "markersize": 4, "label": method}
        left.plot([p.steps for p in rows], [p.fd for p in rows], **style)
        right.plot([p.ms for p in rows], [p.fd for p in rows], **style)
    for p in found:
        if p.method == REAL:
            for axes in (left, right):
                axes.axhline(p.fd, color="#9aa0a6", linestyle=":", label=REAL)
    left.set(xscale="log", yscale="log", xlabel="steps", ylabel="Fréchet distance")
    ticks = sorted({p.steps for p in found} - {0})
    left.set_xticks(ticks, [str(n) for n in ticks])
    right.set(xscale="log", yscale="log", xlabel="milliseconds an image")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="a point (default 10000)")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="of the samplers")
    parser.add_argument("--guidance", type=float, default=None, help="default: the students'")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--students", type=Path, help="a folder of fastdiff distill; else shipped")
    parser.add_argument("--out", type=Path, default=DOCS, help="where steps.json, .md and .png go")
    args = parser.parse_args(argv)
    model = load("fashion-mnist")
    names = [args.students / str(n) if args.students else f"fashion-mnist-{n}" for n in STUDENTS]
    students = [load(name) for name in names]
    w = args.guidance
    if w is None:
        learned = {student.distilled.guidance for student in students if student.distilled}
        w = next(iter(learned - {None}), 0.0)
    make_folder(args.out)
    path = args.out / "steps.json"
    facts = {"images": args.images, "guidance": w, "seed": args.seed,
             "threads": torch.get_num_threads()}  # fmt: skip
    found: list[Point] = []
    if path.is_file():
        before = json.loads(path.read_text())
        if before["facts"] != facts:
            raise SystemExit(f"{path}: holds points of {before['facts']}; remove it first")
        found = [Point(**row) for row in before["points"]]
    done = {(p.method, p.steps) for p in found}
    bench = Bench(args.images, args.batch, args.seed)
    for point in points(bench, model, w, students, args.steps, done):
        found.append(point)
        record = {
            "facts": facts,
            "machine": machine(Settings()),
            "points": [asdict(p) for p in found],
        }
        write_bytes(path, (json.dumps(record, indent=1) + "\n").encode())
    write_bytes(args.out / "steps.md", document(found, facts).encode())
    picture(found, args.out / "steps.png")
    print(args.out / "steps.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
