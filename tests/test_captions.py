"""Captions against images drawn by hand, whose attributes are known."""

import re
from pathlib import Path

import pytest
import torch
from helpers import needs_data

from fastdiff.cli import main
from fastdiff.data import fashion_mnist
from fastdiff.data.captions import (
    LENGTH,
    NOUNS,
    WORDS,
    Captions,
    brightness,
    caption,
    height,
    tokenize,
    width,
)
from fastdiff.models.text import END, PAD, START


def box(high, wide, value, side=32):
    """A rectangle of one value, somewhere on black."""
    image = torch.zeros(1, 1, side, side, dtype=torch.uint8)
    image[..., 3 : 3 + high, 5 : 5 + wide] = value
    return image


def test_attributes_of_rectangles_are_their_sides_and_value():
    images = torch.cat((box(20, 9, 200), box(1, 1, 16), box(7, 25, 255)))
    assert brightness(images).tolist() == [200, 16, 255]
    assert width(images).tolist() == [9, 1, 25]
    assert height(images).tolist() == [20, 1, 7]


def test_what_is_below_the_threshold_or_nothing_at_all_is_background():
    image = box(20, 9, 200)
    image[image == 0] = 15
    black = torch.zeros_like(image)
    assert (brightness(image), width(image), height(image)) == (200, 9, 20)
    assert (brightness(black), width(black), height(black)) == (0, 0, 0)


@pytest.fixture(scope="module")
def boxes():
    """Nine of every class: three values by three sizes."""
    images, labels = [], []
    for label in range(10):
        for value in (60, 120, 180):
            for size in (6, 12, 18):
                images.append(box(12, size, value) if label != 7 else box(size, 12, value))
                labels.append(label)
    return torch.cat(images), torch.tensor(labels)


def test_thirds_are_those_of_the_class(boxes):
    images, labels = boxes
    captions = Captions(images, labels)
    for label in (3, 7):
        mine = labels == label
        thirds = captions.read(images[mine], labels[mine]).tolist()
        assert thirds == [[b, s] for b in range(3) for s in range(3)]
    dress, sneaker = (captions.of(images[labels == k], labels[labels == k]) for k in (3, 7))
    assert dress == [
        "a dark narrow dress", "a dark dress", "a dark wide dress",
        "a narrow dress", "a dress", "a wide dress",
        "a bright narrow dress", "a bright dress", "a bright wide dress",
    ]  # fmt: skip
    assert (sneaker[0], sneaker[4], sneaker[8]) == (
        "a dark low sneaker",
        "a sneaker",
        "a bright tall sneaker",
    )


@needs_data
def test_fashion_mnist_has_all_captions_about_equally_often_and_framing_changes_none():
    data = fashion_mnist(split="train")
    captions = Captions(data.images, data.labels)
    thirds = captions.read(data.images, data.labels)
    for k in range(2):
        counts = torch.bincount(3 * data.labels + thirds[:, k], minlength=30)
        assert (counts / 2000 - 1).abs().max() < 0.05  # many are equally wide
    said = captions.of(data.images[:500], data.labels[:500])
    assert len(set(captions.of(data.images, data.labels))) == 90
    framed = torch.nn.functional.pad(data.images[:500], [2] * 4)
    assert captions.of(framed, data.labels[:500]) == said


def test_tokens_are_words_between_start_and_end():
    texts = ["a dark wide dress", "a bag", ""]
    tokens = tokenize(texts)
    assert tokens.dtype == torch.int64 and tokens.shape == (3, LENGTH)
    for row, text in zip(tokens.tolist(), texts, strict=True):
        end = row.index(END)
        assert row[0] == START and set(row[end + 1 :]) <= {PAD}
        assert " ".join(WORDS[token] for token in row[1:end]) == text
    assert tokenize([]).shape == (0, LENGTH)


def test_every_caption_has_tokens_of_its_own():
    texts = [caption(c, b, s) for c in range(len(NOUNS)) for b in range(3) for s in range(3)]
    tokens = tokenize(texts)
    assert len(set(texts)) == 90 == len(tokens.unique(dim=0))
    assert int(tokens.max()) == len(WORDS) - 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i, y: tokenize(["a red dress"]), ValueError, "'a red dress' has ['red']; known"),
        (lambda i, y: tokenize(["a bag"], 3), ValueError, "'a bag' has 4 tokens, must have 3"),
        (lambda i, y: brightness(i.float()), TypeError, "images: has dtype float32, must be uint8"),
        (lambda i, y: width(i[0]), ValueError, "images: have shape (1, 32, 32), must be [B, 1"),
        (lambda i, y: Captions(i, y.int()), TypeError, "labels: has dtype int32"),
        (lambda i, y: Captions(i, y[1:]), ValueError, "labels: has shape (89,), must be (90,)"),
        (lambda i, y: Captions(i, y + 1), ValueError, "labels: spans 1 to 10"),
        (lambda i, y: Captions(i[9:], y[9:]), ValueError, "labels: have no [0]"),
        (lambda i, y: Captions(i, y).read(i, y - 1), ValueError, "labels: spans -1 to 8"),
    ],
)
def test_bad_input_is_refused(call, error, message, boxes):
    with pytest.raises(error, match=re.escape(message)):
        call(*boxes)


@needs_data
def test_the_reader_says_captions():
    plain, told = fashion_mnist(split="test"), fashion_mnist(split="test", captions=True)
    assert told.class_names == WORDS and told.labels.shape == (10_000, LENGTH)
    training = fashion_mnist()
    said = Captions(training.images, training.labels).of(plain.images[:50], plain.labels[:50])
    assert torch.equal(told.labels[:50], tokenize(said))


@needs_data
def test_the_recipe_of_captions_trains(tmp_path, capsys):
    recipe = Path(__file__).parents[1] / "recipes" / "fashion-mnist-captions.json"
    how = ["--steps", "2", "--warmup", "0", "--batch-size", "8", "--sample-every", "0"]
    assert main(["train", "--config", str(recipe), "--out", str(tmp_path / "run"), *how]) == 0
    drawn = ["--steps", "2", "--out", str(tmp_path / "x.png")]
    drawn += ["--model", str(tmp_path / "run"), "--caption", "a dark wide dress"]
    assert main(["sample", *drawn]) == 0
    assert main(["sample", *drawn[:-1], "a green dress"]) == 1
    assert "has ['green']; known words: a, dark" in capsys.readouterr().err
