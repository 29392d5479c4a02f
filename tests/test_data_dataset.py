"""torch's datasets: every kind of item, unreadable ones, and those that are refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fastdiff.data import from_dataset

UINT8 = torch.randint(
    256, (6, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


class Items(Dataset):
    """A list as a dataset; an exception in it is raised."""

    classes = ("cat", "dog")

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        if isinstance(self.items[number], Exception):
            raise self.items[number]
        return self.items[number]


def read(*items, **how):
    return from_dataset(Items(*items), progress=False, **how)


@pytest.mark.parametrize("workers", [0, 2])
def test_tensors_with_labels(workers):
    data = from_dataset(
        TensorDataset(UINT8, torch.tensor([1, 0, 3, 3, 2, 0])),
        flip=True,
        pad=1,
        workers=workers,
        progress=False,
    )
    assert torch.equal(data.images, UINT8) and data.labels.tolist() == [1, 0, 3, 3, 2, 0]
    assert data.flip and data.shape == (3, 6, 7) and data.class_names == ()


def test_images_without_labels_and_the_names_of_classes():
    data = read(*UINT8)
    assert data.labels is None and torch.equal(data.images, UINT8)
    data = read((UINT8[0], 1), [UINT8[1], np.int32(0)], (UINT8[2], True))
    assert data.labels.tolist() == [1, 0, 1] and data.class_names == ("cat", "dog")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_become_the_bytes_that_they_stand_for(low, high, dtype):
    floats = (UINT8.double() / 255 * (high - low) + low).to(dtype)
    assert torch.equal(read(*floats, value_range=(low, high)).images, UINT8)
    with pytest.raises(TypeError, match=r"item 0: a floating-point tensor: pass value_range"):
        read(*floats)


def test_floats_out_of_range_are_skipped_and_named():
    good = torch.rand(3, 4, 5)
    nan, wide = good.clone(), good.clone()
    nan[0, 0, 0], wide[1, 1, 1] = torch.nan, 1.5
    with pytest.warns(UserWarning, match=r"Items: skipped 2 of 3: item 0 \(.*nan.*1 .*to 1.5"):
        data = read((nan, 0), (wide, 1), (good, 2), value_range=(0, 1))
    assert data.labels.tolist() == [2]


def test_pillows_pictures_as_they_are_or_in_the_channels_asked_for():
    rgb = Image.fromarray(UINT8[0].permute(1, 2, 0).numpy())
    grey = rgb.convert("L")
    assert torch.equal(read(rgb, rgb).images[1], UINT8[0])
    assert torch.equal(read(grey).images[0, 0], torch.from_numpy(np.array(grey)))
    assert torch.equal(read(rgb, grey, channels=1).images[0], read(grey).images[0])
    assert read(grey, rgb, channels=3).images.shape == (2, 3, 4, 5)
    with pytest.warns(UserWarning, match=r"item 1 \(shape \(1, 4, 5\), the first \(3, 4, 5\)\)"):
        assert len(read(rgb, grey)) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_items_are_skipped_and_named(workers):
    items = [OSError("gone"), (UINT8[0], 3), KeyError("x"), (UINT8[1][:, :2], 4), (UINT8[2], 5)]
    named = (
        r"Items: skipped 3 of 5: item 0 \(gone\); item 2 \('x'\); "
        r"item 3 \(shape \(3, 2, 5\), the first \(3, 4, 5\)\)$"
    )
    with pytest.warns(UserWarning, match=named):
        data = read(*items, workers=workers)
    assert data.labels.tolist() == [3, 5] and torch.equal(data.images, UINT8[[0, 2]])
    with pytest.raises(ValueError, match=r"Items: item 0: gone; mend or remove it"):
        read(*items, workers=workers, strict=True)
    with pytest.raises(ValueError, match=r"no image could be read of 1: item 0 \(gone\)"):
        read(items[0], workers=workers)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(UINT8)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (Stream(), TypeError, "Stream has no length"),
        (Items(), ValueError, "dataset: Items is empty"),
        (Items({"image": UINT8[0]}), TypeError, "item 0: dict is no image: must be pillow's"),
        (Items(UINT8[0].numpy()), TypeError, "ndarray is no image"),
        (Items(UINT8[0, 0]), TypeError, r"\(4, 5\) is no image"),
        (Items(UINT8[0].long()), TypeError, r"a tensor of torch\.int64"),
        (Items((UINT8[0], 1.5)), TypeError, "item 0: 'float' object"),
        (Items((UINT8[0], 1), UINT8[1]), TypeError, "1 of 2 items have a label; all must"),
        (Items((UINT8[0], -1)), ValueError, "labels with -1"),
    ],
)
def test_what_is_no_dataset_of_images_is_refused(dataset, error, message):
    with pytest.raises(error, match=message):
        from_dataset(dataset, progress=False)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="channels=2: must be one of 1, 3"):
        read(*UINT8, channels=2)
    with pytest.raises(ValueError, match=r"value_range=\(1, 0\)"):
        read(*UINT8, value_range=(1, 0))
