"""The networks that claims train: small, of Fashion-MNIST, kept in runs/claims/."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.claims.claim import RUNS
from fastdiff import NoiseSchedule, TrainConfig, Trainer, UNet, UNetConfig, load
from fastdiff.data import fashion_mnist

SMALL = UNetConfig(
    in_channels=1,
    patch_size=2,
    channels=32,
    channel_mult=(1, 2, 4),
    num_res_blocks=1,
    attention_resolutions=(8,),
    head_channels=32,
    num_classes=10,
    norm_groups=8,
)
ROUNDS = 8  # of measuring rates
QUICK = TrainConfig(
    steps=1500,
    batch_size=128,
    lr=1e-3,
    warmup=100,
    decay="cooldown",
    ema=0.995,
    bf16=True,
    save_every=250,
)


def trained(name: str, shape: UNetConfig, schedule: NoiseSchedule, config: TrainConfig) -> UNet:
    """The network of that name; trained, or trained on, if it is not there yet."""
    folder = RUNS / name
    if not (folder / "config.json").is_file():
        trainer = _trainer(shape, schedule, config, folder)
        trainer.fit(resume=trainer.store.exists())
        if trainer.step < config.steps:
            raise KeyboardInterrupt
    return load(folder)


def steps_within(seconds: float, shapes: Sequence[UNetConfig], config: TrainConfig) -> list[int]:
    """Steps of training that take this long here, of each: medians, measured in turns."""
    with tempfile.TemporaryDirectory() as folder:
        schedule = NoiseSchedule.cosine(1000)
        trainers = [_trainer(shape, schedule, config, folder) for shape in shapes]
        took: list[list[float]] = [[] for _ in shapes]
        for _ in range(ROUNDS):
            for trainer, times in zip(trainers, took, strict=True):
                trainer.model.train()
                trainer._train_step()  # the first after another's finds a cold cache
                for _ in range(3):
                    start = time.perf_counter()
                    trainer._train_step()
                    times.append(time.perf_counter() - start)
    return [int(seconds / torch.tensor(times).median().item()) for times in took]


def _trainer(
    shape: UNetConfig, schedule: NoiseSchedule, config: TrainConfig, folder: str | Path
) -> Trainer:
    torch.manual_seed(config.seed)
    return Trainer(UNet(shape), schedule, fashion_mnist(pad=2), config, folder)
