"""One line: pipelines, schedulers and training loops of diffusers, patched against as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from torch import Tensor, nn
from tqdm import tqdm

import fastdiff

from . import subjects
from .peers import EAGER
from .records import FASTDIFF, Record, Settings, in_dtype, of_race, without_time
from .runtimes import bf16, fp32
from .timing import Contender, race

SECTION = "drop in"
STEPS, BATCH = 4, 4  # of a pipeline
LATENT = (1, 4, 64, 64)  # a sample of Stable Diffusion's
TRAINED = 32  # images
ALLOWED = {fp32: 1e-3, bf16: 3e-2}  # how far results may be apart, relatively and in the 2-norm
NAMES = {fp32: "fp32", bf16: "bf16"}
SCHEDULERS = (DDIMScheduler, DPMSolverMultistepScheduler, DDPMScheduler)

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Pair:
    """A call patched, and as it was in one or two ways; `each` is what its time is divided by."""

    patched: Call
    before: dict[str, Call]
    each: int = 1


@dataclass(frozen=True)
class Row:
    title: str
    dtype: torch.dtype
    build: Callable[[Settings], Pair]


def measure(settings: Settings, refused: Mapping[str, str]) -> Iterator[Record]:
    """Each thing as it was and patched, in turns."""
    for row in tqdm(ROWS, desc=SECTION, leave=False):
        yield from in_dtype(SECTION, row.title, row.dtype, settings.device, _raced(row, settings))


def _raced(row: Row, settings: Settings) -> Iterator[Record]:
    pair = row.build(settings)
    results = []
    for call in (pair.patched, *pair.before.values()):
        torch.manual_seed(0)  # some draw noise
        results.append(call().double())
    apart = max(float((r - results[0]).norm() / r.norm()) for r in results[1:])
    if not apart <= ALLOWED[row.dtype]:
        yield without_time(SECTION, row.title, f"refused: wrong (off by {apart:.1e})")
        return
    contenders = [Contender(FASTDIFF, "patched", (pair.patched,))]
    contenders += [Contender(EAGER, how, (call,)) for how, call in pair.before.items()]
    raced = race(contenders, settings.device, settings.seconds, settings.rounds)
    each = {provider: (who, us / pair.each) for provider, (who, us) in raced.items()}
    yield from of_race(each, section=SECTION, row=row.title, dtype=NAMES[row.dtype])


def _pipeline(dtype: torch.dtype, settings: Settings) -> Pair:
    """Whole calls; DDIMPipeline cannot return images of a bfloat16 network, so under autocast."""
    subject = subjects.cifar10()
    steps, batch = (2, 1) if settings.quick else (STEPS, BATCH)

    def made() -> DDIMPipeline:
        network = subjects.prepared(copy.deepcopy(subject.network), fp32, settings.device)
        pipe = DDIMPipeline(network, DDIMScheduler(**subject.config))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(pipe: Any) -> Tensor:
        generator = torch.Generator(settings.device).manual_seed(0)
        with torch.autocast(settings.device, dtype, enabled=dtype != fp32):
            images = pipe(batch, generator, num_inference_steps=steps, output_type="np").images
        return torch.from_numpy(images)

    how = "channels-last" if dtype == fp32 else "channels-last, autocast"
    patched = fastdiff.patch(made(), dtype={fp32: "float32", bf16: "bfloat16"}[dtype])
    return Pair(partial(call, patched), {how: partial(call, made())}, steps)


def _step(kind: Any, settings: Settings) -> Pair:
    """The eleventh step of a run of 50."""
    x, m = torch.randn(2, *LATENT, device=settings.device)
    scheduler = kind()
    scheduler.set_timesteps(50, device=settings.device)
    patched = fastdiff.patch(copy.deepcopy(scheduler))
    *past, t = scheduler.timesteps[:11]

    def again(scheduler: Any) -> Callable[[Any], Tensor]:
        for before in past:
            scheduler.step(m, before, x)
        kept = {k: v for k, v in vars(scheduler).items() if k in ("_step_index", "_register")}
        outputs = list(getattr(scheduler, "model_outputs", ()))

        def call(t: Any) -> Tensor:
            vars(scheduler).update(kept, model_outputs=outputs.copy())
            return scheduler.step(m, t, x).prev_sample

        return call

    theirs = again(scheduler)
    before = {"tensor t": partial(theirs, t), "int t": partial(theirs, int(t))}
    return Pair(partial(again(patched), t), before)


def _noising(settings: Settings) -> Pair:
    x, noise = torch.randn(2, *LATENT, device=settings.device)
    t = torch.tensor([500], device=settings.device)
    patched, before = fastdiff.patch(DDIMScheduler()), DDIMScheduler()
    return Pair(lambda: patched.add_noise(x, noise, t), {"": lambda: before.add_noise(x, noise, t)})


def _training(dtype: torch.dtype, settings: Settings) -> Pair:
    """A step of examples/plain_loop.py, its network channels-last and AdamW fused."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    ).to(settings.device, memory_format=torch.channels_last)
    x0 = torch.rand(2 if settings.quick else TRAINED, 1, 32, 32, device=settings.device) * 2 - 1
    noise = torch.randn_like(x0)
    t = torch.linspace(0, 999, len(x0), device=settings.device).long()

    def stepping(network: nn.Module, scheduler: Any) -> Call:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

        @torch.enable_grad()
        def step() -> Tensor:
            noisy = scheduler.add_noise(x0, noise, t)
            with torch.autocast(settings.device, dtype, enabled=dtype != fp32):
                loss = F.mse_loss(network(noisy, t).sample.float(), noise)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            return loss.detach()

        return step

    before = {"channels-last": stepping(copy.deepcopy(network), DDPMScheduler())}
    return Pair(stepping(*fastdiff.patch(network, DDPMScheduler())), before)


PIPELINES = [
    Row(f"DDIMPipeline, CIFAR-10 network, {name}, a step", dtype, partial(_pipeline, dtype))
    for dtype, name in NAMES.items()
]
ROWS = (
    *PIPELINES,
    *(Row(f"{kind.__name__}.step", fp32, partial(_step, kind)) for kind in SCHEDULERS),
    Row("DDIMScheduler.add_noise", fp32, _noising),
    *(
        Row(f"a training step of UNet2DModel, {name}", dtype, partial(_training, dtype))
        for dtype, name in NAMES.items()
    ),
)
