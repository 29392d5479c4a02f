"""Captions of Fashion-MNIST: "a dark wide dress", said of what code can read off the image.

Each has the noun of the class and up to two adjectives. An image is dark or bright, and, garments,
narrow or wide, or, shoes and bags, low or tall, if it is in the lowest or highest third of the
training images of its class; those in the middle have no adjective. So 90 captions there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .. import errors
from ..models.text import END, PAD, START
from ..spacing import count

NOUNS = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)  # in the order of the labels
WIDE = (True, True, True, True, True, False, True, False, False, False)  # or, if not, tall
ADJECTIVES = (("dark", "", "bright"), ("narrow", "", "wide"), ("low", "", "tall"))
WORDS = ("", "", "", "a", *filter(None, chain(*ADJECTIVES)), *NOUNS)  # by token
LENGTH = 6  # tokens of a caption: START a dark wide dress END
LIT = 16  # a pixel below is background


def brightness(images: Tensor) -> Tensor:
    """The mean of the pixels that are lit, fp64 [B], of uint8 images [B, 1, H, W]."""
    lit = _lit(images)
    return (images * lit).sum((1, 2, 3)) / lit.sum((1, 2, 3)).clamp(min=1).double()


def width(images: Tensor) -> Tensor:
    """Lit pixels a row, of the rows that have any, fp64 [B], of uint8 images [B, 1, H, W]."""
    lit = _lit(images)
    return lit.sum((1, 2, 3)) / lit.any(3).sum((1, 2)).clamp(min=1).double()


def height(images: Tensor) -> Tensor:
    """Lit pixels a column, of the columns that have any; as `width`."""
    return width(images.mT)


def _lit(images: Tensor) -> Tensor:
    errors.is_tensor("images", images)
    errors.has_dtype("images", images, (torch.uint8,))
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"images: have shape {tuple(images.shape)}, must be [B, 1, H, W]")
    return images >= LIT


class Captions:
    """What is said of images, and what can be read off them.

    Args:
        images: uint8 [N, 1, H, W], the training images, of which the thirds are; padding with
            black changes nothing.
        labels: int64 [N], 0 .. 9, each at least once.

    Attributes:
        cuts: float64 [10, 2, 2]: of a class's brightness, and of its width or height, the two
            numbers between the thirds.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        measured = _measured(images, labels)
        if missing := sorted(set(range(len(NOUNS))) - set(labels.tolist())):
            raise ValueError(f"labels: have no {missing}; every class is needed for its thirds")
        thirds = torch.tensor([1, 2], dtype=torch.float64) / 3
        self.cuts = torch.stack(
            [measured[labels == c].quantile(thirds, 0).T for c in range(len(NOUNS))]
        )

    def read(self, images: Tensor, labels: Tensor) -> Tensor:
        """The thirds that images are in: of brightness, and of width or height; int64 [B, 2].

        Each is 0, 1 or 2, among the training images of the label [B], int64.

        Raises:
            TypeError, ValueError: other dtypes or shapes, or labels not in 0 .. 9.
        """
        return (_measured(images, labels)[..., None] >= self.cuts[labels]).sum(-1)

    def of(self, images: Tensor, labels: Tensor) -> list[str]:
        """A caption an image; arguments and errors as `read`."""
        thirds = self.read(images, labels).tolist()
        return [caption(k, *third) for k, third in zip(labels.tolist(), thirds, strict=True)]


def _measured(images: Tensor, labels: Tensor) -> Tensor:
    """Brightness, and width or height as the label has it, fp64 [B, 2]."""
    errors.is_pictures("images", images)
    errors.per_sample("labels", labels, torch.int64, "images", images)
    errors.in_range("labels", labels, len(NOUNS))
    extent = torch.where(torch.tensor(WIDE)[labels], width(images), height(images))
    return torch.stack((brightness(images), extent), 1)


def caption(label: int, brightness: int, extent: int) -> str:
    """The words for a label and thirds as `Captions.read` has them: caption(3, 0, 2)."""
    adjectives = ADJECTIVES[0][brightness], ADJECTIVES[1 if WIDE[label] else 2][extent]
    return " ".join(filter(None, ("a", *adjectives, NOUNS[label])))


def tokenize(captions: Sequence[str], length: int = LENGTH, words: Sequence[str] = WORDS) -> Tensor:
    """The tokens of captions, int64 [B, length]: START, one a word, END, and padding.

    Args:
        captions: words with spaces between them.
        length: tokens of a caption.
        words: one a token, "" for those that are no word's.

    Raises:
        ValueError: a word is unknown, or a caption too long.
    """
    count("length", length, 2, 1 << 16)
    if isinstance(captions, str) or not isinstance(captions, Sequence):
        raise TypeError(f"captions: must be a list of them, got {type(captions).__name__}")
    tokens = {word: number for number, word in enumerate(words) if word}
    rows = []
    for text in captions:
        errors.is_a("captions: one of them", text, str)
        words = text.split()
        if unknown := [word for word in words if word not in tokens]:
            raise ValueError(f"captions: {text!r} has {unknown}; known words: {', '.join(tokens)}")
        row = [START, *(tokens[word] for word in words), END]
        if len(row) > length:
            raise ValueError(
                f"captions: {text!r} has {len(row)} tokens, must have {length} at most"
            )
        rows.append(row + [PAD] * (length - len(row)))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, length)
