"""A stage's report: how near a student's step is to two of its teacher's, and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import ImageSet
from ..files import write_bytes
from ..images import grid, save_picture
from ..losses.distillation import DistillationLoss
from ..models import UNet
from ..samplers import DDIMSampler
from .config import DistillConfig

REPORT, PICTURE = "report.json", "samples.png"
BATCH, COLUMNS, ROWS = 250, 10, 4
SEED = 1 << 40  # of noise that no training step uses, unless it is given this seed


def write_report(
    folder: Path,
    start: UNet,
    student: UNet,
    loss: DistillationLoss,
    held_out: ImageSet,
    config: DistillConfig,
    step: int,
) -> None:
    """Write report.json and samples.png, of a student trained so many steps.

    report.json has for each of the student's timesteps the mean squared error of its output, on
    held-out images and noise: of the student, and of what it started from, which is the teacher
    taking the student's steps. In samples.png every second row is the student's, below its
    teacher's from the same noise.
    """
    count = min(config.report_images, len(held_out))
    errors = {
        name: errors_by_timestep(network, loss, held_out, count).tolist()
        for name, network in (("student", student), ("start", start))
    }
    rows = [
        {"t": int(t), **{name: error[k] for name, error in errors.items()}}
        for k, t in enumerate(loss.halving.t)
    ]
    record = {
        "step": step,
        "prediction": loss.target,
        "held out": count,
        "mean squared error": rows,
    }
    pairs = zip(*(x.split(COLUMNS) for x in _samples(student, loss, config)), strict=True)
    picture = grid(torch.cat([row for pair in pairs for row in pair]), COLUMNS, scale=2)
    save_picture(picture, folder / PICTURE)
    # last: where it is, all is, and of the student that is there
    write_bytes(folder / REPORT, (json.dumps(record, indent=2) + "\n").encode())


@torch.no_grad()
def errors_by_timestep(student: UNet, loss: DistillationLoss, data: ImageSet, count: int) -> Tensor:
    """Mean squared error of a student's output at each of its timesteps: float64 [R].

    On the first `count` images, each at one timestep; a timestep that none falls on has NaN.
    """
    device, levels = next(student.parameters()).device, len(loss.weights)
    sums = torch.zeros(levels, 3, dtype=torch.float64)
    for first in range(0, count, BATCH):
        index = torch.arange(first, min(first + BATCH, count))
        x0, i = data.load(index).to(device), (index % levels).to(device)
        cond = None
        if student.config.num_classes is not None and data.labels is not None:
            cond = data.labels[index].to(device)
        sums += loss.with_sums(student, x0, i, cond, seed=SEED, first_index=first)[1].cpu()
    return sums[:, 1] / sums[:, 0]


def _samples(student: UNet, loss: DistillationLoss, config: DistillConfig) -> list[Tensor]:
    """Images of the teacher and of the student, from the same noise."""
    made, device = student.config, next(student.parameters()).device
    shape = COLUMNS * ROWS, made.in_channels, made.image_size, made.image_size
    cond = None
    if made.num_classes is not None:
        cond = torch.arange(shape[0], device=device) % made.num_classes
    teacher: Any = loss.teacher
    weight = loss.guidance if isinstance(loss.guidance, float) else None
    pupil: Any = student
    if config.guidance_max is not None:  # one weight of the range is shown
        shown = config.guidance_max / 2
        pupil = student.at_guidance(shown)
        teacher, weight = (
            (teacher.at_guidance(shown), None) if loss.takes_weight else (teacher, shown)
        )
    taken = np.stack((loss.halving.t, loss.halving.middle), 1).flatten()
    return [
        DDIMSampler(loss.schedule, spacing=timesteps, prediction=loss.target).sample(
            network, shape, SEED, cond=cond, guidance=w
        )
        for network, timesteps, w in (
            (teacher, taken, weight),
            (pupil, loss.halving.t, None),
        )
    ]
