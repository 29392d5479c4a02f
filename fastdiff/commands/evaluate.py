"""Measure how good a model's images are, beside real images, blurred ones and noise.

Writes report.json, report.md, pictures and, unless --images are given, the images into --out. FD
falls with the number of images: compare reports of equal --samples alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..data import ImageSet, fashion_mnist, npz_images
from ..data.npz import check_npz, npz_writer
from ..draw import draw_batches
from ..evaluate.classifier import SHIPPED, framed, load_classifier
from ..evaluate.inception import inception_features
from ..evaluate.judge import Judge, balanced, blurred, uniform_noise
from ..evaluate.manifold import NEIGHBOURS
from ..evaluate.report import (
    BLURRED,
    NOISE,
    REAL,
    bits_said,
    neighbour_picture,
    sample_picture,
    table,
    write_report,
)
from ..files import make_folder
from ..losses import BitsPerDim, bits_per_dim
from ..models.classifier import Classifier
from ..spacing import count as count_of
from . import sampling

ENOUGH = f": precision and recall look at {NEIGHBOURS} neighbours of an image"
# flags that say how images are drawn, and nothing of those that are
DRAWING = (
    *("model", "sampler", "steps", "spacing", "eta", "clip", "seed", "engine"),
    *("guidance", "batch"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sampling.add_arguments(parser)
    add = parser.add_argument
    add("--images", type=Path, help="measure these instead: an .npz as fastdiff sample writes it")
    add("--samples", type=int, default=10_000, help="images of each kind (default 10000)")
    add("--guidance", type=float, nargs="+", metavar="W",
        help="weights w, a row each (default 0: plain conditional; a student's own)")  # fmt: skip
    add("--bits-per-dim", type=int, default=0, metavar="N",
        help="bits per dimension of N test images, a call a timestep (default 0)")  # fmt: skip
    add("--batch", type=int, default=250, help="images at a time (default 250)")
    add("--data", type=Path, help="the folder of Fashion-MNIST; else the Debian package's")
    add("--train", type=Path, help="an .npz of training images, in place of Fashion-MNIST's")
    add("--test", type=Path, help="an .npz of real images that were not trained on")
    add("--classifier", type=Path, default=SHIPPED, help="the folder of a classifier of your own")
    add("--inception", type=Path, metavar="FILE",
        help="torch-fidelity's weights: for FD, precision and recall")  # fmt: skip
    add("--out", type=Path, required=True, help="the folder to write")


def run(args: argparse.Namespace) -> int:
    count_of("--samples", args.samples, NEIGHBOURS + 1, why=ENOUGH)
    count_of("--batch", args.batch, 1)
    for w in args.guidance or ():
        errors.number("--guidance", w)
    started, progress = time.perf_counter(), sys.stderr.isatty()
    source = _model(args) if args.images is None else _file(args)
    if args.images is None:
        _leave_inputs(args)
    training, test = _real(args, source.shape)
    count = source.count
    if not 0 <= args.bits_per_dim <= count or (args.bits_per_dim and source.bits is None):
        raise ValueError(
            f"--bits-per-dim={args.bits_per_dim}: must be 0 to {count} (--samples), of a model"
        )
    if count > (most := min(len(training), len(test))):
        raise ValueError(f"--samples={count}: must be at most {most}, the real images of each kind")
    classifier: Classifier | None = load_classifier(args.classifier).to(args.device)
    features = None
    if args.inception is not None:
        features = inception_features(args.inception, args.device, progress)
        if classifier is not None and source.shape != classifier.shape:
            classifier = None
    make_folder(args.out)
    judge = Judge(
        _first(training, count)[0], training.images, classifier, features, progress, args.device
    )
    real, labels = _first(test, count)
    rows = [
        judge.row(REAL, real, labels, unseen=True),
        judge.row(BLURRED, blurred(real), labels),
        judge.row(NOISE, uniform_noise(real)),
    ]
    facts: dict[str, Any] = {
        **source.facts,
        "images of each kind": count,
        "features": "Inception-v3" if features else "the classifier's last layer",
        "threads": torch.get_num_threads(),
    }
    for name, images, asked in source.sets():
        stem = _stem(name)
        if args.images is None:
            n, channels, height, width = images.shape
            with npz_writer(args.out / f"{stem}.npz", (n, height, width, channels), asked) as add:
                add(images)
        rows.insert(-2, judge.row(name, images, asked))
        columns = 10 if asked is None else min(10, len(asked.unique()))
        sample_picture(args.out / f"{stem}.png", images, columns)
        neighbour_picture(args.out / f"{stem}-nearest.png", images, training.images, args.device)
        facts["seconds"] = round(time.perf_counter() - started)
        write_report(args.out, rows, facts)
    if args.bits_per_dim and source.bits:
        n = args.bits_per_dim
        found = source.bits(real[:n], None if labels is None else labels[:n])
        facts["bits per dimension"] = said = bits_said(found, n)
        facts["seconds"] = round(time.perf_counter() - started)
        write_report(args.out, rows, facts, found)
        print(f"{said} bits per dimension")
    print(table(rows))
    print(f"{args.out}/report.md")
    return 0


@dataclass(frozen=True)
class _Source:
    """What is judged: `count` images of `shape` in each of the sets, and how they came to be."""

    shape: tuple[int, ...]
    count: int
    facts: dict[str, Any]
    sets: Callable[[], Iterable[tuple[str, Tensor, Tensor | None]]]
    bits: Callable[[Tensor, Tensor | None], BitsPerDim] | None = None


def _model(args: argparse.Namespace) -> _Source:
    """A set of samples for each weight of guidance, of the same streams."""
    model = sampling.model_of(args)
    assert model.schedule is not None and model.prediction is not None  # load sees to it
    schedule, prediction = model.schedule, model.prediction
    config, classes = model.config, model.config.num_classes
    sampler = sampling.sampler_of(args, model)
    networks = [sampling.network_at(args, model, w) for w in args.guidance or [None]]
    if classes is None and any(weight for _, weight in networks):
        raise ValueError(
            f"--guidance={args.guidance}: {args.model} is told captions, and none here: nothing to "
            "strengthen; leave it out"
        )
    shape = config.in_channels, config.image_size, config.image_size
    progress = sys.stderr.isatty()

    def sets() -> Iterator[tuple[str, Tensor, Tensor | None]]:
        labels = None if classes is None else torch.arange(args.samples) % classes
        for w, (network, weight) in zip(args.guidance or [None], networks, strict=True):
            batches = draw_batches(
                network,
                sampler,
                shape,
                args.samples,
                labels,
                weight,
                args.seed,
                args.batch,
                device=args.device,
                progress=progress,
            )
            yield _name(w), torch.cat(list(batches)), labels

    def bits(images: Tensor, labels: Tensor | None) -> BitsPerDim:
        return bits_per_dim(
            networks[0][0],
            schedule,
            images.float() / 127.5 - 1,
            prediction,
            "learned_range" if config.learned_variance else "small",
            cond=None if classes is None else labels,
            seed=args.seed,
            batch_size=args.batch,
            progress=progress,
        )

    facts = {
        "model": args.model,
        "sampler": f"{args.sampler}, {len(sampler.table)} steps, {args.spacing or 'trailing'}",
        "engine": args.engine,
        "seed": args.seed,
    }
    return _Source(shape, args.samples, facts, sets, bits)


def _name(w: float | None) -> str:
    return "samples" if w is None else f"guidance {w:g}"


def _stem(name: str) -> str:
    return name.replace(" ", "-")


def _leave_inputs(args: argparse.Namespace) -> None:
    """Raise where the images that are drawn would replace real ones that are to be read."""
    written = {(args.out / f"{_stem(_name(w))}.npz").resolve() for w in args.guidance or [None]}
    for flag in ("train", "test"):
        path = getattr(args, flag)
        if path is not None and path.resolve() in written:
            raise ValueError(
                f"--{flag}={path}: would be replaced by the images drawn, which go into "
                f"--out={args.out}; give another folder"
            )


def _file(args: argparse.Namespace) -> _Source:
    """Images made elsewhere: [N, C, H, W], or [N, H, W, C] as pictures are."""
    path = args.images
    usual = argparse.ArgumentParser()
    add_arguments(usual)
    if given := [name for name in DRAWING if getattr(args, name) != usual.get_default(name)]:
        flags = ", ".join(f"--{name}={getattr(args, name)}" for name in given)
        raise ValueError(f"{flags}: --images are drawn already; leave it out")
    if not path.is_file():
        raise FileNotFoundError(f"--images={path}: no such file; takes an .npz of fastdiff sample")
    data = _read("images", path)
    if len(data) <= NEIGHBOURS:
        raise ValueError(
            f"--images={path}: has {len(data)} images, must have at least {NEIGHBOURS + 1}{ENOUGH}"
        )
    count = min(args.samples, len(data))
    images, labels = _first(data, count)
    chosen = path.stem, images, labels
    return _Source(tuple(images.shape[1:]), count, {"images": str(path)}, lambda: [chosen])


def _read(flag: str, path: Path) -> ImageSet:
    """The images of a file, and their classes if it has some, its bytes checked."""
    data = npz_images(path)
    check_npz(path)
    if data.labels is not None and data.labels.ndim > 1:
        raise ValueError(
            f"--{flag}={path}: has labels of {data.labels.shape[1]} tokens, as captions are; must "
            "be a class an image: save the images without `labels`"
        )
    return data


def _real(args: argparse.Namespace, shape: tuple[int, ...]) -> tuple[ImageSet, ImageSet]:
    """The training and the test images, padded with black to the shape of the images judged."""
    if (args.train is None) != (args.test is None):
        raise ValueError("--train, --test: give both, or neither for Fashion-MNIST")
    if args.train is None:
        sets = [fashion_mnist(args.data, split, pad=0) for split in ("train", "test")]
    else:
        sets = [_read("train", args.train), _read("test", args.test)]
    padded = []
    for data in sets:
        try:
            images = framed(data.images, shape)
        except ValueError as error:
            raise ValueError(f"real {error}; give others with --train and --test") from None
        padded.append(ImageSet(images, data.labels, data.class_names))
    return padded[0], padded[1]


def _first(data: ImageSet, count: int) -> tuple[Tensor, Tensor | None]:
    """The first images, every class as frequent as it can be."""
    if data.labels is None:
        return data.images[:count], None
    chosen = balanced(data.labels)[:count]
    return data.images[chosen], data.labels[chosen]
