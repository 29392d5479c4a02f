"""Image sets from folders of pictures, decoded once."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ..errors import one_of, path
from . import cache as caches
from . import pixels
from .image_set import ImageSet
from .skipped import Skipped

ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
    *(".jp2", ".avif", ".tga"),
)
LARGEST = 1 << 14  # pixels of a side
VERSION = 1  # of what `pixels.read` makes of a file; caches of another are made again


def folder_images(
    folder: str | Path,
    size: int,
    channels: int = 3,
    *,
    classes: bool = True,
    cache: str | Path | None = None,
    flip: bool = False,
    pad: int = 0,
    strict: bool = False,
    progress: bool = True,
) -> ImageSet:
    """The pictures of a folder and those below it, in the order of their names.

    Hidden files and folders are left out, and so are links to a folder that they are in. Each
    picture is cut to its middle square, resized (Lanczos', antialiased), and made grey or RGB;
    transparent pixels are laid over black, and of an animation the first frame is taken. A file
    that cannot be read (damaged, empty, a decompression bomb) is skipped, and one warning at the
    end names and counts those; labels stay right.

    Args:
        folder: with a subfolder a class, or with pictures only.
        size: height and width of the images.
        channels: 1 (grey) or 3 (RGB).
        classes: a picture's label is its top subfolder, by the order of their names; if false, or
            without subfolders, there are none.
        cache: a .npy file to keep the decoded images in. It is mapped, so the set need not fit in
            RAM, and the second time only its checksum is taken; it is made again when it is
            damaged, or when a picture, or how they are read, has changed.
        flip, pad: see ImageSet.
        strict: an unreadable file is an error.
        progress: show a bar.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: a folder in it cannot be listed, or the cache not be written.
        ValueError: it holds no picture that can be read, or some in subfolders and some not.
    """
    root = path("folder", folder)
    if type(size) is not int or not 1 <= size <= LARGEST:
        raise ValueError(f"size={size!r}: must be an int from 1 to {LARGEST}")
    one_of("channels", channels, pixels.MODES)
    if cache is not None and path("cache", cache).suffix != ".npy":
        raise ValueError(f"cache={str(cache)!r}: must end in .npy")
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder of images")
    names = _names(root)
    label_of = _labels(root, names) if classes else {}
    skipped = Skipped(str(root), len(names), strict)
    kept: list[int] = []

    def decoded() -> Iterator[NDArray[np.uint8]]:
        """The readable ones; `kept` gets the number of each."""
        results = _in_threads(lambda name: pixels.read(root / name, size, channels), names)
        bar = tqdm(results, root.name, len(names), unit="image", disable=not progress)
        for number, result in enumerate(bar):
            try:
                image = result.result()
            except Exception as error:  # pillow raises almost anything for a damaged file
                skipped.add(names[number], str(error) or type(error).__name__)
            else:
                kept.append(number)
                yield image
        skipped.report()

    shape = (channels, size, size)
    if cache is None:
        images = np.empty((len(names), *shape), np.uint8)
        for row, image in enumerate(decoded()):
            images[row] = image
        images = images[: len(kept)]
    else:
        key = _key(root, names, shape)
        found = caches.read(Path(cache), key)
        if found is None or (strict and found[1]["skipped"]):
            record = {"key": key, "kept": kept, "skipped": skipped.reasons}
            caches.write(Path(cache), decoded(), shape, record, len(names))
            found = caches.read(Path(cache), key)
            assert found is not None
        else:
            kept, skipped.reasons = found[1]["kept"], found[1]["skipped"]
            skipped.report()
        images = found[0]
    labels = torch.tensor([label_of[names[number]] for number in kept]) if label_of else None
    class_names = tuple(sorted({_class(name) for name in label_of}))
    return ImageSet(torch.from_numpy(images), labels, class_names, flip, pad)


def _names(root: Path) -> list[str]:
    """The pictures below a folder, sorted; hidden ones are left out."""
    found = []
    for folder, below, files in os.walk(root, onerror=_refuse, followlinks=True):
        place = Path(folder)
        below[:] = [n for n in below if not n.startswith(".") and not _loops(place / n, root)]
        inside = place.relative_to(root)
        found += [
            (inside / file).as_posix()
            for file in files
            if file.lower().endswith(ENDINGS) and not file.startswith(".")
        ]
    if not found:
        raise ValueError(f"{root}: no images in it, nor below; takes {', '.join(ENDINGS)}")
    return sorted(found)


def _refuse(error: OSError) -> NoReturn:
    """Without one of them, the classes would be others."""
    message = f"{error.filename}: cannot be listed ({error.strerror}); allow reading, or remove it"
    raise OSError(error.errno, message) from error


def _loops(folder: Path, root: Path) -> bool:
    """Whether a folder is one that it is in: links lead there, and on without end."""
    above = [place for place in folder.parents if place.is_relative_to(root)]
    return any(place.samefile(folder) for place in above)


def _class(name: str) -> str:
    return name.split("/")[0]


def _labels(root: Path, names: Sequence[str]) -> dict[str, int]:
    """Of each picture; empty if all are in the folder itself."""
    loose = [name for name in names if "/" not in name]
    if len(loose) == len(names):
        return {}
    if loose:
        raise ValueError(
            f"{root}: {loose[0]} is in no subfolder, others are; a subfolder is a class: move it "
            "into one, or pass classes=False"
        )
    number = {name: label for label, name in enumerate(sorted(set(map(_class, names))))}
    return {name: number[_class(name)] for name in names}


def _key(root: Path, names: Sequence[str], shape: tuple[int, ...]) -> str:
    """What changes when a picture, or the way of reading, does."""
    digest = hashlib.sha256(f"{VERSION} {shape}".encode())
    for name in names:
        try:
            about = os.stat(root / name)
        except OSError:  # a link to nowhere
            about = os.lstat(root / name)
        digest.update(b"\0%b\0%d\0%d" % (os.fsencode(name), about.st_size, about.st_mtime_ns))
    return digest.hexdigest()


def _in_threads(work: Callable[[str], Any], items: Sequence[str]) -> Iterator[Future[Any]]:
    """Each item's result in order; some are made ahead, never all: they need not fit in RAM."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # pillow's of damaged files, which are named at the end
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
