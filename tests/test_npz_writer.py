"""Images written batch by batch are the .npz that numpy would write, or nothing."""

import numpy as np
import pytest
import torch

from fastdiff.cli import main
from fastdiff.data.npz import npz_writer


def test_batches_make_the_file_that_numpy_reads(tmp_path):
    path = tmp_path / "x.npz"
    images = torch.randint(256, (7, 3, 4, 5), dtype=torch.uint8)
    labels = torch.arange(7)
    with npz_writer(path, (7, 4, 5, 3), labels) as add:
        for part in images.split(3):
            assert not path.exists()
            add(part)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    with np.load(path, allow_pickle=False) as found:
        assert sorted(found) == ["images", "labels"]
        assert np.array_equal(found["images"], images.permute(0, 2, 3, 1).numpy())
        assert found["labels"].tolist() == list(range(7)) and found["labels"].dtype == np.int64


@pytest.mark.parametrize("count", [6, 8])
def test_a_set_that_is_not_whole_leaves_what_was_there(tmp_path, count):
    path = tmp_path / "x.npz"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=r"x.npz: got \d+ bytes of images, must be 28"):  # noqa: SIM117
        with npz_writer(path, (7, 2, 2, 1)) as add:
            add(torch.zeros(count, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(KeyboardInterrupt), npz_writer(path, (7, 2, 2, 1)):
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_the_command_writes_the_same_images_in_any_batches(tmp_path):
    words = ["sample", "--num", "7", "--steps", "2", "--engine", "off"]
    for batch in ("7", "3"):
        assert main([*words, "--batch", batch, "--out", str(tmp_path / f"{batch}.npz")]) == 0
    whole, parts = (np.load(tmp_path / f"{batch}.npz") for batch in ("7", "3"))
    assert whole["images"].shape == (7, 32, 32, 1)
    assert np.abs(whole["images"].astype(int) - parts["images"]).max() <= 1
    assert whole["labels"].tolist() == parts["labels"].tolist() == list(range(7))
