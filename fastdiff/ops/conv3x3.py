"""The 3x3 convolution of stride 1 and padding 1 by Winograd's minimal filtering.

    Y = A^T [ sum_c (G g_c G^T) * (B^T d_c B) ] A         * is element by element

makes a tile of m x m outputs from (m + 2) x (m + 2) inputs d with (m + 2)^2 products a channel
where the sum itself takes 9 m^2 (Lavin & Gray 2016, eq. 8). G g G^T is what `pack_conv3x3` makes.
Transforms and sums are float32; with bfloat16 the transformed weight and input are each rounded
once. Layout: channels-last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import errors
from ..op import Case, Op
from .layout import DTYPES, element_bytes
from .pack_conv3x3 import CHANNELS, PANEL, available, matrices, pack_conv3x3


def _tile(weight: Tensor) -> int:
    return 2 if weight.shape[1] == 16 else 4


def _unpack(weight: Tensor) -> tuple[int, Tensor]:
    """The tile, and the transformed weight as [C, K, m + 2, m + 2]."""
    if weight.dim() == 5:
        weight = weight.transpose(3, 4).flatten(2, 3)
    tile = _tile(weight)
    return tile, weight.permute(2, 0, 3, 1).flatten(1, 2).unflatten(2, (tile + 2, tile + 2))


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    upsample: bool,
) -> tuple[Tensor]:
    dtype, compute = x.dtype, torch.promote_types(x.dtype, torch.float32)
    if upsample:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    tile, U = _unpack(weight.to(compute))
    B, _, A = (m.to(x.device, compute) for m in matrices(tile))
    height, width = x.shape[2:]
    x = F.pad(x.to(compute), (1, 1 - width % -tile, 1, 1 - height % -tile))
    d = x.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)
    V = torch.einsum("ia,nchwab,jb->nchwij", B, d, B).to(dtype).to(compute)
    Y = torch.einsum("ai,nchwij,ckij,bj->nkhawb", A, V, U, A)
    out = Y.flatten(4, 5).flatten(2, 3)[..., :height, :width]
    if bias is not None:
        out = out + bias.to(compute).reshape(-1, out.shape[1], 1, 1)
    if residual is not None:
        out = out + residual.to(compute)
    return (out.to(dtype).contiguous(memory_format=torch.channels_last),)


def _size(x: Tensor, weight: Tensor, upsample: bool) -> tuple[int, int, int, int]:
    """The shape of the result."""
    scale = 2 if upsample else 1
    return x.shape[0], weight.shape[0] * PANEL, scale * x.shape[2], scale * x.shape[3]


def _allocate(x: Tensor, weight: Tensor, bias: Any, residual: Any, upsample: bool) -> tuple[Tensor]:
    size = _size(x, weight, upsample)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return (out,)


def _operand(t: Tensor | None) -> Any:
    return None if t is None else (t.data_ptr(), DTYPES[t.dtype], t.stride())


def _described(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    upsample: bool,
    out: Tensor,
) -> tuple[Any, ...] | None:
    if not available(x.dtype) or any(
        t is not None and t.stride(1) != 1 for t in (x, residual, out)
    ):
        return None
    size = (
        *(out.shape[0], out.shape[2], out.shape[3], out.shape[1]),
        *(x.shape[1], _tile(weight), upsample),
        bias.stride(0) if bias is not None and bias.dim() == 2 else 0,
    )
    operands = [_operand(t) for t in (x, residual, out)]
    bias_address = 0 if bias is None else bias.data_ptr()
    return size, DTYPES[x.dtype], weight.data_ptr(), bias_address, operands


def _cases() -> list[Case]:
    def case(
        name: str,
        *size: int,  # N, C, H, W of the output, K
        tile: int = 4,
        dtype: torch.dtype = torch.float32,
        takes: str = "",
        large: bool = False,
    ) -> Case:
        def inputs(device: str) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(0)

            def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(shape, generator=generator).to(device, dtype)

            def image(channels: int, scale: int = 1) -> Tensor:
                made = draw(N, channels, H // scale, W // scale)
                return made.contiguous(memory_format=torch.channels_last)

            N, C, H, W, K = size
            scale = 2 if "upsample" in takes else 1
            weight = draw(K, C, 3, 3, dtype=torch.float32) / (9 * C) ** 0.5
            bias = (K,) if "bias" in takes else (N, K) if "each" in takes else None
            return (
                image(C, scale),
                pack_conv3x3(weight, tile, dtype),
                draw(*bias, dtype=torch.float32) if bias else None,
                image(K) if "residual" in takes else None,
                scale == 2,
            )

        return Case(name, inputs, large)

    everything = "each residual upsample"
    bf16 = torch.bfloat16
    return [
        case("f4", 2, 32, 8, 8, 32, takes="bias"),
        case("f2", 2, 32, 8, 8, 32, tile=2, takes="bias"),
        case("f2-bf16", 2, 32, 8, 8, 32, tile=2, dtype=bf16, takes="bias"),
        case("f4-bf16", 1, 16, 8, 8, 32, dtype=bf16),
        case("odd", 3, 48, 7, 13, 96, takes="residual"),
        case("odd-f2", 3, 48, 7, 13, 96, tile=2, takes="residual"),
        case("odd-bf16", 3, 48, 7, 13, 96, tile=2, dtype=bf16, takes="residual"),
        case("one", 1, 16, 1, 1, 32, takes="bias"),
        case("empty", 0, 16, 8, 8, 32),
        case("everything", 2, 64, 10, 12, 64, takes=everything),
        case("everything-f2", 2, 64, 10, 12, 64, tile=2, takes=everything),
        case("everything-bf16", 2, 64, 10, 12, 64, tile=2, dtype=bf16, takes=everything),
        *(
            case(f"large-{name}-{'x'.join(map(str, size))}", *size, large=True, **how)  # type: ignore[arg-type]
            for size in LARGE
            for name, how in {
                "f4": {"tile": 4},
                "f2": {"tile": 2},
                "bf16": {"tile": 2, "dtype": bf16},
            }.items()
        ),
    ]


# Convolutions of the CIFAR-10 DDPM network, at batch 16 and 1.
LARGE = (
    (16, 128, 32, 32, 128),
    (16, 256, 16, 16, 256),
    (16, 512, 16, 16, 256),
    (16, 256, 8, 8, 256),
    (1, 128, 32, 32, 128),
    (1, 256, 16, 16, 256),
    (1, 512, 8, 8, 256),
    (1, 256, 4, 4, 256),
)


def _moved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    upsample: bool,
) -> int:
    N, K, H, W = _size(x, weight, upsample)
    written = N * K * H * W * x.element_size()
    return element_bytes(x, weight, bias, residual) + written


OP = Op(
    name="conv3x3",
    inputs=("Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool upsample"),
    outputs=("out",),
    reference=reference,
    allocate=_allocate,
    described=_described,
    cases=_cases,
    moved=_moved,
)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    upsample: bool = False,
) -> Tensor:
    """Convolve x with a packed weight; add bias and residual in the same pass.

    x: [N, C, H, W], channels-last, float32 or bfloat16, C a multiple of 16. weight: `pack_conv3x3`
    of [K, C, 3, 3], in x's dtype. bias: float32, [K], or one a sample [N, K], whose rows may lie
    apart. residual: like the result. upsample: each pixel of x counts twice along both sides, as
    after a nearest-neighbour resize. Returns [N, K, H, W], or [N, K, 2H, 2W], channels-last, in
    x's dtype. TypeError or ValueError for anything else, and RuntimeError if a gradient would be
    asked for: it carries none.
    """
    _check(x, weight, bias, residual, upsample)
    return OP(x, weight, bias, residual, upsample)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    upsample: bool,
) -> None:
    optional = {"bias": bias, "residual": residual}
    given = {name: value for name, value in optional.items() if value is not None}
    for name, value in {"x": x, "weight": weight, **given}.items():
        errors.is_tensor(name, value)
        errors.on_device(name, value, "x", x)
    errors.no_gradient(x=x, weight=weight, **given)
    errors.has_dtype("x", x, (torch.float32, torch.bfloat16))
    errors.has_dtype("weight", weight, (x.dtype,))
    for name, image in (("x", x), ("residual", residual)):
        if image is None:
            continue
        errors.has_dtype(name, image, (x.dtype,))
        if image.dim() != 4 or image.stride(1) != 1:
            raise ValueError(
                f"{name}: has shape {tuple(image.shape)} and strides {image.stride()}, must be "
                "[N, C, H, W], channels-last; "
                "convert it with .contiguous(memory_format=torch.channels_last)"
            )
        if image.shape[1] % CHANNELS:
            raise ValueError(
                f"{name}: has {image.shape[1]} channels, must have a multiple of {CHANNELS}"
            )
    _check_packed(weight)
    size = _size(x, weight, upsample)
    taken = weight.shape[2] * (2 if weight.dim() == 5 else 1)
    if taken != x.shape[1]:
        raise ValueError(f"weight: is packed for {taken} channels, x has {x.shape[1]}")
    if residual is not None and residual.shape != size:
        raise ValueError(
            f"residual: has shape {tuple(residual.shape)}, must be {size} as the result"
        )
    if bias is not None:
        errors.has_dtype("bias", bias, (torch.float32,))
        if tuple(bias.shape) not in (size[1:2], size[:2]) or bias.stride(-1) != 1:
            raise ValueError(
                f"bias: has shape {tuple(bias.shape)} and strides {bias.stride()}, must be "
                f"({size[1]},) or {size[:2]} with adjacent channels"
            )


def _check_packed(weight: Tensor) -> None:
    pair = (2,) if weight.dtype == torch.bfloat16 else ()
    shape = tuple(weight.shape)
    if (
        len(shape) != 4 + len(pair)
        or shape[3:] != (PANEL, *pair)
        or shape[1] not in (16, 36)
        or not weight.is_contiguous()
    ):
        raise ValueError(
            f"weight: has shape {shape}, must come from ops.pack_conv3x3(weight, tile)"
        )
