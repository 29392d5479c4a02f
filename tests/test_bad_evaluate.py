"""Generated input to evaluation: what brute force finds in float64, or a refusal by name."""

import math

import hypothesis.strategies as st
import torch
from generated import anything, changed, counts, generated, junk, refused_clearly, slowly, tensors
from hypothesis import given

from fastdiff import evaluate
from fastdiff.models.classifier import Classifier, ClassifierConfig

KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
features = (
    tensors(st.tuples(st.integers(0, 7), st.just(3)), st.sampled_from(KINDS)) | tensors() | junk
)
A = torch.tensor([[0.0, 1, 2], [1, 0, 1], [2, 2, 0], [0, 1, 1], [1, 3, 1], [2, 0, 3]])
B = A.flip(1) + 0.5


def distance(a, b):
    """Of the moments, by the eigenvalues of the covariances' product."""
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    s_a, s_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    root = torch.linalg.eigvals(s_a @ s_b).real.clamp(min=0).sqrt().sum()
    return (mean + s_a.trace() + s_b.trace() - 2 * root).item()


@generated
@given(changed(a=features, b=features), st.sampled_from([1.0, 1e-3, 1e160, 1e300]))
def test_frechet_distance(changes, scale):
    given = {"a": A, "b": B, **changes}
    large = {k: x.double() * scale if torch.is_tensor(x) and scale > 1 else x
             for k, x in given.items()}  # fmt: skip
    found = refused_clearly(lambda: evaluate.frechet_distance(**large), *given)
    if found is None:
        return
    assert math.isfinite(found) and found >= 0
    a, b = large["a"], large["b"]
    size = max(a.abs().max().item(), b.abs().max().item()) if a.numel() and b.numel() else 0.0
    if a.shape[1] and size < 1e6:
        wanted = distance(a, b)
        assert math.isclose(found, wanted, rel_tol=1e-3, abs_tol=1e-6 * (1 + size) ** 2)


@generated
@given(changed(real=features, fake=features, k=st.integers(-1, 6) | counts | anything))
def test_precision_and_recall(changes):
    given = {"real": A, "fake": B, "k": 2, **changes}
    found = refused_clearly(lambda: evaluate.precision_recall(**given), *given)
    if found is None:
        return
    real, fake = given["real"].double(), given["fake"].double()
    if real.numel() and max(real.abs().max(), fake.abs().max()) > 1e3:
        assert all(0 <= part <= 1 for part in found)
        return
    for part, points, region in ((found[0], fake, real), (found[1], real, fake)):
        reach = torch.cdist(region, region).sort(1).values[:, given["k"]]
        apart = torch.cdist(points, region)
        near, far = (apart <= reach * f + d for f, d in ((1 - 1e-6, -1e-6), (1 + 1e-6, 1e-6)))
        low, high = (inside.any(1).double().mean().item() for inside in (near, far))
        assert low - 1e-9 <= part <= high + 1e-9


sizes = st.tuples(st.integers(0, 4), st.just(1), st.just(3), st.just(2))
bytes_ = st.sampled_from([torch.uint8] * 6 + [torch.float32])
images = tensors(sizes, bytes_) | tensors() | junk
PICTURES = torch.arange(24, dtype=torch.uint8).reshape(4, 1, 3, 2) * 10


@generated
@given(changed(images=images, among=images))
def test_nearest(changes):
    given = {"images": PICTURES[:2], "among": PICTURES.flip(0), **changes}
    found = refused_clearly(lambda: evaluate.nearest(**given), *given)
    if found is not None:
        x, y = (given[k].double().flatten(1) / 255 for k in ("images", "among"))
        every = (x[:, None] - y).square().mean(2).sqrt()
        torch.testing.assert_close(found[1], every.min(1).values)
        torch.testing.assert_close(every.gather(1, found[0][:, None])[:, 0], found[1])


torch.manual_seed(0)
JUDGE = Classifier(ClassifierConfig(image_size=4, widths=(3, 4), depths=(0, 1))).eval()
JUDGED = torch.arange(128, dtype=torch.uint8).reshape(8, 1, 4, 4)
judged = tensors(st.tuples(st.integers(0, 3), *map(st.just, (1, 4, 4))), bytes_) | tensors() | junk
labelled = tensors(st.tuples(st.integers(0, 9)), st.sampled_from([torch.int64] * 3 + KINDS)) | junk


