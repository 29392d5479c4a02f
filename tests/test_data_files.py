"""IDX, .npz and .npy files: mapped where they can be, and every way to be damaged."""

import gzip
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.cli import main
from fastdiff.data import READERS, ImageSet, fashion_mnist, idx_images, npz_images

SAMPLE = Path(__file__).parent / "data" / "fashion-mnist"
IMAGES = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), np.uint8)
LABELS = np.arange(50, dtype=np.uint8)


def mapped(path):
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("by_columns", [False, True])
def test_npz_is_mapped_unless_it_is_compressed(tmp_path, save, by_columns):
    path = tmp_path / "a.npz"
    images = np.asfortranarray(IMAGES) if by_columns else IMAGES
    save(path, labels=LABELS, images=images, other=np.arange(3.0))
    data = npz_images(path, flip=True, pad=1)
    assert mapped(path) == (save is np.savez)
    assert torch.equal(data.images, torch.from_numpy(IMAGES))
    assert torch.equal(data.labels, torch.arange(50))
    assert data.flip and data.shape == (3, 10, 10)
    plain = replace(data, flip=False).batch(0, 50, seed=0)[0]
    rows = data.indices(0, 50, seed=0)
    assert torch.allclose(plain[:, :, 1:-1, 1:-1] * 127.5 + 127.5, data.images[rows].float())


def test_npz_written_as_a_zip_by_hand_with_extra_fields(tmp_path):
    """Where the array starts depends on the member's own header, which may hold anything."""
    np.save(tmp_path / "images.npy", IMAGES)
    member = zipfile.ZipInfo("images.npy")
    member.extra = b"\x99\x99\x05\x00extra"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("notes.txt", "first")
        archive.writestr(member, (tmp_path / "images.npy").read_bytes())
    data = npz_images(tmp_path / "a.npz")
    assert mapped(tmp_path / "a.npz") and data.labels is None
    assert torch.equal(data.images, torch.from_numpy(IMAGES))


def test_npy_is_mapped(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    data = npz_images(tmp_path / "a.npy")
    assert mapped(tmp_path / "a.npy") and torch.equal(data.images, torch.from_numpy(IMAGES))
    data.images.zero_()
    assert np.array_equal(np.load(tmp_path / "a.npy"), IMAGES)  # the file is as it was


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_told_by_their_last_axis(tmp_path, channels):
    """As `fastdiff sample` writes them; and they are mapped all the same."""
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 6, channels), np.uint8)
    np.savez(tmp_path / "a.npz", images=pictures)
    data = npz_images(tmp_path / "a.npz", pad=1)
    right = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    assert mapped(tmp_path / "a.npz") and torch.equal(data.images, right)
    order, flips = torch.tensor([4, 0, 2]), torch.tensor([True, False, True])
    exact = ImageSet(right.contiguous(), pad=1).load(order, flips)
    for layout in (False, True):
        assert torch.equal(data.load(order, flips, channels_last=layout), exact)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("cut", [0, 10, 3000, -1])
def test_a_truncated_npz_is_named(tmp_path, save, cut):
    path = tmp_path / "a.npz"
    save(path, images=IMAGES, labels=LABELS)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a\.npz: cannot be read \(.+\); make or fetch it again"):
        npz_images(path)


def test_a_flipped_byte_in_a_compressed_npz_or_its_labels_is_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=IMAGES // 64)  # a random byte would be stored as it is
    content = path.read_bytes()
    for at in range(100, len(content) - 200, len(content) // 20):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"a\.npz: cannot be read"):
            npz_images(path)
    np.savez(path, images=IMAGES, labels=LABELS)
    content = path.read_bytes()
    at = content.rindex(bytes(range(50)))
    path.write_bytes(content[:at] + b"\1" + content[at + 1 :])
    with pytest.raises(ValueError, match=r"a\.npz: cannot be read \(Bad CRC-32"):
        npz_images(path)


@pytest.mark.parametrize("cut", [0, 5, 100, 1000])
def test_a_truncated_npy_is_named(tmp_path, cut):
    path = tmp_path / "a.npy"
    np.save(path, IMAGES)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a\.npy: cannot be read"):
        npz_images(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": IMAGES}, r"has \['x'\]; must have `images`"),
        ({"images": IMAGES / 255}, r"images float64 \(50, 3, 8, 8\); must be uint8"),
        ({"images": IMAGES.astype(np.uint16)}, "images uint16"),
        ({"images": IMAGES.astype(object)}, r"cannot be read \(.*bject"),
        ({"images": IMAGES[0]}, r"\(3, 8, 8\): must be uint8 \[N, C, H, W\]"),
        ({"images": IMAGES[:0]}, "N of 1 or more"),
        ({"images": IMAGES, "labels": LABELS / 2}, r"labels float64 \(50,\); must be integers"),
        ({"images": IMAGES, "labels": LABELS[:9]}, r"must be int64 \[50\]"),
        ({"images": IMAGES, "labels": LABELS.astype(np.int8) - 1}, "labels with -1"),
    ],
)
def test_arrays_of_the_wrong_kind_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"a\.npz: .*{message}"):
        npz_images(tmp_path / "a.npz")


