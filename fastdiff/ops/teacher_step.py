"""A teacher's step in progressive distillation, each sample of a batch at its own level.

    m'  = m_u + (w + 1) (m - m_u)        where guided (Ho & Salimans 2022, eq. 6; Meng et al. 2022)
    D   = px z + pm m'                   predicted x0
    out = a z + b D + c z_t

(px, pm, a, b, c) is a float32 row of a table, made in float64 by `fastdiff.halving`. Its one table
makes of z_t, and of the teacher's output there, the state half a student's step on; its other makes
of that state and output, and of z_t, the student's target (Salimans & Ho 2022, Algorithm 2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..op import Case, Op
from .layout import describe, element_bytes, rows

WIDTH = 5


def reference(
    z: Tensor,
    m: Tensor,
    table: Tensor,
    i: Tensor,
    z_t: Tensor | None,
    m_u: Tensor | None,
    weights: Tensor | None,
    w: float,
) -> tuple[Tensor]:
    px, pm, a, b, c = (rows(column, z) for column in table[i].to(z.dtype).unbind(1))
    m = m.to(z.dtype)
    if m_u is not None:
        u = m_u.to(z.dtype)
        m = u + ((w if weights is None else rows(weights, z)) + 1) * (m - u)
    out = a * z + b * (px * z + pm * m)
    return (out if z_t is None else out + c * z_t,)


def _allocate(z: Tensor, *_: Any) -> tuple[Tensor]:
    return (torch.empty_like(z),)


def _described(
    z: Tensor,
    m: Tensor,
    table: Tensor,
    i: Tensor,
    z_t: Tensor | None,
    m_u: Tensor | None,
    weights: Tensor | None,
    w: float,
    out: Tensor,
) -> tuple[Any, ...]:
    pointer = 0 if weights is None else weights.data_ptr()
    row = (table.data_ptr(), len(table), i.data_ptr())
    return *row, pointer, w, *describe(z, m, z_t, m_u, out)


def _cases() -> list[Case]:
    def case(
        name: str,
        *size: int,
        dtype: torch.dtype = torch.float32,
        takes: str = "",
        layout: str = "contiguous",
        large: bool = False,
    ) -> Case:
        def inputs(device: str) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(0)

            def draw(dtype: torch.dtype = torch.float32) -> Tensor:
                x = torch.randn(size, generator=generator).to(device, dtype)
                if layout == "channels-last":
                    return x.contiguous(memory_format=torch.channels_last)
                return x.repeat_interleave(2, -1)[..., ::2] if layout == "strided" else x

            z, m, asked = draw(), draw(dtype), takes.split()
            z_t = draw() if "z_t" in asked else None
            m_u = draw(dtype) if "m_u" in asked else None
            table = torch.randn(6, WIDTH, generator=generator).to(device)
            i = torch.randint(6, size[:1], generator=generator).to(device)
            weights = torch.linspace(-1, 7, size[0], device=device) if "w" in asked else None
            return z, m, table, i, z_t, m_u, weights, 1.5

        return Case(name, inputs, large)

    bf16, fp16 = torch.bfloat16, torch.float16
    return [
        case("step", 3, 3, 16, 16),
        case("target", 3, 3, 16, 16, takes="z_t"),
        case("guided", 2, 4, 301, takes="m_u"),
        case("each-bf16", 3, 3, 8, 8, takes="z_t m_u w", dtype=bf16),
        case("target-fp16", 3, 63, takes="z_t", dtype=fp16),
        case("channels-last", 2, 3, 8, 10, takes="z_t m_u w", layout="channels-last"),
        case("strided", 2, 3, 8, 10, takes="z_t", layout="strided"),
        case("one", 1, 1, takes="z_t"),
        case("empty", 0, 3, 8, 8, takes="z_t"),
        case("large-step", 16, 3, 256, 256, large=True),
        case("large-target", 16, 3, 256, 256, takes="z_t m_u w", large=True),
    ]


OP = Op(
    name="teacher_step",
    inputs="Tensor z, Tensor m, Tensor table, Tensor i, Tensor? z_t, Tensor? m_u, "
    "Tensor? weights, float w",
    outputs=("out",),
    reference=reference,
    allocate=_allocate,
    described=_described,
    cases=_cases,
    moved=lambda z, m, table, i, z_t, m_u, weights, w: element_bytes(z, m, z_t, m_u, z),
)


def teacher_step(
    z: Tensor,
    m: Tensor,
    table: Tensor,
    i: Tensor,
    *,
    z_t: Tensor | None = None,
    m_uncond: Tensor | None = None,
    w: float | Tensor | None = None,
) -> Tensor:
    """The teacher's next state, or, where z_t is given, the student's target: float32, as z.

    Args:
        z: [B, ...] float32, the state that the teacher was called with.
        m: its output there, of z's shape, float32, bfloat16 or float16.
        table: float32 [rows, 5], `Halving.step` or, with z_t, `Halving.target`, as a tensor on
            z's device.
        i: int64 [B] in [0, rows), each sample's row.
        z_t: like z, the state that the student starts from.
        m_uncond, w: the output without the condition, like m, and the guidance weight, a float or
            float32 [B]: m becomes (w + 1) m - w m_uncond, as in `ops.cfg`. Both or neither.

    Raises:
        TypeError, ValueError: other shapes, dtypes, devices, or i out of range (on the CPU: a
            GPU's i is not read back).
        RuntimeError: a tensor requires a gradient, and gradients are on: targets have none.
    """
    errors.is_batch("z", z)
    errors.has_dtype("z", z, (torch.float32,))
    errors.like("m", m, "z", z)
    errors.has_dtype("m", m, errors.MODEL_DTYPES)
    errors.is_tensor("table", table)
    errors.has_dtype("table", table, (torch.float32,))
    errors.on_device("table", table, "z", z)
    if table.dim() != 2 or table.shape[1] != WIDTH:
        raise ValueError(
            f"table: has shape {tuple(table.shape)}, must be (rows, {WIDTH}); make it with "
            "fastdiff.halving"
        )
    errors.per_sample("i", i, torch.int64, "z", z)
    errors.in_range("i", i, len(table))
    if z_t is not None:
        errors.like("z_t", z_t, "z", z)
        errors.has_dtype("z_t", z_t, (torch.float32,))
    if (m_uncond is None) != (w is None):
        raise ValueError("w and m_uncond: one was given without the other; give both or neither")
    if m_uncond is not None:
        errors.like("m_uncond", m_uncond, "m", m)
        errors.has_dtype("m_uncond", m_uncond, (m.dtype,))
    weights = None
    if isinstance(w, Tensor):
        errors.per_sample("w", w, torch.float32, "z", z)
        weights, w = w.contiguous(), None
    errors.no_gradient(z=z, m=m, z_t=z_t, m_uncond=m_uncond, w=weights)
    row = table.contiguous(), i.contiguous()
    return OP(z, m, *row, z_t, m_uncond, weights, 0.0 if w is None else errors.number("w", w))