@generated
@given(changed(model=junk, images=judged, labels=labelled))
def test_classifiers(changes):
    given = {"model": JUDGE, "images": JUDGED, "labels": torch.arange(8) % 3, **changes}
    part = refused_clearly(lambda: evaluate.accuracy(**given), *given)
    if part is not None:
        with torch.no_grad():
            found = JUDGE(given["images"].float() / 127.5 - 1).argmax(1)
        hits = [int(a) == int(b) for a, b in zip(found, given["labels"], strict=True)]
        assert math.isclose(part, sum(hits) / len(hits))
    given.pop("labels")
    out = refused_clearly(lambda: evaluate.describe(**given), *given)
    if out is not None:
        assert out[0].shape == (len(given["images"]), 4) and out[1].dtype == torch.int64


@generated
@given(
    changed(
        images=judged,
        shape=st.lists(st.integers(-2, 9), max_size=4).map(tuple)
        | st.sampled_from([(1, 6, 8), (1, 5, 4)])
        | anything,
        labels=labelled,
        seed=counts | anything,
    )
)
def test_pictures(changes):
    images, shape = changes.get("images", JUDGED), changes.get("shape", (1, 6, 8))
    found = refused_clearly(lambda: evaluate.framed(images, shape), "images", "shape")
    if found is not None:
        assert found.dtype == torch.uint8 and tuple(found.shape[1:]) == tuple(shape)
        assert found.sum() == images.sum()
    soft = refused_clearly(lambda: evaluate.blurred(images), "images")
    if soft is not None and images.numel():
        padded = torch.nn.functional.pad(images.double(), [1] * 4)
        height, width = images.shape[2:]
        sums = sum(padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3))
        assert (soft.double() - sums / 9).abs().max() <= 0.5 + 1e-4 and soft.dtype == torch.uint8
    seed = changes.get("seed", 0)
    noise = refused_clearly(lambda: evaluate.uniform_noise(images, seed), "images", "seed")
    if noise is not None:
        assert noise.shape == images.shape and noise.dtype == torch.uint8
    labels = changes.get("labels", torch.arange(8) % 3)
    order = refused_clearly(lambda: evaluate.balanced(labels), "labels")
    if order is not None:
        assert sorted(order.tolist()) == list(range(len(labels)))
        turn = {}
        turns = [turn.setdefault(k, []).append(0) or len(turn[k]) for k in labels[order].tolist()]
        assert turns == sorted(turns)


@slowly
@given(
    changed(
        reference=judged,
        training=judged,
        classifier=junk,
        features=junk.filter(lambda value: not callable(value)),
        name=junk,
        images=judged,
        labels=labelled,
    )
)
def test_judges(changes):
    made = {"reference": JUDGED, "training": JUDGED, "classifier": JUDGE}
    shown = {"name": "odd", "images": JUDGED.flip(0), "labels": torch.arange(8) % 3}
    for key, value in changes.items():
        (shown if key in shown else made)[key] = value
    judge = refused_clearly(lambda: evaluate.Judge(**made), *made, "images")
    if judge is None:
        return
    row = refused_clearly(lambda: judge.row(**shown), *shown, "among", "real", "fake", "a", "b")
    if row is not None:
        assert row.count == len(shown["images"]) and row.fd >= 0 and 0 <= row.precision <= 1
        if torch.equal(shown["images"].sort(0).values, made["training"].sort(0).values):
            assert row.near == 0


@slowly
@given(anything)
def test_files(value):
    text = isinstance(value, str)  # a path, of no file
    for call, name in (
        (lambda: evaluate.load_classifier(value), "folder"),
        (lambda: evaluate.inception_features(value), "weights"),
    ):
        try:
            assert refused_clearly(call, name) is None
        except FileNotFoundError as error:
            assert text and (value in str(error))
    config = {"image_size": value}
    made = refused_clearly(lambda: ClassifierConfig(**config), *config)
    assert made is None or made.image_size == value >= 1
