"""How good a set of Fashion-MNIST images is: what the claims are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from bench.claims.claim import Point, mean_and_spread
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
        self.count, self.labels = count, torch.arange(count) % 10
        self.classifier = load_classifier()
        training = fashion_mnist(split="train")
        assert training.labels is not None
        self.reference, _ = self._described(training.images[balanced(training.labels)[:count]])

    def of(self, images: Tensor, labels: Tensor | None = None) -> Point:
        """Of uint8 images [n, 1, H, W], whose labels are 0, 1, .. 9, 0, .. by default."""
        features, classes = self._described(images)
        precision, recall = precision_recall(self.reference, features)
        hits = classes.eq(self.labels[: len(images)] if labels is None else labels)
        return {
            "fd": frechet_distance(self.reference, features),
            "precision": precision,
            "recall": recall,
            "accuracy": hits.double().mean().item(),
        }

    def over(self, seeds: Sequence[int], draw: Draw) -> Point:
        """The mean of `of` over sets of several seeds, and its spread as fd_sd, .."""
        rows = [self.of(draw(seed, self.labels, self.count)) for seed in seeds]
        point: Point = {}
        for key in rows[0]:
            point[key], spread = mean_and_spread([row[key] for row in rows])
            point[f"{key}_sd"] = spread
        return point

    def _described(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return describe(self.classifier, framed(images, self.classifier.shape))


quality = lru_cache(maxsize=2)(Quality)