def test_idx_is_mapped_unless_it_is_gzipped():
    plain, zipped = SAMPLE / "t10k-images-idx3-ubyte", SAMPLE / "train-images-idx3-ubyte.gz"
    test = idx_images(plain, SAMPLE / "t10k-labels-idx1-ubyte", pad=2)
    assert mapped(plain)
    raw = np.frombuffer(plain.read_bytes(), np.uint8, offset=16).reshape(20, 1, 28, 28)
    assert torch.equal(test.images, torch.from_numpy(raw.copy())) and test.shape == (1, 32, 32)
    whole = fashion_mnist(SAMPLE, "test")
    for a, b in zip(test.batch(1, 7, seed=0), whole.batch(1, 7, seed=0), strict=True):
        assert torch.equal(a, b)
    assert idx_images(zipped).labels is None and not mapped(zipped)


def test_damaged_idx_files_are_named(tmp_path):
    images, labels = SAMPLE / "train-images-idx3-ubyte.gz", SAMPLE / "t10k-labels-idx1-ubyte"
    with pytest.raises(
        ValueError, match=r"train-images-idx3-ubyte\.gz: 100 images, but .*: 20 lab"
    ):
        idx_images(images, labels)
    with pytest.raises(FileNotFoundError, match="nothing"):
        idx_images(tmp_path / "nothing")
    content = gzip.compress(gzip.decompress(images.read_bytes()))
    for at in (10, len(content) // 2, len(content) - 6):  # a block's kind, pixels, the checksum
        (tmp_path / "a.gz").write_bytes(content[:at] + bytes([content[at] ^ 6]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"a\.gz: truncated or damaged gzip file"):
            idx_images(tmp_path / "a.gz")


# through the command line

RECIPE = {
    "model": {"image_size": 8, "in_channels": 3, "channels": 8, "channel_mult": [1],
              "num_res_blocks": 1, "attention_resolutions": [], "num_classes": 50,
              "norm_groups": 4, "head_channels": 8},
    "schedule": {"name": "cosine", "T": 10},
    "train": {"steps": 2, "batch_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", ["npz", "folder", "idx"])
def test_a_recipe_trains_from_every_source(tmp_path, name, capsys):
    data, source = {"name": name}, tmp_path / "data"
    recipe = json.loads(json.dumps(RECIPE))
    if name == "npz":
        np.savez(source, images=IMAGES, labels=LABELS)
        source = tmp_path / "data.npz"
    elif name == "folder":
        for label in range(3):
            (source / f"class{label}").mkdir(parents=True)
            Image.fromarray(IMAGES[label].transpose(1, 2, 0)).save(source / f"class{label}/a.png")
        data |= {"size": 8, "cache": str(tmp_path / "cache.npy")}
    else:
        source = SAMPLE / "t10k-images-idx3-ubyte"
        data |= {"labels": str(SAMPLE / "t10k-labels-idx1-ubyte"), "pad": 2}
        recipe["model"] |= {"in_channels": 1, "image_size": 32}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"data": data}))
    command = ["train", "--config", tmp_path / "recipe.json", "--data", source]
    assert main([*map(str, command), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert "finished at step 2" in capsys.readouterr().out


def test_the_readers_of_recipes_are_named_in_the_error(tmp_path, capsys):
    assert sorted(READERS) == ["fashion-mnist", "folder", "idx", "npz"]
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE | {"data": {"name": "pngs"}}))
    command = ["train", "--config", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "run")]
    assert main(command) == 1
    assert "'fashion-mnist', 'folder', 'idx', 'npz'" in capsys.readouterr().err
