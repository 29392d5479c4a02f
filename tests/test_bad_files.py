"""Damaged files of every kind that is read: named and refused, in little memory."""

import gzip
import json
import os
import resource
import shutil
import struct
import zipfile
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from generated import generated
from hypothesis import given
from PIL import Image

from fastdiff import NoiseSchedule, UNet, UNetConfig, load, save
from fastdiff.data import ShardedImages, folder_images, idx_images, npz_images
from fastdiff.data.shards import Shards
from fastdiff.files import read_tensors

TINY = UNetConfig(
    image_size=8, in_channels=1, channels=8, channel_mult=(1,), num_res_blocks=1,
    attention_resolutions=(), norm_groups=4,
)  # fmt: skip
REFUSED = ValueError, OSError
IMAGES = np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 1, 8, 8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file of each kind, and how it is read."""
    root = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    save(root / "model", UNet(TINY), NoiseSchedule.cosine(10), "v")
    header = struct.pack(">4B3I", 0, 0, 8, 3, 4, 8, 8)
    (root / "images-idx3-ubyte").write_bytes(header + IMAGES.tobytes())
    with gzip.open(root / "images.gz", "wb") as file:
        file.write(header + IMAGES.tobytes())
    np.savez(root / "plain.npz", images=IMAGES)
    np.savez_compressed(root / "packed.npz", images=IMAGES, labels=np.arange(4))
    np.save(root / "images.npy", IMAGES)
    (root / "pictures").mkdir()
    for k in range(2):
        Image.fromarray(IMAGES[k, 0]).save(root / "pictures" / f"{k}.png")
    shards = Shards(root / "shards", 4, (1, 8, 8), 2, {"seed": 0})
    shards.begin()
    for k in range(2):
        shards.write(k, torch.from_numpy(IMAGES[2 * k : 2 * k + 2]), torch.zeros(2).long())
    shards.finish()
    return root


def pictures(path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the one that is skipped
        return folder_images(path.parent, 8, 1, progress=False)


READERS = {
    "model/model.safetensors": lambda path: load(path.parent),
    "model/config.json": lambda path: load(path.parent),
    "images-idx3-ubyte": idx_images,
    "images.gz": idx_images,
    "plain.npz": npz_images,
    "packed.npz": npz_images,
    "images.npy": npz_images,
    "pictures/1.png": pictures,
    "shards/shard-000001.safetensors": lambda path: list(ShardedImages(path.parent)),
    "shards/job.json": lambda path: list(ShardedImages(path.parent)),
}
SEALED = ("model/model.safetensors", "shards/shard-000001.safetensors")  # every byte is checked
changes = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "zero", "huge"]),
        st.floats(0, 1),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def damaged(raw, what):
    raw = bytearray(raw)
    for how, place, value in what:
        at = min(int(place * len(raw)), max(0, len(raw) - 1))
        if how == "flip" and raw:
            raw[at] ^= value
        elif how == "cut":
            del raw[at:]
        elif how == "insert":
            raw[at:at] = bytes([value]) * (1 + value)
        elif how == "zero":
            raw[at : at + 8] = bytes(len(raw[at : at + 8]))
        elif how == "huge":
            raw[at : at + 8] = b"\xff" * len(raw[at : at + 8])
    return bytes(raw)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named_or_what_it_was(whole, name, tmp_path):
    folder = Path(name).parts[0]
    good = (whole / name).read_bytes()
    if (whole / folder).is_dir():
        shutil.copytree(whole / folder, tmp_path / folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @generated
    @given(changes)
    def tried(what):
        raw = damaged(good, what)
        (tmp_path / name).write_bytes(raw)
        try:
            READERS[name](tmp_path / name)
        except REFUSED as error:
            said = str(error)
            assert tmp_path.name in said or Path(name).name in said, said
        else:
            assert raw == good or name not in SEALED

    tried()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{grown} kB"


def test_oversized_headers_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated, or no safetensors"):
        read_tensors(path)
    path.write_bytes(struct.pack("<Q", 90_000_000) + b"{" + b" " * 1000)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_tensors(path)


@contextmanager
def packed_array(path, shape):
    """A compressed .npz whose images are said to be of this shape; yields where they go."""
    said = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, said)
        yield file


def test_decompression_bombs_are_refused(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = 1 << 30
    packed = tmp_path / "bomb.gz"
    with gzip.open(packed, "wb") as file:
        file.write(struct.pack(">4B3I", 0, 0, 8, 3, size >> 20, 1024, 1024))
        for _ in range(size >> 24):
            file.write(bytes(1 << 24))
    with pytest.raises(ValueError, match=r"bomb\.gz: .* bytes would become 1,073,741,824"):
        idx_images(packed)
    path = tmp_path / "bomb.npz"
    with packed_array(path, (size >> 20, 1, 1024, 1024)) as file:
        for _ in range(size >> 24):
            file.write(bytes(1 << 24))
    with pytest.raises(ValueError, match=r"bomb\.npz: .*would become 1,073,741,824"):
        npz_images(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{grown} kB"


def test_an_array_of_less_than_its_header_says_is_refused(tmp_path):
    path = tmp_path / "short.npz"
    with packed_array(path, (10**6, 3, 1024, 1024)) as file:
        file.write(bytes(100))
    with pytest.raises(ValueError, match=r"short\.npz: .*holds 100 bytes, its header says"):
        npz_images(path)


class Payload:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["FASTDIFF_PAYLOAD"]) / "ran"),)


def test_no_code_of_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_PAYLOAD", str(tmp_path))
    np.savez(tmp_path / "code.npz", images=np.array([Payload()], dtype=object))
    torch.save({"x": Payload()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    for read, name in ((npz_images, "code.npz"), (load, "model.safetensors")):
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_names_that_lead_out_of_a_folder_lead_nowhere(whole, tmp_path):
    shutil.copytree(whole / "shards", tmp_path / "shards")
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    manifest["shards"]["../../etc/passwd"] = {"first": 0, "count": 1, "checksum": "x"}
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(manifest))
    assert len(list(ShardedImages(tmp_path / "shards"))) == 4  # of numbers, whatever it says
    from fastdiff import cli

    assert cli.main(["verify", str(tmp_path / "shards")]) == 1
