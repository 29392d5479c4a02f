"""Folders of pictures: every kind that pillow reads, every way to be damaged, and the cache."""

import errno
import io
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff.data.folder
from fastdiff.data import folder_images

RANDOM = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)


def picture(seed=0, size=16):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def planes(pixels):
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def write(path, pixels, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)


def read(root, size=16, channels=3, **how):
    return folder_images(root, size, channels, progress=False, **how)


@pytest.fixture
def classes(tmp_path):
    """Two classes, of nested folders and with what is no picture; [b/1, b/2, c/deep/0]."""
    for seed, name in enumerate(("b/2.png", "c/deep/0.PNG", "b/1.png")):
        write(tmp_path / "set" / name, picture(seed))
    (tmp_path / "set" / "readme.txt").write_text("not a picture")
    (tmp_path / "set" / "b" / "._1.png").write_bytes(b"what a Mac leaves")
    return tmp_path / "set"


def test_a_class_is_a_top_subfolder_and_the_order_that_of_names(classes):
    data = read(classes)
    assert data.class_names == ("b", "c") and data.labels.tolist() == [0, 0, 1]
    for image, seed in zip(data.images, (2, 0, 1), strict=True):
        assert torch.equal(image, planes(picture(seed)))
    without = read(classes, classes=False)
    assert without.labels is None and torch.equal(without.images, data.images)
    inside = read(classes / "b", flip=True, pad=2)
    assert inside.labels is None and inside.flip and inside.shape == (3, 20, 20)


def test_a_picture_beside_classes_is_refused(classes):
    write(classes / "loose.png", picture())
    with pytest.raises(ValueError, match=r"loose\.png is in no subfolder.*classes=False"):
        read(classes)
    assert len(read(classes, classes=False)) == 4


def test_hidden_folders_are_left_out(classes):
    """Of a notebook's copies: they were the first class, and moved the labels of all others."""
    write(classes / ".ipynb_checkpoints" / "1-checkpoint.png", picture(7))
    write(classes / "b" / ".thumbnails" / "1.png", picture(8))
    data = read(classes)
    assert data.class_names == ("b", "c") and data.labels.tolist() == [0, 0, 1]
    hidden = read(classes / ".ipynb_checkpoints")  # asked for by name
    assert torch.equal(hidden.images[0], planes(picture(7)))


@pytest.mark.parametrize(
    ("link", "to"), [("set/c/loop", "."), ("set/b/up", ".."), ("elsewhere/out", "../set")]
)
def test_links_to_folders_are_followed_but_not_around(classes, tmp_path, link, to):
    write(tmp_path / "elsewhere" / "3.png", picture(3))
    (classes / "d").symlink_to(tmp_path / "elsewhere")
    (tmp_path / link).symlink_to(to)
    data = read(classes)
    assert data.class_names == ("b", "c", "d") and data.labels.tolist() == [0, 0, 1, 2]
    assert torch.equal(data.images[-1], planes(picture(3)))


def test_a_folder_that_cannot_be_listed_is_an_error(classes, monkeypatch):
    """Left out, it would have moved the labels of all after it; permission never lacks for root."""
    scandir = os.scandir

    def denied(path):
        if Path(path) == classes / "b":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match=rf"{classes}/b: cannot be listed \(Permission"):
        read(classes)


@pytest.mark.parametrize("size", [16, 64])
def test_the_middle_square_is_resized_antialiased(tmp_path, size):
    tall = np.random.default_rng(1).integers(0, 256, (60, 40, 3), np.uint8)
    write(tmp_path / "tall.png", tall)
    square = Image.fromarray(tall[10:50])
    expected = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))
    assert torch.equal(read(tmp_path, size).images[0], planes(expected))


