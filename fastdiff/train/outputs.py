"""What a run leaves in its folder, beside its states: averaged models, sample grids, curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint import save
from ..images import grid, save_picture
from ..models import UNet
from ..models.network import Network
from ..samplers import DDIMSampler
from .curves import can_draw, draw_curves
from .distributed import joined
from .ema import SIGMA_RELS
from .metrics import read
from .posthoc import SNAPSHOTS

if TYPE_CHECKING:
    from .trainer import Trainer

SAMPLES, COLUMNS = 100, 10


def averaged(run: Trainer, name: str) -> Network:
    """The network with averaged weights, in their memory; all processes must call it."""
    with torch.device("meta"):
        model = run.model.fresh()
    named = zip(run.model.named_parameters(), run.averages.values[name], strict=True)
    model.load_state_dict({k: joined(v, like) for (k, like), v in named}, assign=True)
    model.schedule, model.prediction = run.schedule, run.config.prediction
    model.class_names, model.distilled = run.data.class_names, run.model.distilled
    return model.eval().requires_grad_(False)


def draw(run: Trainer) -> None:
    """Draw the curves so far and, if it makes images, samples: of each class, or some captions."""
    model = averaged(run, f"ema.{run.config.decays[0]}")
    if not run.leads:
        return
    _curves(run)
    if not isinstance(model, UNet):
        return
    config = model.config
    cond: Tensor | None = None
    if config.num_classes is not None:
        cond = torch.arange(SAMPLES, device=run.device) // COLUMNS % config.num_classes
    elif config.vocabulary is not None and run.data.labels is not None:
        cond = run.data.labels[torch.arange(SAMPLES) % len(run.data)].to(run.device)
    made, prediction = model.distilled, run.config.prediction
    if made is not None:
        sampler = DDIMSampler(run.schedule, spacing=made.timesteps, prediction=prediction)
    else:
        steps = run.config.sample_steps
        sampler = DDIMSampler(run.schedule, steps, 0.0, "trailing", prediction, clip=1.0)
    x = sampler.sample(
        model,
        (SAMPLES, config.in_channels, config.image_size, config.image_size),
        seed=run.config.seed,
        cond=cond,
    )
    save_picture(grid(x, columns=COLUMNS), run.out / f"samples-{run.step:06d}.png")
    run.metrics.images(run.step, x)


def snapshot(run: Trainer) -> None:
    """Store the averages that `posthoc` combines."""
    for sigma_rel in SIGMA_RELS:
        path = run.out / SNAPSHOTS / f"{run.step:09d}-{sigma_rel}.safetensors"
        _write(run, path, f"power.{sigma_rel}", "float16", sigma_rel=sigma_rel)


def export(run: Trainer) -> None:
    """Write the averaged models as checkpoints that `fastdiff.load` reads, and the curves."""
    for k, decay in enumerate(run.config.decays):
        _write(run, run.out / f"ema-{decay}.safetensors" if k else run.out, f"ema.{decay}")
    if run.leads and run.config.sample_every:
        _curves(run)


def _write(run: Trainer, path: Path, name: str, dtype: str = "float32", **more: float) -> None:
    model = averaged(run, name)
    if run.leads:
        record = {"config": run.config.to_json(), "step": run.step, "seconds": run.seconds, **more}
        prediction, names = run.config.prediction, run.data.class_names
        save(path, model, run.schedule, prediction, names, record, dtype, model.distilled)


def _curves(run: Trainer) -> None:
    if can_draw() and len(read(run.out)) > 1:
        draw_curves(run.out)
