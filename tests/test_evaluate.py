"""Measures of images against closed forms, loops written from the papers, and sets made by hand."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff.draw import draw_batches
from fastdiff.evaluate import (
    Judge,
    balanced,
    blurred,
    frechet_distance,
    manifold,
    nearest,
    neighbours,
    precision_recall,
    uniform_noise,
)
from fastdiff.samplers import DDIMSampler
from fastdiff.schedule import NoiseSchedule


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def points(mean, covariance, n, seed=0):
    """Points whose sample mean and unbiased covariance are exactly these."""
    z = torch.randn(n, len(mean), dtype=torch.float64, generator=generator(seed))
    z = z - z.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T.cov()), z.T, upper=False)
    return white.T @ torch.linalg.cholesky(covariance).T + mean


def pixels(*shape, seed=0, high=256):
    return torch.randint(high, shape, dtype=torch.uint8, generator=generator(seed))


MEAN_A, MEAN_B = torch.tensor([0.5, -1.0]).double(), torch.tensor([2.0, 0.25]).double()
COV_A = torch.tensor([[2.0, 0.9], [0.9, 1.0]]).double()
COV_B = torch.tensor([[0.3, -0.2], [-0.2, 4.0]]).double()


def test_frechet_distance_of_two_gaussians_in_the_plane():
    # of a 2x2 matrix, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)); these covariances do not commute
    product = COV_A @ COV_B
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = (MEAN_A - MEAN_B).square().sum() + (COV_A + COV_B).trace() - 2 * root
    a, b = points(MEAN_A, COV_A, 50), points(MEAN_B, COV_B, 70, seed=1)
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)


def test_frechet_distance_of_independent_features_is_that_of_their_deviations():
    deviations_a = torch.linspace(1e-3, 3.0, 40).double()
    deviations_b = deviations_a.flip(0)
    zero = torch.zeros(40).double()
    a = points(zero, deviations_a.square().diag(), 200)
    b = points(zero, deviations_b.square().diag(), 100, seed=1)
    expected = (deviations_a - deviations_b).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_does_not_change_when_both_sets_are_moved():
    a, b = points(MEAN_A, COV_A, 50), points(MEAN_B, COV_B, 50, seed=1)
    distance = frechet_distance(a, b)
    turn, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=generator()))
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-12)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * distance, rel=1e-12)
    # five dimensions in which nothing varies: the covariances have no inverse
    wide = [x @ turn[:2] + 1e4 for x in (a, b)]
    assert frechet_distance(*wide) == pytest.approx(distance, rel=1e-8)
    few = [x[:5] @ turn[:2] for x in (a, b)]  # fewer points than dimensions
    assert frechet_distance(*few) == pytest.approx(frechet_distance(a[:5], b[:5]), rel=1e-10)
    assert frechet_distance(a, a) < 1e-12


@pytest.mark.parametrize("wrong", [torch.zeros(1, 3), torch.zeros(3), torch.full((4, 3), math.nan)])
def test_features_that_have_no_distance_are_refused(wrong):
    with pytest.raises(ValueError, match=r"^b: has"):
        frechet_distance(torch.zeros(4, 3), wrong)


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"^b: has 5 features, must have 3"):
        frechet_distance(torch.zeros(4, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"^fake: has 5 features, must have 3"):
        precision_recall(torch.zeros(4, 3), torch.zeros(4, 5))
    with pytest.raises(TypeError, match=r"^a: has dtype int64"):
        frechet_distance(torch.zeros(4, 3).long(), torch.zeros(4, 3))


def among(points, region, k):
    """Kynkäänniemi et al. 2019, eq. 1, point by point."""

    def distance(x, y):
        return math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)))

    radii = [sorted(distance(x, y) for j, y in enumerate(region) if j != i)[k - 1]
             for i, x in enumerate(region)]  # fmt: skip
    inside = [any(distance(p, x) <= r for x, r in zip(region, radii, strict=True)) for p in points]
    return sum(inside) / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_the_papers(k, monkeypatch):
    monkeypatch.setattr(manifold, "ROWS", 7)  # many blocks, the last one short
    real = torch.randn(40, 3, generator=generator())
    fake = 0.7 * torch.randn(30, 3, generator=generator(1)) + 0.5
    precision, recall = precision_recall(real, fake, k)
    assert precision == among(fake.tolist(), real.tolist(), k)
    assert recall == among(real.tolist(), fake.tolist(), k)
    assert 0 < recall < precision < 1  # so that neither is right by accident


def test_a_lost_mode_costs_recall_and_a_strange_one_precision():
    blob = torch.randn(200, 4, generator=generator())
    two = torch.cat([blob[:100], blob[100:] + 100])
    one = torch.randn(200, 4, generator=generator(1))
    precision, recall = precision_recall(real=two, fake=one)
    assert precision > 0.9 and 0.4 < recall <= 0.5
    assert precision_recall(real=one, fake=two) == (recall, precision)
    assert precision_recall(two, two) == (1.0, 1.0)
    assert precision_recall(blob, blob + 100) == (0.0, 0.0)


@pytest.mark.parametrize("k", [0, 5])
def test_k_must_leave_neighbours(k):
    with pytest.raises(
        ValueError, match=f"k={k}: must be 1 or more and less than (real's 9|fake's 5)"
    ):
        precision_recall(torch.zeros(9, 2), torch.zeros(5, 2), k)


def test_nearest_finds_what_a_search_of_all_pairs_finds(monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 3)
    monkeypatch.setattr(neighbours, "COLUMNS", 4)
    images, others = pixels(8, 2, 5, 5), pixels(13, 2, 5, 5, seed=1)
    images[5] = others[11]  # a copy
    index, distance = nearest(images, others)
    for image, i, d in zip(images, index, distance, strict=True):
        apart = [((image.double() - x) / 255).square().mean().sqrt().item() for x in others]
        assert apart[i] == min(apart) and d.item() == pytest.approx(min(apart), rel=1e-12)
    assert index[5] == 11 and distance[5] == 0


def test_nearest_converts_a_block_at_a_time_whatever_the_number_of_images(monkeypatch):
    """2,000 colour images of 64x64, 25 MB, took 779 MB more."""
    made = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            made.extend(x for x in tree_leaves(out) if torch.is_tensor(x))
            return out

    images, others = pixels(30, 2, 5, 5), pixels(43, 2, 5, 5, seed=1)
    expected = nearest(images, others)
    monkeypatch.setattr(neighbours, "VALUES", 7 * 50 + 3)
    with Watched():
        found = nearest(images, others)
    assert max(x.numel() for x in made if x.is_floating_point()) == 7 * 50
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    monkeypatch.setattr(neighbours, "VALUES", 1)  # less than an image has
    assert torch.equal(nearest(images, others)[0], expected[0])


def test_a_distance_of_one_is_black_against_white_at_any_size():
    for size in (2, 32):
        white = torch.full((1, 1, size, size), 255, dtype=torch.uint8)
        assert nearest(white, torch.zeros_like(white))[1].item() == 1.0


def test_nearest_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match=r"among \(2, 1, 4, 4\): must hold one or more images of"):
        nearest(pixels(2, 1, 5, 5), pixels(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"images: are torch.float32"):
        nearest(torch.zeros(2, 1, 5, 5), pixels(2, 1, 5, 5))


def test_a_blurred_point_is_a_square():
    image = torch.zeros(1, 1, 7, 7, dtype=torch.uint8)
    image[0, 0, 3, 3] = image[0, 0, 0, 6] = 90  # beyond the edge is black
    expected = torch.zeros(7, 7, dtype=torch.uint8)
    expected[2:5, 2:5] = expected[:2, 5:] = 10
    assert torch.equal(blurred(image)[0, 0], expected)


def test_classes_come_in_turn():
    labels = torch.tensor([2, 2, 2, 0, 1, 0, 1, 2, 1, 0])
    order = balanced(labels)
    assert order.tolist() == [3, 4, 0, 5, 6, 1, 9, 8, 2, 7]  # the first of each, the second, ...
    assert labels[order].tolist() == [0, 1, 2] * 3 + [2]


def mean_and_spread(images):
    x = images.double().flatten(1)
    return torch.stack([x.mean(1), x.std(1), x[:, 0]], 1)


def test_the_judge_tells_copies_from_new_images():
    training, test = pixels(300, 1, 4, 4), pixels(100, 1, 4, 4, seed=1)
    judge = Judge(training[:100], training, classifier=None, features=mean_and_spread)
    floor = judge.row("test", test, unseen=True)
    assert floor.close == 0.01 and floor.accuracy is None and floor.near > 0
    copied = judge.row("copies", training[:100])
    assert copied.close == 1 and copied.near == 0 and copied.fd < 1e-9
    assert copied.precision == copied.recall == 1
    mixed = judge.row("half copied", torch.cat([test[:50], training[:50]]))
    assert 0.5 <= mixed.close <= 0.52
    grey = judge.row("grey", torch.full_like(test, 128))
    assert grey.fd > 10 * floor.fd and grey.precision < floor.precision


def test_noise_is_uniform():
    noise = uniform_noise(torch.empty(100, 1, 32, 32))
    assert noise.dtype == torch.uint8 and len(noise.unique()) == 256
    assert noise.double().mean().item() == pytest.approx(127.5, abs=1)


def test_a_part_of_the_samples_is_made_apart():
    sampler = DDIMSampler(NoiseSchedule.cosine(100), 4, eta=1.0, prediction="x0")

    def model(x, t, label):
        return 0.5 * x + 0.1 * label[:, None, None, None]

    labels = torch.arange(7) % 3
    whole = torch.cat(list(draw_batches(model, sampler, (1, 4, 4), 7, labels, seed=3, batch=4)))
    assert whole.dtype == torch.uint8 and whole.shape == (7, 1, 4, 4)
    part = torch.cat(
        list(draw_batches(model, sampler, (1, 4, 4), 4, labels[3:], seed=3, batch=3, first=3))
    )
    assert torch.equal(whole[3:], part)
    assert not torch.equal(whole[0], whole[3])  # of one class


def test_images_without_pixels_are_nearest_to_nothing():
    with pytest.raises(ValueError, match="among"):
        nearest(*[torch.zeros(1, 1, 0, 0, dtype=torch.uint8)] * 2)


def test_a_seed_of_numpy_is_that_number():
    images = torch.zeros(2, 1, 3, 3, dtype=torch.uint8)
    assert torch.equal(uniform_noise(images, np.int64(5)), uniform_noise(images, 5))
