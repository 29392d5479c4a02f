"""How good a set of Fashion-MNIST images is: what the claims are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from bench.claims.claim import Point, jackknifed
from fastdiff.data import fashion_mnist
from fastdiff.evaluate import (
    balanced,
    describe,
    framed,
    frechet_distance,
    load_classifier,
    precision_recall,
)

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

    def of(self, images: Tensor, labels: Tensor | None = None) -> Point:
        """Of uint8 images [n, 1, H, W], whose labels are 0, 1, .. 9, 0, .. by default."""
        features, classes = self._described(images)
        hits = classes.eq(self.labels[: len(images)] if labels is None else labels)
        return self._row([features], [hits])

    def over(self, seeds: Sequence[int], draw: Draw) -> Point:
        """`of` so many images, of several seeds, and the standard errors as fd_sd, ..

        Each seed draws a part of the images, all classes alike; leaving out one part after the
        other says how much a figure owes to chance.
        """
        parts = self.labels.chunk(len(seeds))
        drawn = [draw(seed, part, len(part)) for seed, part in zip(seeds, parts, strict=True)]
        found = [self._described(images) for images in drawn]
        hits = [classes.eq(part) for (_, classes), part in zip(found, parts, strict=True)]
        rows = [self._row([features for features, _ in found], hits)]
        for k in range(len(seeds)) if len(seeds) > 1 else ():
            others = [features for i, (features, _) in enumerate(found) if i != k]
            rows.append(self._row(others, hits[:k] + hits[k + 1 :]))
        point: Point = {}
        for key in rows[0]:
            point[key], point[f"{key}_sd"] = jackknifed(rows[0][key], [r[key] for r in rows[1:]])
        return point

    def _row(self, features: Sequence[Tensor], hits: Sequence[Tensor]) -> Point:
        """The figures of images in parts: their features, and whether their classes are right."""
        together = torch.cat(list(features))
        precision, recall = precision_recall(self.reference, together)
        return {
            "fd": frechet_distance(self.reference, together),
            "precision": precision,
            "recall": recall,
            "accuracy": torch.cat(list(hits)).double().mean().item(),
        }

    def _described(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return describe(self.classifier, framed(images, self.classifier.shape))


quality = lru_cache(maxsize=2)(Quality)
