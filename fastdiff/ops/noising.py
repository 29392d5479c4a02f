"""The forward process in one pass: x_t and the model's training target (Ho et al. 2020, eq. 4).

    x_t    = alpha x0 + sigma z
    target = tx x0 + tz z         eps: (0, 1), x0: (1, 0), v: (-sigma, alpha), score: (0, -1/sigma)

The four coefficients are a float32 row of a table [T, 4] at t, whatever the data's dtype: with
bfloat16 data no noise is lost at small t. z comes from a tensor or from the samples' streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import errors
from ..op import Case, Op
from ..schedule import NoiseSchedule
from .layout import describe, element_bytes, rows
from .randn import check_row, streams_of
from .randn import reference as randn_reference

_made: WeakKeyDictionary[NoiseSchedule, dict[Any, Tensor]] = WeakKeyDictionary()


def reference(
    x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | None, streams: Tensor | None, row: int
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x0.dtype, torch.float32)
    if noise is None:
        assert streams is not None
        noise = randn_reference(x0.shape, streams, row, False)[0]
    alpha, sigma, tx, tz = (rows(c, x0) for c in table[t].to(compute).unbind(1))
    x, z = x0.to(compute), noise.to(compute)
    return (alpha * x + sigma * z).to(x0.dtype), (tx * x + tz * z).to(x0.dtype)


def _allocate(x0: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x0), torch.empty_like(x0)


def _described(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    streams: Tensor | None,
    row: int,
    x_t: Tensor,
    target: Tensor,
) -> tuple[Any, ...]:
    return (
        t.data_ptr(),
        table.data_ptr(),
        len(table),
        0 if streams is None else streams.data_ptr(),
        row & 0xFFFFFFFF,
        *describe(x0, noise, x_t, target),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, t, table, noise, _, _ = inputs
    ctx.has_noise = noise is not None
    ctx.save_for_backward(t, table)


def _backward(ctx: Any, grad_x: Tensor, grad_target: Tensor) -> tuple[Tensor | None, ...]:
    t, table = ctx.saved_tensors
    alpha, sigma, tx, tz = (rows(c, grad_x).to(grad_x.dtype) for c in table[t].unbind(1))
    grad_noise = sigma * grad_x + tz * grad_target if ctx.has_noise else None
    return alpha * grad_x + tx * grad_target, None, None, grad_noise, None, None


def _cases() -> list[Case]:
    def case(
        name: str,
        *size: int,
        dtype: torch.dtype = torch.float32,
        given: bool = False,
        layout: str = "contiguous",
        large: bool = False,
    ) -> Case:
        def inputs(device: str) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(0)
            x0 = torch.randn(size, generator=generator).clamp(-1, 1).to(device, dtype)
            noise = torch.randn(size, generator=generator).to(device, dtype) if given else None
            if layout == "channels-last":
                x0 = x0.contiguous(memory_format=torch.channels_last)
            elif layout == "strided":
                x0 = x0.repeat_interleave(2, -1)[..., ::2]
            t = torch.randint(7, size[:1], generator=generator).to(device)
            angle = torch.linspace(0.01, 1.56, 7, dtype=torch.float64, device=device)
            alpha, sigma = angle.cos(), angle.sin()
            table = torch.stack((alpha, sigma, -sigma, alpha), 1).float()
            streams = None if given else streams_of(5, size[0], device=device)
            return x0, t, table, noise, streams, 2

        return Case(name, inputs, large)

    return [
        case("seeded", 2, 3, 16, 16),
        case("given", 2, 3, 16, 16, given=True),
        case("seeded-bf16", 3, 4, 301, dtype=torch.bfloat16),
        case("given-bf16", 3, 63, dtype=torch.bfloat16, given=True),
        case("given-fp16", 3, 63, dtype=torch.float16, given=True),
        case("channels-last", 2, 3, 8, 10, layout="channels-last"),
        case("strided", 2, 3, 8, 10, layout="strided"),
        case("one", 1, 1),
        case("empty", 0, 3, 8, 8),
        case("large", 16, 3, 256, 256, large=True),
    ]


OP = Op(
    name="noising",
    inputs="Tensor x0, Tensor t, Tensor table, Tensor? noise, Tensor? streams, int row",
    outputs=("x_t", "target"),
    reference=reference,
    allocate=_allocate,
    described=_described,
    cases=_cases,
    moved=lambda x0, t, table, noise, *_: element_bytes(x0, noise, x0, x0),
    backward=(_setup, _backward),
)


def noising(
    x0: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    prediction: str = "eps",
    noise: Tensor | None = None,
    seed: int | Sequence[int] | None = None,
    *,
    row: int = 0,
    first_index: int = 0,
) -> tuple[Tensor, Tensor]:
    """Noise clean data to timestep t; return (x_t, target), both as x0.

    x0: [B, ...] float32, bfloat16 or float16. t: int64 [B] in [0, len(schedule)). `prediction`
    picks the target: "eps", "x0", "v" or "score". The noise is `noise` (like x0), or is made in
    the kernel from `seed` (an int, or one a sample) and `row`, say the training step; sample k
    uses the stream (seed, first_index + k), so that a batch can be noised in parts. With neither,
    from a seed that torch's CPU generator draws. Differentiable in x0 and noise.
    ValueError or TypeError for other shapes, dtypes, devices, or t out of range (on the CPU: a
    GPU's t is not read back).
    """
    errors.is_batch("x0", x0)
    errors.has_dtype("x0", x0, errors.MODEL_DTYPES)
    errors.per_sample("t", t, torch.int64, "x0", x0)
    errors.is_a("schedule", schedule, NoiseSchedule)
    errors.in_range("t", t, len(schedule))
    row = check_row(row)
    streams = None
    if noise is not None:
        if seed is not None:
            raise ValueError("seed: was given together with noise; give one of them")
        errors.like("noise", noise, "x0", x0)
        errors.has_dtype("noise", noise, (x0.dtype,))
    else:
        if seed is None:
            seed = int(torch.randint(1 << 62, ()))
        streams = streams_of(seed, len(x0), first_index, device=x0.device)
    table = _coefficients(schedule, prediction, x0.device)
    return OP(x0, t.contiguous(), table, noise, streams, row)


def _coefficients(schedule: NoiseSchedule, prediction: str, device: torch.device) -> Tensor:
    key = (prediction, device)
    made = _made.setdefault(schedule, {})
    if key not in made:
        with torch.inference_mode(False):  # it serves training, too
            table = torch.tensor(schedule.noising_table(prediction), dtype=torch.float32)
            made[key] = table.to(device, non_blocking=True)
    return made[key]


# what torch.compiler.assume_constant_result sets, which would import all of torch._dynamo here
_coefficients._dynamo_marked_constant = True  # type: ignore[attr-defined]
