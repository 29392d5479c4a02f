"""Pictures of any kind as uint8 pixels [C, H, W]."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

MODES = {1: "L", 3: "RGB"}


def read(path: Path, size: int, channels: int) -> NDArray[np.uint8]:
    """The first frame of an image file, turned as its EXIF says; see `of_picture`.

    Whatever pillow raises for a damaged file (almost anything), and ValueError for a picture of
    more than Image.MAX_IMAGE_PIXELS.
    """
    content = path.read_bytes()
    if not content:
        raise ValueError("the file is empty")
    try:
        picture: Image.Image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError("no picture, or of a kind that pillow cannot read") from None
    limit = Image.MAX_IMAGE_PIXELS
    if limit and picture.width * picture.height > limit:
        raise ValueError(f"{picture.width}x{picture.height} pixels, pillow's limit is {limit}")
    if picture.format == "PNG":
        picture.verify()  # checksums, which loading does not look at; it uses the picture up
        picture = Image.open(io.BytesIO(content))
    return of_picture(ImageOps.exif_transpose(picture), size, channels)


def of_picture(
    picture: Image.Image, size: int | None = None, channels: int | None = None
) -> NDArray[np.uint8]:
    """A picture as grey (1 channel) or RGB (3, or as it is), its middle square resized to `size`.

    Resizing is Lanczos', antialiased; a square of that size is left as it is. Transparent pixels
    are laid over black; 16 bits become 8; palettes, CMYK and the like become RGB. ValueError for
    32-bit and floating-point pixels, whose range nothing tells.
    """
    mode = picture.mode
    if mode.startswith("I;16"):  # pillow's own conversion would clip at 255
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    elif mode in ("I", "F"):
        raise ValueError(f"pixels of mode {mode}, whose range is not known; convert it to 8 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(black, picture)
    if channels is None:
        channels = 1 if mode in ("1", "L", "LA") or mode.startswith("I;16") else 3
    picture = picture.convert(MODES[channels])
    if size is not None and picture.size != (size, size):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        picture = square.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
