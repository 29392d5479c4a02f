"""Batches of images as grids, PNG files and animated pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import errors
from .files import write_bytes
from .spacing import count

LARGEST = 1 << 28  # pixels of a picture


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 [B, C, H, W] on the CPU, rounded, clamped; uint8 is left as is.

    Raises TypeError for numbers that are neither, which may be in any range.
    """
    if x.dtype == torch.uint8:
        return x.cpu()
    if not x.is_floating_point():
        raise TypeError(
            f"x: has dtype {x.dtype}, must be floating point in [-1, 1], or uint8 in 0 .. 255; "
            "convert it with .to()"
        )
    return x.detach().float().cpu().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def grid_size(
    shape: Sequence[int], columns: int | None = None, gap: int = 2, scale: int = 1
) -> tuple[int, int, int]:
    """How many images a row `grid` would put of x [B, C, H, W], and its height and width unscaled.

    Raises:
        ValueError, TypeError: what `grid` would raise for it.
    """
    if len(shape) != 4 or shape[1] not in (1, 3) or not shape[0]:
        raise ValueError(f"x of shape {tuple(shape)}: must be [B, 1 or 3, H, W], B of 1 or more")
    if columns is not None:
        columns = count("columns", columns, 1)
    gap = count("gap", gap, 0)
    scale = count("scale", scale, 1)
    batch, _, height, width = shape
    across = columns or math.ceil(math.sqrt(batch))
    down = math.ceil(batch / across)
    size = down * (height + gap) - gap, across * (width + gap) - gap
    if not 0 < size[0] * size[1] * scale**2 <= LARGEST:
        raise ValueError(
            f"columns={columns}, gap={gap}, scale={scale}: {batch} images of x, {height}x{width}, "
            f"make a picture of {size[0] * scale}x{size[1] * scale} pixels; takes 1 to {LARGEST:,}"
        )
    return across, *size


def grid(x: Tensor, columns: int | None = None, gap: int = 2, scale: int = 1) -> Image.Image:
    """One picture of a batch, row by row.

    Args:
        x: [B, C, H, W] in [-1, 1], or uint8, C of 1 (grey) or 3 (RGB), B of 1 or more.
        columns: images a row; the default is nearest to a square.
        gap: white pixels between images.
        scale: screen pixels a pixel, each way.

    Raises:
        ValueError, TypeError: another shape or dtype.
    """
    errors.is_tensor("x", x)
    across, *size = grid_size(x.shape, columns, gap, scale)
    _, channels, height, width = x.shape
    x = to_uint8(x)
    canvas = torch.full((channels, *size), 255, dtype=torch.uint8)
    for k, image in enumerate(x):
        top, left = k // across * (height + gap), k % across * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    pixels = canvas[0] if channels == 1 else canvas.permute(1, 2, 0)
    picture = Image.fromarray(pixels.numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_picture(picture: Image.Image, path: str | Path, **how: Any) -> None:
    """Write a picture whole or not at all; the name's ending gives the format.

    Args:
        picture: as `grid` makes it.
        path: ends as pillow writes pictures: .png, .gif, .webp, ...
        how: options of the format, as PIL.Image.Image.save takes them.

    Raises:
        ValueError: another ending.
        OSError: naming the path and what to do; what was there is as it was.
    """
    path, rendered = Path(path), io.BytesIO()
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"path={str(path)!r}: must end as pictures do, in .png, .gif or .webp")
    picture.save(rendered, kind, **how)
    write_bytes(path, rendered.getvalue())


def save_animation(
    frames: Sequence[Image.Image], path: str | Path, seconds: float = 3.0, hold: float = 1.5
) -> None:
    """Write frames as an animated picture that loops; the name's ending gives the format.

    Args:
        frames: pictures of one size, one or more.
        path: ends in .gif, .png or .webp.
        seconds: how long the frames take together.
        hold: how much longer the last one stays.

    Raises:
        ValueError: no frames, or another ending.
        OSError: as `save_picture`.
    """
    path = Path(path)
    if not frames:
        raise ValueError("frames: is empty, must hold one picture or more")
    if path.suffix not in (".gif", ".png", ".webp"):
        raise ValueError(f"path={str(path)!r}: must end in .gif, .png or .webp")
    times = [round(1000 * seconds / len(frames))] * len(frames)
    times[-1] += round(1000 * hold)
    more = {"save_all": True, "append_images": list(frames[1:]), "duration": times, "loop": 0}
    save_picture(frames[0], path, **more)
