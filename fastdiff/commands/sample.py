"""Draw images from a trained model.

The ending of --out says what is written: .png a grid, .npz the uint8 images [N, H, W, C] and
their labels, and with --trajectory a .gif, .png or .webp of the predicted images, step by step.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from .. import images, samplers
from ..checkpoint import load
from ..engine import optimize
from ..models import UNet

SAMPLERS = {
    "ddim": samplers.DDIMSampler,
    "ddpm": samplers.DDPMSampler,
    "dpmpp": samplers.DPMSolverSampler,
    "heun": samplers.HeunSampler,
}
PICTURES = (".png", ".gif", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="fashion-mnist", help="a shipped name, a folder or a .safetensors file")
    add("--sampler", default="ddim", choices=SAMPLERS)
    add("--steps", type=int, help="steps of the sampler (default 50, ddpm all)")
    add("--spacing", default="trailing", help="of the timesteps: trailing, leading, ddim50, ...")
    add("--eta", type=float, help="noise of ddim, 0 to 1 (default 0), or of dpmpp (1 is the SDE)")
    add("--clip", type=float, default=1.0, help="bound of predicted images; 0 is none (default 1)")
    add("--guidance", type=float, default=0.0, help="weight w; 0 is plain conditional (default)")
    add("--class", dest="classes", action="append", metavar="C",
        help="a class by name or number; may be repeated (default: all in turn)")  # fmt: skip
    add("--num", type=int, help="images (default: ten a class, 100 without classes)")
    add("--batch", type=int, default=100, help="images at a time (default 100)")
    add("--seed", type=int, default=0, help="image k is always that of the stream (seed, k)")
    add("--out", type=Path, default=Path("samples.png"))
    add("--scale", type=int, default=2, help="screen pixels a pixel in pictures (default 2)")
    add("--trajectory", action="store_true", help="animate the predicted images")
    add("--engine", default="float32", choices=("float32", "bfloat16", "off"),
        help="on the CPU: the dtype of the optimized network; off is plain torch")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> int:
    wanted = PICTURES if args.trajectory else (".png", ".npz")
    if args.out.suffix not in wanted:
        raise ValueError(f"--out={args.out}: must end in {' or '.join(wanted)}")
    if not args.out.parent.is_dir():
        raise ValueError(f"--out={args.out}: the folder {args.out.parent} does not exist; make it")
    for name in ("num", "batch", "scale"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name}={value}: must be at least 1")
    model = load(args.model).to(args.device)
    sampler = _sampler(args, model)
    labels = _labels(args, model)
    network: torch.nn.Module = model
    if args.engine != "off" and torch.device(args.device).type == "cpu":
        network = optimize(model, args.engine)
    start = time.perf_counter()
    frames: list[torch.Tensor] = []
    batches = []
    for first in range(0, len(labels), args.batch):
        part = labels[first : first + args.batch]
        count, config = len(part), model.config
        parts: list[torch.Tensor] = []

        def keep(row: int, x: torch.Tensor, x0: torch.Tensor, parts: list = parts) -> None:
            parts.append(images.to_uint8(x0))

        x = sampler.sample(
            network,
            (count, config.in_channels, config.image_size, config.image_size),
            seed=args.seed,
            first_index=first,
            cond=part.to(args.device) if config.num_classes else None,
            guidance=args.guidance if config.num_classes else None,
            progress=sys.stderr.isatty(),
            callback=keep if args.trajectory else None,
        )
        batches.append(images.to_uint8(x))
        frames = [torch.cat(pair) for pair in zip(frames, parts, strict=True)] if frames else parts
    seconds = time.perf_counter() - start
    _write(args, torch.cat(batches), labels, frames)
    print(
        f"{len(labels)} images in {seconds:.1f} s ({len(labels) / seconds:.1f} images/s, "
        f"{len(sampler.table)} steps, {torch.get_num_threads()} threads): {args.out}"
    )
    return 0


def _sampler(args: argparse.Namespace, model: UNet) -> samplers.Sampler:
    options = {"spacing": args.spacing, "prediction": model.prediction, "clip": args.clip or None}
    if args.eta is not None:
        if args.sampler not in ("ddim", "dpmpp"):
            raise ValueError(f"--eta={args.eta}: is for ddim and dpmpp, not {args.sampler}")
        options["eta"] = args.eta
    return SAMPLERS[args.sampler](model.schedule, args.steps, **options)


def _labels(args: argparse.Namespace, model: UNet) -> torch.Tensor:
    """One label an image, the chosen classes in turn; zeros for a model without classes."""
    classes = model.config.num_classes
    if classes is None:
        if args.classes or args.guidance:
            raise ValueError(f"--class, --guidance: {args.model} has no classes; leave them out")
        return torch.zeros(args.num or 100, dtype=torch.int64)
    names = {name.lower(): k for k, name in enumerate(model.class_names)}
    chosen = [
        names.get(c.lower(), int(c) if c.isdigit() else -1)
        for c in args.classes or map(str, range(classes))
    ]
    if not all(0 <= c < classes for c in chosen):
        takes = ", ".join(model.class_names) or "names"
        raise ValueError(f"--class={args.classes}: must be 0 to {classes - 1} or one of {takes}")
    num = args.num or 10 * len(chosen)
    return torch.tensor(chosen).repeat(num // len(chosen) + 1)[:num]


def _write(
    args: argparse.Namespace, x: torch.Tensor, labels: torch.Tensor, frames: list[torch.Tensor]
) -> None:
    if args.out.suffix == ".npz":
        np.savez(args.out, images=x.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
        return
    columns = len(labels.unique()) if len(labels.unique()) > 1 else None
    if args.trajectory:
        pictures = [images.grid(frame, columns, scale=args.scale) for frame in frames]
        images.save_animation(pictures, args.out)
    else:
        images.grid(x, columns, scale=args.scale).save(args.out)