def test_shrinking_keeps_the_mean_of_stripes_that_skipping_pixels_would_lose(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    write(tmp_path / "stripes.png", stripes)
    assert (read(tmp_path, 16).images.float() - 127.5).abs().max() < 16


def test_modes_become_rgb_or_grey(tmp_path):
    rgb = picture()
    alpha = np.full((16, 16), 255, np.uint8)
    alpha[:, :8] = 0
    hidden = np.where(alpha[..., None] > 0, rgb, 0)
    grey = rgb[..., 0]
    palette = Image.fromarray(rgb).quantize(16)
    deep = grey.astype(np.uint16) * 257
    cases = {
        "rgba.png": (np.dstack([rgb, alpha]), hidden),
        "palette.png": (palette, np.asarray(palette.convert("RGB"))),
        "grey.png": (grey, np.dstack([grey] * 3)),
        "deep.png": (deep, np.dstack([grey] * 3)),
        "bits.png": (Image.fromarray(grey > 99), np.dstack([255 * (grey > 99)] * 3)),
        "cmyk.tif": (Image.fromarray(255 - np.dstack([rgb, 0 * grey + 255]), "CMYK"), rgb),
    }
    for name, (source, _) in cases.items():
        image = source if isinstance(source, Image.Image) else Image.fromarray(source)
        image.save(tmp_path / name)
    data = read(tmp_path)
    for name, image in zip(sorted(cases), data.images, strict=True):
        assert torch.equal(image, planes(cases[name][1].astype(np.uint8))), name
    luma = np.asarray(Image.fromarray(rgb).convert("L"))
    write(tmp_path / "one" / "rgb.png", rgb)
    write(tmp_path / "one" / "z-deep.png", deep)
    one = read(tmp_path / "one", channels=1)
    assert torch.equal(one.images[:, 0], torch.from_numpy(np.stack([luma, grey])))


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read(tmp_path).images[0, :, 3, 3].tolist() == [255, 0, 0]


def test_a_photo_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    write(tmp_path / "a.png", picture(), exif=exif)
    assert torch.equal(read(tmp_path).images[0], planes(np.rot90(picture(), -1)))


def encoded(image, format):
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


PNG, JPEG = (encoded(Image.fromarray(RANDOM), format) for format in ("PNG", "JPEG"))
DAMAGED = {
    "cut.png": PNG[: len(PNG) // 2],
    "cut.jpg": JPEG[: len(JPEG) // 2],
    "cut.tif": encoded(Image.fromarray(RANDOM), "TIFF")[:50],
    "empty.png": b"",
    "html.jpg": b"<html>404 Not Found</html>",
    "flipped-header.png": flipped(PNG, 18),
    "flipped-pixels.png": flipped(PNG, len(PNG) // 2),
    "flipped-checksum.png": flipped(PNG, len(PNG) - 14),
    "head-only.jpg": JPEG[:20],
    "bomb.png": encoded(Image.new("1", (10_000, 10_000)), "PNG"),
    "large-bomb.png": encoded(Image.new("1", (20_000, 10_000)), "PNG"),
    "float.tif": encoded(Image.fromarray(np.ones((16, 16), np.float32)), "TIFF"),
    "gone.png": None,  # a link to nowhere
}


def damage(folder):
    for name, content in DAMAGED.items():
        if content is None:
            (folder / name).symlink_to(folder / "nothing")
        else:
            (folder / name).write_bytes(content)


def test_damaged_files_are_skipped_named_and_counted_once_and_labels_stay_right(classes):
    damage(classes / "b")
    with pytest.warns(UserWarning) as caught:
        data = read(classes)
    (warning,) = caught
    said = str(warning.message)
    assert said.startswith(f"{classes}: skipped 13 of 16: b/bomb.png (10000x10000 pixels, pillow's")
    assert said.endswith("; and 8 more") and said.count("; ") == 5
    assert data.labels.tolist() == [0, 0, 1]
    for image, seed in zip(data.images, (2, 0, 1), strict=True):
        assert torch.equal(image, planes(picture(seed)))


@pytest.mark.parametrize("name", DAMAGED)
def test_each_kind_of_damage_is_an_error_if_strict(classes, name):
    damage(classes / "b")
    for other in set(DAMAGED) - {name}:
        (classes / "b" / other).unlink()
    with pytest.raises(ValueError, match=rf"b/{name}: \S.*; mend or remove it") as caught:
        read(classes, strict=True)
    assert len(str(caught.value)) < 500 and " object at " not in str(caught.value)


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no images in it, nor below; takes \.png"):
        read(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image could be read of 1: a\.png \(the file is emp"):
        read(tmp_path)
    with pytest.raises(ValueError, match="no image could be read"):
        read(tmp_path, cache=tmp_path / "cache.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 2.5}, "size=2.5"),
        ({"channels": 4}, "channels=4: must be one of 1, 3"),
        ({"cache": "set.npz"}, r"cache='set\.npz': must end in \.npy"),
        ({"pad": -1}, "pad=-1"),
    ],
)
def test_bad_arguments_are_refused(classes, how, message):
    with pytest.raises(ValueError, match=message):
        read(classes, **how)


# the cache


@pytest.fixture
def decodes(monkeypatch):
    """The names that were decoded since it was last cleared."""
    names, real = [], fastdiff.data.folder.pixels.read

    def counted(path, *how):
        names.append(path.name)
        return real(path, *how)

    monkeypatch.setattr(fastdiff.data.folder.pixels, "read", counted)
    return names


def test_a_second_start_maps_the_cache_and_decodes_nothing(classes, tmp_path, decodes):
    damage(classes / "b")
    cache = tmp_path / "new" / "set.npy"
    with pytest.warns(UserWarning, match="skipped 13 of 16"):
        plain = read(classes)
    with pytest.warns(UserWarning, match="skipped 13 of 16"):
        first = read(classes, cache=cache)
    decodes.clear()
    with pytest.warns(UserWarning, match="skipped 13 of 16"):
        second = read(classes, cache=cache)
    assert not decodes
    for data in (first, second):
        assert torch.equal(data.images, plain.images) and torch.equal(data.labels, plain.labels)
        assert data.class_names == plain.class_names
        assert str(cache) in Path("/proc/self/maps").read_text()
    assert np.array_equal(np.load(cache), plain.images.numpy())  # a plain .npy to others
    assert [path.name for path in cache.parent.iterdir()] == ["set.npy"]
    with pytest.raises(ValueError, match="mend or remove"):
        read(classes, cache=cache, strict=True)


def test_the_cache_is_made_again_when_anything_changed(classes, tmp_path, decodes):
    cache = tmp_path / "set.npy"

    def again(size=16, **how):
        decodes.clear()
        data = read(classes, size, cache=cache, **how)
        assert data.images.shape[2] == size
        return len(decodes), data

    assert again()[0] == 3 and again()[0] == 0
    assert again(classes=False)[0] == 0 and again(pad=3)[0] == 0  # not of the pixels
    write(classes / "b" / "1.png", picture(7))
    count, data = again()
    assert count == 3 and torch.equal(data.images[0], planes(picture(7)))
    write(classes / "c" / "new.png", picture(8))
    assert again()[0] == 4 and again()[0] == 0
    (classes / "c" / "new.png").rename(classes / "b" / "new.png")
    assert again()[0] == 4
    assert again(32)[0] == 4 and again(32, channels=1)[0] == 4


def test_the_cache_is_made_again_when_what_a_link_leads_to_changed(tmp_path, decodes):
    write(tmp_path / "elsewhere.png", picture(0))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.png").symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "set" / "1.png").symlink_to(tmp_path / "nothing.png")
    for seed, count in ((0, 2), (0, 0), (5, 2)):
        if seed:
            write(tmp_path / "elsewhere.png", picture(seed))
        decodes.clear()
        with pytest.warns(UserWarning, match="skipped 1 of 2"):
            data = read(tmp_path / "set", cache=tmp_path / "set.npy")
        assert torch.equal(data.images[0], planes(picture(seed))) and len(decodes) == count


def test_a_byte_of_a_cache_that_changed_is_no_pixel(classes, tmp_path, decodes):
    cache = tmp_path / "set.npy"
    expected = read(classes, cache=cache)
    whole, images = cache.read_bytes(), expected.images.clone()
    for at in (*range(130), 500, 1500, *range(len(whole) - 120, len(whole))):
        cache.write_bytes(flipped(whole, at))
        decodes.clear()
        data = read(classes, cache=cache)
        assert len(decodes) == 3 and torch.equal(data.images, images), at
        assert torch.equal(data.labels, expected.labels)
    assert cache.read_bytes() == whole


def test_what_a_killed_process_left_of_a_cache_is_removed(classes, tmp_path):
    code = (
        "import os, signal\n"
        "from fastdiff.data import folder, folder_images\n"
        "folder.pixels.read = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"folder_images({str(classes)!r}, 16, cache={str(tmp_path / 'set.npy')!r})"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the set, and what it had begun
    read(classes, cache=tmp_path / "set.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "set.npy"]


def test_names_that_are_no_text_are_cached_too(classes, tmp_path, decodes):
    (classes / "b" / "1.png").rename(classes / "b" / os.fsdecode(b"\xff.png"))
    (classes / "c" / os.fsdecode(b"\xfe.png")).write_bytes(b"no picture")
    for _ in range(2):
        with pytest.warns(UserWarning, match="skipped 1 of 4"):
            data = read(classes, cache=tmp_path / "set.npy")
        assert torch.equal(data.images[1], planes(picture(2))) and len(decodes) == 4


@pytest.mark.parametrize("kept", [0, 20, 128, 500, -1])
def test_a_damaged_cache_is_made_again(classes, tmp_path, decodes, kept):
    cache = tmp_path / "set.npy"
    expected = read(classes, cache=cache).images.clone()
    cache.write_bytes(cache.read_bytes()[:kept])
    decodes.clear()
    assert torch.equal(read(classes, cache=cache).images, expected) and len(decodes) == 3


def test_a_cache_that_cannot_be_written_is_named_and_leaves_nothing(classes, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file: not written: is a file.*; choose"):
        read(classes, cache=tmp_path / "file" / "set.npy")


def test_running_out_of_disk_is_an_error_that_leaves_nothing(classes, tmp_path):
    resource = pytest.importorskip("resource", reason="needs Unix")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"set\.npy: not written: File too large"):
            read(classes, cache=tmp_path / "set.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_images_written_to_memory_that_is_mapped_do_not_reach_the_file(classes, tmp_path):
    read(classes, cache=tmp_path / "set.npy").images.zero_()
    assert read(classes, cache=tmp_path / "set.npy").images.any()


def test_many_images_on_many_threads_keep_their_order(tmp_path):
    for number in range(100):
        write(tmp_path / f"{number:03}.png", np.full((8, 8, 3), number, np.uint8))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = read(tmp_path, 8)
    torch.set_num_threads(before)
    assert data.images[:, 0, 0, 0].tolist() == list(range(100))


@pytest.mark.parametrize("channels", [1.0, True])
def test_what_equals_a_number_of_channels_is_none(tmp_path, channels):
    with pytest.raises(ValueError, match="channels="):
        folder_images(tmp_path, 8, channels=channels)
