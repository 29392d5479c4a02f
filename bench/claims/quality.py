"""How good a set of Fashion-MNIST images is: what the claims are judged by."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bench.claims.claim import Point, Points, jackknifed
from fastdiff.data import fashion_mnist
from fastdiff.evaluate import (
    balanced,
    describe,
    framed,
    frechet_distance,
    load_classifier,
    precision_recall,
)
from fastdiff.files import make_folder, read_tensors, write_tensors

Part = tuple[Tensor, dict[str, Tensor]]  # features [n, D], and what is right of each image
Draw = Callable[[int, Tensor, int], Tensor]  # (seed, labels [n], n) -> uint8 [n, 1, H, W]


class Quality:
    """Fréchet distance, precision and recall to as many real training images, class accuracy.

    All in the features of the shipped classifier, which no guidance here has seen.
    """

    def __init__(self, count: int) -> None:
        self.labels = torch.arange(count) % 10
        self.classifier = load_classifier()
        training = fashion_mnist(split="train")
        assert training.labels is not None
        self.reference, _ = self._described(training.images[balanced(training.labels)[:count]])

    def of(self, images: Tensor) -> Point:
        """Of uint8 images [n, 1, H, W], whose labels are 0, 1, .. 9, 0, .."""
        return self._row([self._part(images, 0)])

    def over(self, seeds: Sequence[int], draw: Draw) -> Point:
        """`of` so many images, of several seeds, and the standard errors as fd_sd, ..

        Each seed draws a part of the images, all classes alike; leaving out one part after the
        other says how much a figure owes to chance.
        """
        found: list[Part] = []
        first = 0
        for seed, labels in zip(seeds, self.labels.chunk(len(seeds)), strict=True):
            found.append(self._part(draw(seed, labels, len(labels)), first))
            first += len(labels)
        whole, without = self._row(found), []
        if len(found) > 1:
            without = [self._row(found[:k] + found[k + 1 :]) for k in range(len(found))]
        point: Point = {}
        for key, value in whole.items():
            point[key], point[f"{key}_sd"] = jackknifed(value, [row[key] for row in without])
        return point

    def measure(
        self, points: Points, name: str, seeds: Sequence[int], draw: Draw, **facts: Any
    ) -> None:
        """Measure the point of that name: `over` the seeds, and facts.

        Each seed's images are kept until the point is measured: a stopped script draws none again.
        """
        folder = points.sets / name.replace("/", "-")
        earlier = 0.0

        def kept(seed: int, labels: Tensor, count: int) -> Tensor:
            nonlocal earlier
            path = folder / f"{count} of seed {seed}.safetensors"
            if path.is_file():
                tensors, said = read_tensors(path, stamped=True)
                earlier += float(said["seconds"])
                return tensors["images"]
            start = time.perf_counter()
            images = draw(seed, labels, count)
            make_folder(folder)
            spent = time.perf_counter() - start
            write_tensors(path, {"images": images}, {"seconds": f"{spent:.1f}"})
            return images

        def measured() -> Point:
            return {**facts, **self.over(seeds, kept), "earlier": earlier}

        points.measure(name, measured)
        shutil.rmtree(folder, ignore_errors=True)

    def hits(self, images: Tensor, classes: Tensor, first: int) -> dict[str, Tensor]:
        """What may be right of each of images `first`, ..; `classes` is what they show."""
        return {"accuracy": classes == self.labels[first : first + len(images)]}

    def _part(self, images: Tensor, first: int) -> Part:
        features, classes = self._described(images)
        return features, self.hits(images, classes, first)

    def _row(self, parts: Sequence[Part]) -> Point:
        """The figures of all parts together."""
        features = torch.cat([features for features, _ in parts])
        precision, recall = precision_recall(self.reference, features)
        row: Point = {
            "fd": frechet_distance(self.reference, features),
            "precision": precision,
            "recall": recall,
        }
        for key in parts[0][1]:
            row[key] = torch.cat([hits[key] for _, hits in parts]).double().mean().item()
        return row

    def _described(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return describe(self.classifier, framed(images, self.classifier.shape))


quality = lru_cache(maxsize=2)(Quality)
