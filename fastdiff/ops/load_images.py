"""Chosen images of a set in uint8 memory, as a network takes them, in one pass.

    x0 = (2 u - 255) / 255        u: images[index], mirrored where flipped; 0 in the padding

0 .. 255 become -1 .. 1. One read of uint8 and one write: no gathered, converted, mirrored or padded
copy is made on the way. The division is exact, so all backends give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..op import Case, Op
from .layout import DTYPES, element_bytes

MOST_PAD = 4096  # pixels on a side: far beyond any image, far from an address that overflows


def reference(
    images: Tensor,
    index: Tensor,
    flips: Tensor | None,
    pad: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor]:
    u = images[index]
    if flips is not None:
        u = torch.where(flips[:, None, None, None], u.flip(3), u)
    u = torch.nn.functional.pad(u, (pad, pad, pad, pad)).float()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return (((2 * u - 255) / 255).to(dtype).contiguous(memory_format=layout),)


def _allocate(
    images: Tensor, index: Tensor, flips: Any, pad: int, dtype: torch.dtype, channels_last: bool
) -> tuple[Tensor]:
    _, channels, height, width = images.shape
    return (
        torch.empty(
            (index.shape[0], channels, height + 2 * pad, width + 2 * pad),
            dtype=dtype,
            device=images.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        ),
    )


def _described(
    images: Tensor,
    index: Tensor,
    flips: Tensor | None,
    pad: int,
    dtype: torch.dtype,
    channels_last: bool,
    out: Tensor,
) -> tuple[Any, ...]:
    return (
        images.data_ptr(),
        len(images),
        images.stride(),
        index.data_ptr(),
        0 if flips is None else flips.data_ptr(),
        pad,
        tuple(out.shape),
        (out.data_ptr(), DTYPES[out.dtype], out.stride()),
    )


def _cases() -> list[Case]:
    def case(name: str, *size: int, batch: int = 3, dtype: Any = torch.float32, **how: Any) -> Case:
        def inputs(device: str) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(0)
            images = torch.randint(256, size, dtype=torch.uint8, generator=generator).to(device)
            if how.get("strided"):
                images = images.repeat_interleave(2, -1)[..., ::2]
            if how.get("from_last"):
                images = images.contiguous(memory_format=torch.channels_last)
            index = torch.randint(size[0], (batch,), generator=generator).to(device)
            flips = torch.arange(batch, device=device) % 2 == 0 if how.get("flip") else None
            return images, index, flips, how.get("pad", 0), dtype, how.get("last", False)

        return Case(name, inputs, how.get("large", False))

    return [
        case("plain", 5, 3, 8, 10),
        case("flip", 5, 3, 8, 10, flip=True),
        case("flip-pad", 7, 1, 28, 28, flip=True, pad=2),
        case("last", 5, 3, 8, 10, flip=True, pad=1, last=True),
        case("bf16", 5, 3, 15, 17, flip=True, dtype=torch.bfloat16),
        case("bf16-last", 5, 3, 15, 17, flip=True, pad=3, last=True, dtype=torch.bfloat16),
        case("fp16", 5, 2, 7, 9, pad=1, dtype=torch.float16),
        case("strided", 4, 3, 6, 5, strided=True, flip=True),
        case("from-last", 4, 3, 6, 5, from_last=True, flip=True, last=True),
        case("one", 1, 1, 1, 1, batch=1),
        case("empty", 2, 3, 8, 8, batch=0),
        case("large", 512, 3, 64, 64, batch=256, flip=True, large=True),
    ]


OP = Op(
    name="load_images",
    inputs="Tensor images, Tensor index, Tensor? flips, int pad, ScalarType dtype, "
    "bool channels_last",
    outputs=("x0",),
    reference=reference,
    allocate=_allocate,
    described=_described,
    cases=_cases,
    moved=lambda images, index, flips, *how: (
        len(index) * images[0].numel() + element_bytes(_allocate(images, index, flips, *how)[0])
    ),
)


def check_pad(pad: int) -> None:
    """Raise ValueError unless images can be padded with so much."""
    if type(pad) is not int or not 0 <= pad <= MOST_PAD:
        raise ValueError(f"pad={pad!r}: must be an int from 0 to {MOST_PAD}")


def load_images(
    images: Tensor,
    index: Tensor,
    flips: Tensor | None = None,
    pad: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """images[index] in [-1, 1]: [B, C, H + 2 pad, W + 2 pad] of `dtype`.

    images: uint8 [N, C, H, W], of any strides; a memory-mapped file is read only where it is
    asked for. index: int64 [B] in [0, N). flips: bool [B], which are mirrored left to right. pad:
    black pixels on each side. dtype: float32, bfloat16 or float16. ValueError or TypeError for
    other shapes, dtypes, devices, or an index out of range (a GPU's is not read back: its image is
    NaN).
    """
    errors.is_tensor("images", images)
    errors.has_dtype("images", images, (torch.uint8,))
    if images.dim() != 4:
        raise ValueError(f"images: has shape {tuple(images.shape)}, must be [N, C, H, W]")
    errors.is_tensor("index", index)
    errors.has_dtype("index", index, (torch.int64,))
    errors.on_device("index", index, "images", images)
    if index.dim() != 1:
        raise ValueError(f"index: has shape {tuple(index.shape)}, must be [B]")
    errors.in_range("index", index, len(images))
    if flips is not None:
        errors.per_sample("flips", flips, torch.bool, "index", index)
        errors.on_device("flips", flips, "images", images)
        flips = flips.contiguous()
    check_pad(pad)
    errors.one_of("dtype", dtype, DTYPES)
    return OP(images, index.contiguous(), flips, pad, dtype, channels_last)
