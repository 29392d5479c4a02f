"""Training steps: fastdiff's trainer against a loop in the manner of diffusers' example.

Both train the network of the DDPM paper for CIFAR-10 on the same images, with AdamW, a clipped
gradient and an average of the weights. diffusers' loop is its unconditional example, each part at
its fastest setting, fed from memory. fastdiff's steps, in which the trainer loads, mirrors, logs
and checks as it does for users, first have their gradients held to a float64 run.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from fastdiff import NoiseSchedule, TrainConfig, Trainer, UNet, UNetConfig
from fastdiff.data import ImageSet
from fastdiff.precision import bfloat16_pays

from . import memory, subjects
from .networks import NAMES
from .records import (
    FASTDIFF,
    PLAIN,
    RATE,
    Record,
    Settings,
    in_dtype,
    of_race,
    without_time,
)
from .runtimes import bf16, fp32
from .timing import Contender, race

SECTION = "training"
DIFFUSERS, DEFAULT = "diffusers", "diffusers fp32"
ROUNDS = 5
ALLOWED = 3.0  # of fastdiff's gradient error, in plain PyTorch's of the same dtype
Step = Callable[[], Any]
CONFIG = replace(UNetConfig.ddpm_cifar10(), dropout=0.0)  # as the one of diffusers


@dataclass(frozen=True)
class Row:
    """A dtype of the same network and batch."""

    dtype: torch.dtype
    batch: int = 16

    @property
    def title(self) -> str:
        return f"CIFAR-10 network, batch {self.batch}, {NAMES[self.dtype]}"


ROWS = (Row(bf16), Row(fp32))


def measure(settings: Settings, refused: Mapping[str, str]) -> Iterator[Record]:
    """A step in turns: its time, the images a second, and the memory that the training takes."""
    runs = [row for row in ROWS if row.dtype == fp32 or bfloat16_pays(settings.device)]
    rows = [replace(row, batch=1) for row in runs[:1]] if settings.quick else ROWS
    for row in tqdm(rows, desc=SECTION, leave=False):
        with torch.enable_grad():
            yield from in_dtype(
                SECTION, row.title, row.dtype, settings.device, _measured(row, settings)
            )


def _measured(row: Row, settings: Settings) -> Iterator[Record]:
    if reason := _wrong(row, settings):
        yield without_time(SECTION, row.title, f"refused: wrong ({reason})")
        return
    about = {"section": SECTION, "row": row.title, "dtype": NAMES[row.dtype]}
    with tempfile.TemporaryDirectory() as folder:
        makers = _makers(row, settings, Path(folder))
        contenders, mb = [], {}
        for provider, how, make in makers:
            steps, peak = _prepared(make, settings.device)
            contenders.append(Contender(provider, how, (steps,)))
            mb[provider, how] = peak
        raced = race(contenders, settings.device, settings.seconds, 1 if settings.quick else ROUNDS)
    yield from of_race(raced, shape=(row.batch, 3, 32, 32), **about)
    for provider, (_, us) in raced.items():
        rate = row.batch * 1e6 / float(sorted(us)[len(us) // 2])
        yield Record(provider=provider, metric=RATE, p50=rate, **about)
    held = {provider: mb[provider, contender.how] for provider, (contender, _) in raced.items()}
    ours = held[FASTDIFF]
    for provider, figure in held.items():
        if ours and figure:
            more = {**about, "row": f"{row.title}: memory", "metric": "MB"}
            yield Record(provider=provider, p50=figure, ratio=figure / ours, **more)


def _makers(
    row: Row, settings: Settings, folder: Path
) -> Iterator[tuple[str, str, Callable[[], Step]]]:
    yield FASTDIFF, "", lambda: _ours(row, settings, folder)
    for provider, dtype in {DIFFUSERS: row.dtype, DEFAULT: fp32}.items():
        if provider == DEFAULT and row.dtype == fp32:
            continue
        layouts = (torch.channels_last, torch.contiguous_format)
        for layout in layouts[:1] if settings.quick else layouts:
            how = str(layout).removeprefix("torch.").replace("_", "-")
            yield (
                provider,
                how,
                lambda dtype=dtype, layout=layout: _theirs(row.batch, dtype, layout, settings),
            )


def _prepared(make: Callable[[], Step], device: str) -> tuple[Step, float | None]:
    """A contender's step, and the most memory that it took, from nothing, in MB."""
    before = memory.resident(device)
    step = make()
    step()  # it makes the moments
    memory.reset_peak(device)
    step()
    after = memory.peak(device)
    return step, after - before if after and before else None


def _images(batch: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    size = (8 * batch, 3, 32, 32)
    return ImageSet(torch.randint(256, size, dtype=torch.uint8, generator=generator), flip=True)


def _ours(row: Row, settings: Settings, folder: Path) -> Step:
    torch.manual_seed(0)
    model = UNet(CONFIG).to(settings.device)
    config = TrainConfig(
        steps=1_000_000, batch_size=row.batch, lr=1e-4, prediction="eps", ema=0.9999,
        bf16=row.dtype == bf16,
    )  # fmt: skip
    trainer = Trainer(model, NoiseSchedule.linear(1000), _images(row.batch), config, folder)
    model.train()
    return trainer._train_step


def _theirs(
    batch: int, dtype: torch.dtype, layout: torch.memory_format, settings: Settings
) -> Step:
    """The example's loop: noise, add_noise, mse_loss, clip, AdamW, cosine rate, EMAModel."""
    model = copy.deepcopy(subjects.cifar10().network).requires_grad_(True).train()
    model = model.to(settings.device, memory_format=layout)
    scheduler = DDPMScheduler(1000)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, fused=True
    )
    rate = get_cosine_schedule_with_warmup(optimizer, 500, 1_000_000)
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, foreach=True)
    images = _images(batch).batch(0, batch, 0)[0].to(settings.device, memory_format=layout)

    def step() -> float:
        noise = torch.randn_like(images)
        t = torch.randint(1000, (batch,), device=images.device)
        noisy = scheduler.add_noise(images, noise, t)
        with torch.autocast(images.device.type, bf16, enabled=dtype == bf16):
            out = model(noisy, t).sample
        loss = F.mse_loss(out.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        return loss.detach().item()

    return step


def _wrong(row: Row, settings: Settings) -> str | None:
    """Why fastdiff's gradients are not what they should be, or None."""
    torch.manual_seed(0)
    plain = UNet(CONFIG).to(settings.device)
    for parameter in plain.parameters():  # its blocks start at zero, which would hide an error
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    truth = _gradient(copy.deepcopy(plain).double(), torch.float64, settings)
    allowed = ALLOWED * _apart(_gradient(copy.deepcopy(plain), row.dtype, settings), truth)
    error = _apart(_gradient(plain.fuse_blocks(), row.dtype, settings), truth)
    if error <= allowed:
        return None
    return f"its gradient is off by {error:.1e}, allowed {allowed:.1e}, {ALLOWED:g} times {PLAIN}'s"


def _gradient(model: UNet, dtype: torch.dtype, settings: Settings) -> Tensor:
    x, t = subjects.cifar10().example(2, settings.device)
    wide = next(model.parameters()).dtype
    with torch.autocast(settings.device, bf16, enabled=dtype == bf16):
        out = model(x.to(wide), t)
    out.to(wide).square().mean().backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def _apart(gradient: Tensor, truth: Tensor) -> float:
    return float((gradient - truth).norm() / truth.norm())
