"""Images from uint8 memory on the GPU; the formula is in `fastdiff.ops.load_images`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import NARROW, Launch, launcher
from .tile import store, tile


@triton.jit
def load_images_kernel(
    out, images, index, flips, count, pad, shape, size, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """A program writes BLOCK elements of a sample in the order in which they lie in memory.

    size is (channels, height, width) of out. An index out of range makes its image NaN.
    """
    sample, elements = tile(shape, BLOCK)
    start, live = elements
    channels, height, width = size
    at = (start + tl.arange(0, BLOCK)).to(width.dtype)
    if LAST:
        c, x, y = at % channels, at // channels % width, at // channels // width
    else:
        x, y, c = at % width, at // width % height, at // width // height
    x, y, width, height = x - pad, y - pad, width - 2 * pad, height - 2 * pad
    inside = live & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    if flips is not None:
        x = tl.where(tl.load(flips + sample), width - 1 - x, x)
    chosen = tl.load(index + sample)
    known = (chosen >= 0) & (chosen < count)
    pointer, s0, s1, s2, s3 = images
    pixel = pointer + tl.where(known, chosen, 0) * s0
    pixel += c.to(tl.int64) * s1 + y.to(tl.int64) * s2 + x.to(tl.int64) * s3
    u = tl.load(pixel, inside, other=0).to(tl.float32)
    x0 = tl.where(known, tl.div_rn(2 * u - 255, 255.0), float("nan"))
    store(out, sample, elements, shape, x0)


def plan(
    images: Tensor,
    index: Tensor,
    flips: Tensor | None,
    pad: int,
    dtype: Any,
    channels_last: bool,
    out: Tensor,
) -> list[Launch]:
    elements = out[0].numel() if len(out) else 0

    def programs(blocks: Mapping[str, int]) -> tuple[int]:
        return (len(out) * triton.cdiv(elements, blocks["BLOCK"]),)

    args = {
        "out": (out, out.stride(0), 0, 0, 1),
        "images": (images, *images.stride()),
        "index": index,
        "flips": flips,
        "count": len(images),
        "pad": pad,
        "shape": (elements,),
        "size": tuple(out.shape[1:]),
        "LAST": channels_last,
    }
    return [Launch(load_images_kernel, NARROW, programs, args, out.device)]


launch = launcher(plan)
