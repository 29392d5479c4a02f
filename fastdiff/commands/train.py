"""Train a model from a recipe, or a classifier of noisy images, which guides one.

A recipe is a JSON file of four parts: "model" (UNetConfig's fields), "schedule" (a
constructor of NoiseSchedule), "data" (a reader and its arguments) and "train" (TrainConfig's
fields). Flags override the last. Ctrl-C or SIGTERM saves and stops; --resume continues.

On several GPUs or processes: torchrun --nproc-per-node 8 -m fastdiff train ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..data import ImageSet
from ..models import UNet, UNetConfig
from ..models.encoder import EncoderUNet
from ..models.network import Network
from ..schedule import NoiseSchedule
from ..train import TrainConfig, Trainer
from ..train.distributed import LostWorker, processes
from .device import add_device
from .recipe import add_flags, from_recipe, read_data, read_recipe

TASKS = ("generate", "classifier")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, help="the recipe, a JSON file")
    parser.add_argument(
        "--task", choices=TASKS, default=TASKS[0],
        help="what the network learns: to generate images, or which label a noisy one has "
        "(then the recipe's model is the U-Net whose way down it is)",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, help="where the data is; else the reader's default")
    parser.add_argument("--out", required=True, type=Path, help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    add_device(parser)
    add_flags(parser, TrainConfig)


def run(args: argparse.Namespace) -> int:
    recipe = read_recipe(args.config, ("model", "schedule", "data", "train"))
    classifies = args.task == "classifier"
    for name in ("prediction", "weighting") if classifies else ():
        if (value := getattr(args, name)) is not None:
            raise ValueError(f"--{name}={value}: a classifier has none; leave it out")
    always = {"label_dropout": 0.0} if classifies else {}
    config = from_recipe(TrainConfig, {**always, **recipe["train"]}, args)
    data = read_data(recipe["data"], args.data, args.config)
    schedule = NoiseSchedule.from_json(recipe["schedule"])
    with processes(args.device) as device:
        torch.manual_seed(config.seed)
        shape = UNetConfig.from_json(recipe["model"])
        model: Network = (_classifier(shape, data) if classifies else UNet(shape)).to(device)
        trainer = Trainer(model, schedule, data, config, args.out)
        try:
            trainer.fit(resume=args.resume)
        except (FloatingPointError, ImportError, LostWorker) as error:
            raise ValueError(str(error)) from None
    done = trainer.step == config.steps
    if trainer.leads:
        print(f"{'finished' if done else 'stopped'} at step {trainer.step}: {args.out}")
    return 0 if done else 130


def _classifier(shape: UNetConfig, data: ImageSet) -> EncoderUNet:
    """A classifier of the data's labels."""
    if data.labels is None:
        raise ValueError("data: has no labels; a classifier learns from them")
    return EncoderUNet(shape, len(data.class_names) or int(data.labels.max()) + 1)
