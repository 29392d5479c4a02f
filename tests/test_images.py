"""Grids and animations, read back from their files."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.images import grid, save_animation, save_picture, to_uint8


def test_levels_are_rounded_and_clamped():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 1.0, 7.0]).view(1, 1, 1, -1)
    assert to_uint8(x).flatten().tolist() == [0, 0, 0, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(every.float() / 127.5 - 1), every)


def test_grid_places_images_row_by_row(tmp_path):
    x = torch.linspace(-1, 0.9, 5).view(5, 1, 1, 1).expand(5, 1, 3, 4)
    grid(x, columns=3, gap=2).save(tmp_path / "grid.png")
    picture = Image.open(tmp_path / "grid.png")
    assert picture.size == (3 * 4 + 2 * 2, 2 * 3 + 2) and picture.mode == "L"
    levels = to_uint8(x)[:, 0, 0, 0].tolist()
    for k in range(5):
        assert picture.getpixel((k % 3 * 6, k // 3 * 5)) == levels[k]
    assert picture.getpixel((4, 0)) == picture.getpixel((12, 5)) == 255  # gap and empty place


def test_grid_of_colours_is_near_a_square():
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(7, 3, 2, 2)
    picture = grid(red, gap=0)
    assert picture.size == (6, 6) and picture.getpixel((5, 3)) == (255, 0, 0)


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_animation(tmp_path, ending):
    frames = [grid(torch.full((1, 1, 8, 8), level)) for level in (-1.0, 0.0, 1.0)]
    save_animation(frames, tmp_path / f"a.{ending}", seconds=0.3, hold=1.0)
    with Image.open(tmp_path / f"a.{ending}") as movie:
        assert movie.n_frames == 3
        movie.seek(2)
        movie.load()
        assert movie.info["duration"] == pytest.approx(1100, abs=1)
        assert movie.convert("L").getpixel((4, 4)) > 250


def test_bad_input_is_refused(tmp_path):
    for shape in ((1, 2, 4, 4), (1, 4, 4), (0, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"x of shape"):
            grid(torch.zeros(shape))
    for dtype in (torch.int64, torch.bool, torch.complex64):  # 0 .. 255, or what?
        with pytest.raises(TypeError, match=f"x: has dtype {dtype}, must be floating point"):
            grid(torch.ones(1, 1, 4, 4, dtype=dtype))
    with pytest.raises(ValueError, match="columns=0"):
        grid(torch.zeros(1, 1, 4, 4), columns=0)
    frame = grid(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="frames: is empty"):
        save_animation([], tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"a\.avi"):
        save_animation([frame], tmp_path / "a.avi")


def test_sizes_of_numpy_are_numbers_of_any_size():
    with pytest.raises(ValueError, match="columns=9223372036854775808"):
        grid(torch.zeros(1, 1, 2, 2), columns=2**63, gap=np.int64(1))


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path):
    resource = pytest.importorskip("resource", reason="needs Unix")
    frames = [grid(torch.full((1, 1, 99, 99), level)) for level in (-1.0, 1.0)]
    noise = grid(torch.rand(9, 3, 32, 32))
    for name in ("a.png", "a.gif"):
        save_picture(frames[0], tmp_path / name)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=r"a\.png: not written: File too large"):
            save_picture(noise, tmp_path / "a.png")
        with pytest.raises(OSError, match=r"a\.gif: not written: File too large"):
            save_animation(frames, tmp_path / "a.gif")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


@pytest.mark.parametrize("name", ["a", "a.avi", "a.psd"])  # pillow reads .psd, and no more
def test_a_name_that_is_no_pictures_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"path=.*{name}': must end as pictures do"):
        save_picture(grid(torch.zeros(1, 1, 4, 4)), tmp_path / name)
