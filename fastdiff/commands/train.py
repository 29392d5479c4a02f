"""Train a model from a recipe.

A recipe is a JSON file of four parts: "model" (UNetConfig's fields), "schedule" (a
constructor of NoiseSchedule), "data" (a reader and its arguments) and "train" (TrainConfig's
fields). Flags override the last. Ctrl-C or SIGTERM saves and stops; --resume continues.

On several GPUs or processes: torchrun --nproc-per-node 8 -m fastdiff train ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..models import UNet, UNetConfig
from ..schedule import NoiseSchedule
from ..train import TrainConfig, Trainer
from ..train.distributed import LostWorker, processes
from .recipe import add_flags, from_recipe, read_data, read_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, help="the recipe, a JSON file")
    parser.add_argument("--data", type=Path, help="where the data is; else the reader's default")
    parser.add_argument("--out", required=True, type=Path, help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_flags(parser, TrainConfig)


def run(args: argparse.Namespace) -> int:
    recipe = read_recipe(args.config, ("model", "schedule", "data", "train"))
    config = from_recipe(TrainConfig, recipe["train"], args)
    data = read_data(recipe["data"], args.data, args.config)
    schedule = NoiseSchedule.from_json(recipe["schedule"])
    with processes(args.device) as device:
        torch.manual_seed(config.seed)
        model = UNet(UNetConfig.from_json(recipe["model"])).to(device)
        trainer = Trainer(model, schedule, data, config, args.out)
        try:
            trainer.fit(resume=args.resume)
        except (FloatingPointError, ImportError, LostWorker) as error:
            raise ValueError(str(error)) from None
    done = trainer.step == config.steps
    if trainer.leads:
        print(f"{'finished' if done else 'stopped'} at step {trainer.step}: {args.out}")
    return 0 if done else 130
