"""Batches dealt to several processes, and labels dropped: functions of (seed, step, place)."""

import numpy as np
import pytest
import torch

from fastdiff.data import ImageSet, drop_labels

SET = ImageSet(
    torch.arange(101 * 12).remainder(251).to(torch.uint8).reshape(101, 1, 3, 4),
    torch.arange(101),
    flip=True,
)


@pytest.mark.parametrize("world", [1, 2, 3, 24])
def test_the_parts_of_all_processes_are_the_batch_of_one(world):
    for step in (0, 4, 17):  # 4 spans two epochs
        whole, labels = SET.batch(step, 24, seed=5)
        parts = [SET.batch(step, 24, 5, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([x for x, _ in parts]), whole)
        assert torch.equal(torch.cat([y for _, y in parts]), labels)
        index = [SET.indices(step, 24, 5, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat(index), labels)  # a label is its image's index here


def test_the_order_is_numpys_permutations_by_hand():
    epochs = [np.random.default_rng([5, epoch, 0]).permutation(101) for epoch in range(3)]
    order = torch.from_numpy(np.concatenate(epochs))
    for step in range(12):
        assert torch.equal(SET.indices(step, 24, 5), order[24 * step : 24 * (step + 1)])


def test_what_is_mirrored_depends_on_the_place_and_not_on_the_batchs_size():
    def mirrored(size):
        plain, _ = ImageSet(SET.images).batch(0, size, seed=5)
        return (SET.batch(0, size, seed=5)[0] != plain).flatten(1).any(1)

    assert 20 < mirrored(80).sum() < 60
    assert torch.equal(mirrored(80)[:30], mirrored(30))


def test_labels_are_dropped_with_their_probability_by_place():
    labels = torch.arange(20_000)
    kept = drop_labels(labels, 0.1, seed=3, step=7)
    dropped = kept == -1
    assert abs(dropped.double().mean() - 0.1) < 5 * (0.09 / 20_000) ** 0.5
    assert torch.equal(kept[~dropped], labels[~dropped])
    assert torch.equal(drop_labels(labels[600:700], 0.1, 3, 7, first=600), kept[600:700])
    assert not torch.equal(drop_labels(labels, 0.1, 3, 8), kept)
    assert not torch.equal(drop_labels(labels, 0.1, 4, 7), kept)
    assert torch.equal(drop_labels(labels, 0.0, 3, 7), labels)
    assert (drop_labels(labels, 1.0, 3, 7) == -1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 24, 5, 0, 5), "size=24: must be a multiple of world=5"),
        ((0, 0, 5), "size=0"),
        ((0, 24, 5, 2, 2), r"rank=2: must be in \[0, world\)"),
        ((0, 24, 5, -1, 2), "rank=-1"),
    ],
)
def test_parts_that_do_not_divide_a_batch_are_refused(arguments, message):
    for call in (SET.batch, SET.indices):
        with pytest.raises(ValueError, match=message):
            call(*arguments)
    with pytest.raises(ValueError, match="probability=1"):
        drop_labels(torch.arange(3), 1.5, 0, 0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_is_mirrored_padded_and_scaled_as_numpy_does_by_hand(dtype, channels_last):
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 5, 7), np.uint8)
    data = ImageSet(torch.from_numpy(images), flip=True, pad=2)
    assert data.shape == (3, 9, 11)
    x, _ = data.batch(3, 24, 9, 1, 2, dtype=dtype, channels_last=channels_last)
    order = np.concatenate([np.random.default_rng([9, e, 0]).permutation(50) for e in range(2)])
    coins = np.random.default_rng([9, 3, 1]).random(24) < 0.5
    places = range(12, 24)
    assert 0 < coins[places].sum() < 12
    expected = np.full((12, 3, 9, 11), -1.0)
    for row, place in enumerate(places):
        image = images[order[72 + place]] / 127.5 - 1
        expected[row, :, 2:-2, 2:-2] = image[..., ::-1] if coins[place] else image
    assert x.dtype == dtype
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert x.is_contiguous(memory_format=layout)
    assert torch.equal(x, torch.from_numpy(expected).to(dtype))  # to the last bit


def test_a_batch_is_read_from_a_mapped_file_without_the_rest_of_it(tmp_path):
    """A sparse file, larger than memory would be: only the batch's pages are there."""
    shape = (1 << 22, 3, 64, 64)  # 48 GiB
    file = np.memmap(tmp_path / "sparse", np.uint8, "w+", shape=shape)
    data = ImageSet(torch.from_numpy(file))
    index = data.indices(0, 4, seed=1)
    file[index.numpy()] = np.arange(4, dtype=np.uint8)[:, None, None, None] + 1
    x, _ = data.batch(0, 4, seed=1)
    assert torch.equal((x[:, 0, 0, 0] * 127.5 + 127.5).round(), torch.tensor([1.0, 2, 3, 4]))
