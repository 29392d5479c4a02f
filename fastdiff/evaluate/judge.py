"""One set of images held against real ones: a row of the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import errors
from ..models.classifier import Classifier
from ..spacing import count
from .classifier import describe
from .frechet import frechet_distance
from .manifold import precision_recall
from .neighbours import nearest


@dataclass(frozen=True)
class Row:
    """What was measured of a set of images.

    Attributes:
        name: what the images are.
        count: how many.
        fd: Fréchet distance to as many real training images.
        precision, recall: against the same images.
        accuracy: the part to which the classifier gives their label; None without labels.
        near: median distance to the nearest training image, in pixels of 0 .. 1 (root mean
            square).
        close: the part that is nearer to a training image than 99 % of unseen real images are:
            0.01 for images as new, and as detailed, as those; 0 where none came before.
    """

    name: str
    count: int
    fd: float
    precision: float
    recall: float
    accuracy: float | None
    near: float
    close: float


class Judge:
    """Measures sets of images against the same real ones.

    Args:
        reference: uint8 [n, C, H, W], real images; sets should have n images too.
        training: uint8 [m, C, H, W], all the images that a model may have learned by heart.
        classifier: gives classes, and the features unless `features` does.
        features: a function from uint8 images to features [n, D].
        device: where distances of pixels are computed.
    """

    def __init__(
        self,
        reference: Tensor,
        training: Tensor,
        classifier: Classifier | None,
        features: Callable[[Tensor], Tensor] | None = None,
        progress: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if classifier is None and features is None:
            raise ValueError("classifier, features: are both None; give one")
        if classifier is not None:
            errors.is_a("classifier", classifier, Classifier)
        if features is not None:
            errors.is_callable("features", features)
        errors.is_pictures("reference", reference)
        errors.is_pictures("training", training)
        self.training, self.classifier, self.other = training, classifier, features
        self.progress, self.device = progress, device
        self.threshold = math.nan
        self.reference, _ = self._describe(reference)

    def row(
        self, name: str, images: Tensor, labels: Tensor | None = None, unseen: bool = False
    ) -> Row:
        """Measure uint8 images [n, C, H, W], of the given labels [n].

        unseen: they are real and were not trained on; their distances to the training images are
        what those of later rows are compared with.
        """
        errors.is_a("name", name, str)
        errors.is_pictures("images", images)
        if labels is not None:
            errors.per_sample("labels", labels, torch.int64, "images", images)
        features, classes = self._describe(images)
        precision, recall = precision_recall(self.reference, features)
        hits = None if labels is None or classes is None else classes.eq(labels)
        _, distance = nearest(images, self.training, self.progress, self.device)
        if unseen:
            self.threshold = distance.quantile(0.01).item()
        return Row(
            name,
            len(images),
            frechet_distance(self.reference, features),
            precision,
            recall,
            None if hits is None else hits.double().mean().item(),
            distance.median().item(),
            distance.lt(self.threshold).double().mean().item(),
        )

    def _describe(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        classes = None
        if self.classifier is not None:
            features, classes = describe(self.classifier, images, self.progress)
        if self.other is not None:
            features = self.other(images)
        return features, classes


def blurred(images: Tensor) -> Tensor:
    """Each pixel the mean of the 3x3 around it, black beyond the edge; uint8 as it came."""
    errors.is_pictures("images", images)
    if not images.numel():
        return images
    return F.avg_pool2d(images.float(), 3, 1, 1).round().to(torch.uint8)


def uniform_noise(images: Tensor, seed: int = 0) -> Tensor:
    """As many images of nothing, every value alike likely."""
    errors.is_tensor("images", images)
    seed = count("seed", seed, 0, (1 << 63) - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, images.shape, dtype=torch.uint8, generator=generator)


def balanced(labels: Tensor) -> Tensor:
    """An order of images in which the classes come in turn, as long as each lasts: indices [n]."""
    errors.is_batch("labels", labels)
    errors.per_sample("labels", labels, torch.int64, "labels", labels)
    turn = torch.zeros_like(labels)
    for label in labels.unique():
        chosen = labels == label
        turn[chosen] = torch.arange(int(chosen.sum()))
    by_class = labels.argsort(stable=True)
    return by_class[turn[by_class].argsort(stable=True)]
