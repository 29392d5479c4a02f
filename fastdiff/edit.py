"""Images from images, by the samplers' own rows: image to image, and inpainting."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import errors
from .levels import levels
from .ops.randn import randn, streams_of
from .rollout import (
    Model,
    Rollout,
    begin,
    check_conditions,
    check_images,
    placement,
    unconditional,
)
from .samplers import DDIMSampler, DDPMSampler, HeunSampler, ScheduledSampler
from .spacing import count


def image_to_image(
    sampler: ScheduledSampler,
    model: Model,
    image: Tensor,
    strength: float,
    seed: int | Sequence[int] = 0,
    cond: Tensor | None = None,
    *,
    first_index: int = 0,
    **how: Any,
) -> Tensor:
    """Noise images part of the way, and sample from there: float32, as image.

    The last `strength` of the sampler's timesteps are run, rounded, at least one, starting from
    x_t = alpha image + sigma z at the first of them. Meng et al. 2022, "SDEdit", Algorithm 2.

    Example:
        >>> from fastdiff import DDIMSampler, load
        >>> model, shoes = load("fashion-mnist"), torch.zeros(2, 1, 32, 32)
        >>> sampler = DDIMSampler(model.schedule, 20, prediction=model.prediction)
        >>> image_to_image(sampler, model, shoes, 0.6, cond=torch.tensor([5, 7])).shape
        torch.Size([2, 1, 32, 32])

    Args:
        sampler: any of the samplers; its table is built anew for the timesteps that are run.
        image: float32 [B, C, ...], on the model's device.
        strength: in (0, 1]; 1 runs all the timesteps.
        seed, first_index: z of sample k is that of the stream (seed, first_index + k).
        cond, how: as `Sampler.sample` takes them, guidance and the rest; lists of one weight a row
            have as many as there are rows left.

    Raises:
        ValueError, TypeError: others than these.
    """
    if not isinstance(sampler, ScheduledSampler):
        raise TypeError(f"sampler: must be one with timesteps, got {type(sampler).__name__}")
    check_images("image", image, model)
    if not 0 < errors.number("strength", strength) <= 1:
        raise ValueError(f"strength={strength}: must be in (0, 1]")
    left = sampler.tail(max(1, round(strength * len(sampler.timesteps))))
    t = left.timesteps[0]
    alpha, sigma = float(left.schedule.alpha[t]), float(left.schedule.sigma[t])
    if isinstance(left, HeunSampler):  # its state is x / alpha, and its first level may be churned
        alpha, sigma = 1.0, float(left.table.sigma[0])
    z = randn(image.shape, seed, first_index=first_index, device=image.device)
    x_T = (alpha * image + sigma * z) / left.table.init
    return left.sample(model, image.shape, seed, x_T, cond, first_index=first_index, **how)


@torch.no_grad()
def inpaint(
    sampler: DDIMSampler | DDPMSampler,
    model: Model,
    image: Tensor,
    mask: Tensor,
    seed: int | Sequence[int] = 0,
    cond: Tensor | None = None,
    guidance: float | None = None,
    *,
    uncond: Tensor | None = None,
    jump: int = 10,
    resamplings: int = 10,
    first_index: int = 0,
) -> Tensor:
    """Fill in the unknown part of images: float32, as image, equal to it where mask is true.

    After every row the known part is replaced by the image, noised to that level. So that both
    parts come to agree, every `jump` rows, counted from the end, the state goes back as many, or to
    the start, by the forward process, x = (alpha / alpha') x' + sqrt(beta) z, until those rows have
    been run `resamplings` times.
    Lugmayr et al. 2022, "RePaint", Algorithm 1 and appendix B; here a jump is one step of the
    forward process, whose law is that of their many. What comes out nears a draw from the
    model's conditional distribution with more rows and resamplings, and is not quite one.

    Example:
        >>> from fastdiff import DDPMSampler, load
        >>> model, image = load("fashion-mnist"), torch.zeros(2, 1, 32, 32)
        >>> mask = torch.ones(2, 1, 32, 32, dtype=torch.bool)
        >>> mask[..., 16:] = False
        >>> sampler = DDPMSampler(model.schedule, 20, prediction=model.prediction, clip=1.0)
        >>> x = inpaint(sampler, model, image, mask, cond=torch.tensor([0, 9]), resamplings=3)
        >>> torch.equal(x[mask], image[mask])
        True

    Args:
        sampler: a DDPMSampler, as in the paper, or a DDIMSampler; others remember rows.
        image: float32 [B, C, ...], on the model's device.
        mask: bool, as image: true where the image is known.
        seed, cond, guidance, uncond, first_index: as `Sampler.sample` takes them.
        jump: rows gone back at a time; the paper's is 10.
        resamplings: how often each row is run; 1 never goes back, the paper's is 10.

    Raises:
        ValueError, TypeError: others than these, or a table with a classifier scale.
    """
    if not isinstance(sampler, DDIMSampler | DDPMSampler):
        raise TypeError(
            f"sampler: must be a DDIMSampler or a DDPMSampler, got {type(sampler).__name__}"
        )
    if sampler.table.classifier:
        raise ValueError("sampler: inpainting takes none with a classifier scale; leave it out")
    check_images("image", image, model)
    check_conditions(len(image), cond=cond, uncond=uncond)
    errors.like("mask", mask, "image", image)
    errors.has_dtype("mask", mask, (torch.bool,))
    jump = count("jump", jump, 1)
    resamplings = count("resamplings", resamplings, 1)
    at = levels(sampler.schedule, sampler.timesteps, sampler.options.get("next_timesteps"))
    walk = _walk(len(at.t), jump, resamplings)
    table = sampler.table
    if guidance is not None:
        with errors.naming("guidance"):
            table = table.with_guidance(guidance)
    if table.guided:
        uncond = unconditional(model, cond, uncond)
    begin(model, sampler.prediction)
    draw = partial(randn, image.shape, seed, first_index=first_index, device=image.device)
    run = Rollout(
        table.take([row for row, _ in walk]),
        placement(model)[0],
        draw() * table.init,
        cond=cond,
        uncond=uncond,
        streams=streams_of(seed, len(image), first_index, device=image.device),
    )
    run.prepare(model)
    numbers = torch.arange(len(walk), device=image.device).unbind()
    for k, (row, to) in enumerate(walk):
        run.step(model, None, run.guided[k], run.t[k], numbers[k])
        alpha, sigma = at.alpha_next[row], at.sigma_next[row]
        # the rows of the walk have the noise of rows 0, 1, .., this has that of those after them
        known = float(alpha) * image + float(sigma) * draw(row=len(walk) + k)
        x = torch.where(mask, known, run.x)
        if to <= row:
            keep = at.alpha[to] / alpha
            spread = (at.sigma[to] ** 2 - (keep * sigma) ** 2) ** 0.5
            x = float(keep) * x + float(spread) * draw(row=2 * len(walk) + k)
        if to < len(at.t):
            run.put(x, k + 1)
    return torch.where(mask, image, run.x)


def _walk(rows: int, jump: int, resamplings: int) -> list[tuple[int, int]]:
    """The rows to run, each with the row that comes after it, `rows` being the end.

    Every `jump` rows, counted from the end, the walk goes back as many, or to the first,
    resamplings - 1 times.
    """
    left = dict.fromkeys(range(rows, 0, -jump), resamplings - 1)
    walk, row = [], 0
    while row < rows:
        to = row + 1
        if left.get(to):
            left[to] -= 1
            to = max(to - jump, 0)
        walk.append((row, to))
        row = to
    return walk
