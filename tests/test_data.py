"""The readers against the sample in tests/data, and the order in which images are served."""

import gzip
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.data import FASHION_CLASSES, ImageSet, fashion_mnist, npz_images, read_idx

SAMPLE = Path(__file__).parent / "data" / "fashion-mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(SAMPLE, tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(("split", "count"), [("train", 100), ("test", 20)])
def test_reads_gzipped_and_plain_files(split, count):
    data = fashion_mnist(SAMPLE, split)
    assert data.images.shape == (count, 1, 28, 28) and data.images.dtype == torch.uint8
    assert data.class_names == FASHION_CLASSES and len(data) == count
    assert data.labels[0] == 9  # both splits begin with an ankle boot
    x0 = data.load(torch.arange(count))
    assert x0.shape[1:] == data.shape == (1, 32, 32)
    centre = fashion_mnist(SAMPLE, split, pad=0).load(torch.arange(count))
    assert torch.equal(x0[:, :, 2:-2, 2:-2], centre)
    assert (x0 + 1).sum() == (centre + 1).sum() > 0  # the padding is black


def test_pixels_are_the_files_bytes():
    raw = gzip.decompress((SAMPLE / "train-images-idx3-ubyte.gz").read_bytes())
    assert raw[:16] == bytes.fromhex("00000803 00000064 0000001c 0000001c")
    boot = np.frombuffer(raw, np.uint8, 784, 16).reshape(28, 28)
    assert np.array_equal(fashion_mnist(SAMPLE, pad=0).images[0, 0].numpy(), boot)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_finds_the_debian_package():
    data = fashion_mnist()
    assert len(data) == 60_000
    assert torch.equal(data.labels.bincount(), torch.full((10,), 6000))
    assert torch.equal(data.images[:100], fashion_mnist(SAMPLE).images)


def test_batches_are_scaled_and_every_image_is_seen_once_an_epoch():
    data = fashion_mnist(SAMPLE)
    numbered = ImageSet(data.images, torch.arange(100))
    labels = torch.cat([numbered.batch(step, 24, seed=3)[1] for step in range(25)])
    for epoch in labels.split(100):
        assert torch.equal(epoch.sort().values, torch.arange(100))
    assert not torch.equal(labels[:100], labels[100:200])
    x, index = numbered.batch(4, 24, seed=3)  # spans two epochs
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() <= 1
    torch.testing.assert_close((x + 1) * 127.5, data.images[index].float())


def test_a_batch_is_a_function_of_step_and_seed():
    first, later = fashion_mnist(SAMPLE, flip=True), fashion_mnist(SAMPLE, flip=True)
    for step in range(7):
        first.batch(step, 40, seed=1)
    for a, b in zip(first.batch(7, 40, seed=1), later.batch(7, 40, seed=1), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.batch(7, 40, seed=2)[1], later.batch(7, 40, seed=1)[1])


def test_a_batch_may_be_larger_than_the_set():
    data = ImageSet(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.arange(3))
    assert torch.equal(data.batch(0, 9, seed=0)[1].bincount(), torch.full((3,), 3))


def test_flip_mirrors_about_half():
    data = fashion_mnist(SAMPLE)
    x, _ = data.batch(0, 100, seed=0)
    mirrored, _ = fashion_mnist(SAMPLE, flip=True).batch(0, 100, seed=0)
    same = (mirrored == x).flatten(1).all(1)
    assert 30 <= same.sum() <= 70
    assert torch.equal(mirrored[~same], x[~same].flip(3))


def test_npz(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(5, dtype=np.uint8))
    data = npz_images(tmp_path / "a.npz")
    assert torch.equal(data.images, torch.from_numpy(images))
    assert torch.equal(data.labels, torch.arange(5))
    np.savez(tmp_path / "b.npz", pictures=images)
    with pytest.raises(ValueError, match=r"b.npz: has \['pictures'\]; must have `images`"):
        npz_images(tmp_path / "b.npz")
    with pytest.raises(FileNotFoundError, match=r"c.npz"):
        npz_images(tmp_path / "c.npz")


def test_missing_data_says_how_to_get_it(folder):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*dataset-fashion-mnist"):
        fashion_mnist(folder / "nowhere")
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="neither train-labels-idx1-ubyte nor"):
        fashion_mnist(folder)


def test_damaged_files_are_named(folder):
    path = folder / "t10k-images-idx3-ubyte"
    good = path.read_bytes()
    for content, complaint in (
        (good[:-1], r"holds 15679 values, its header says \(20, 28, 28\)"),
        (good + b"x", "holds 15681 values"),
        (good[:9], "truncated in its header"),
        (b"", "starts with nothing"),
        (b"PK\3\4" + good[4:], "starts with 50 4b 03 04.*00 00 08 03"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{complaint}"):
            fashion_mnist(folder, "test")
    zipped = folder / "train-images-idx3-ubyte.gz"
    for content in (zipped.read_bytes()[:1000], b"not gzip"):
        zipped.write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(zipped))}.*damaged gzip"):
            fashion_mnist(folder)
    with pytest.raises(ValueError, match="starts with 00 00 08 01"):
        read_idx(folder / "t10k-labels-idx1-ubyte", ndim=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(2, 1, 4, 4)}, "must be uint8"),
        ({"images": torch.zeros(2, 4, 4, dtype=torch.uint8)}, r"\(2, 4, 4\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "one an image"),
        ({"labels": torch.zeros(2)}, "must be int64"),
        ({"labels": torch.tensor([0, -1])}, "labels with -1"),
    ],
)
def test_bad_image_sets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageSet(**{"images": torch.zeros(2, 1, 4, 4, dtype=torch.uint8), **arguments})


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="split='valid': must be one of 'train', 'test'"):
        fashion_mnist(SAMPLE, "valid")
    with pytest.raises(ValueError, match="pad=-1"):
        fashion_mnist(SAMPLE, pad=-1)
