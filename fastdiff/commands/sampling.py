"""What `sample` and `evaluate` share: a model, how it is sampled, and the network that runs."""

from __future__ import annotations

import argparse
from functools import lru_cache

import torch

from .. import samplers
from ..checkpoint import ASSETS, load
from ..engine import optimize
from ..models import UNet
from ..sampler import Sampler
from .device import add_device

SHIPPED = "fashion-mnist"
SAMPLERS = {
    "ddim": samplers.DDIMSampler,
    "ddpm": samplers.DDPMSampler,
    "dpmpp": samplers.DPMSolverSampler,
    "heun": samplers.HeunSampler,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="a shipped name, a folder or a .safetensors file (default: fashion-mnist, "
        "or where nothing but --steps says how to sample, its student of so many)")  # fmt: skip
    add("--sampler", default="ddim", choices=SAMPLERS)
    add("--steps", type=int, help="steps of the sampler (default 50, ddpm all, a student its own)")
    add("--spacing", help="of the timesteps: trailing (default), leading, ddim50, ...")
    add("--eta", type=float, help="noise of ddim, 0 to 1 (default 0), or of dpmpp (1 is the SDE)")
    add("--clip", type=float,
        help="bound of predicted images; 0 is none (default 1; a student's own: none)")  # fmt: skip
    add("--seed", type=int, default=0, help="image k is always that of the stream (seed, k)")
    add("--engine", default="float32", choices=("float32", "bfloat16", "off"),
        help="on the CPU: the dtype of the optimized network; off is plain torch")  # fmt: skip
    add_device(parser)


def model_of(args: argparse.Namespace) -> UNet:
    """The model that the arguments ask for, and its name in args.model."""
    if args.model is None:
        student = f"{SHIPPED}-{args.steps}"
        asked = args.guidance, args.eta, args.spacing
        free = asked == (None, None, None) and args.sampler == "ddim"
        args.model = student if free and (ASSETS / student).is_dir() else SHIPPED
    return load(args.model).to(args.device)


def sampler_of(args: argparse.Namespace, model: UNet) -> Sampler:
    """The sampler that the arguments ask for; a student's own where they ask for none."""
    spacing, made, clip = args.spacing or "trailing", model.distilled, 1.0
    if made is not None and not args.spacing:
        odd = args.steps not in (None, len(made.timesteps)) and f"--steps={args.steps}"
        if odd := odd or (args.sampler != "ddim" and f"--sampler={args.sampler}"):
            raise ValueError(
                f"{odd}: {args.model} was distilled to {len(made.timesteps)} steps of ddim; "
                "leave it out, or sample it otherwise all the same with --spacing trailing"
            )
        spacing, clip = made.timesteps, 0.0  # as it was distilled: a clip costs it a tenth in FD
    if args.clip is not None:
        clip = args.clip
    options = {"spacing": spacing, "prediction": model.prediction, "clip": clip or None}
    if args.eta is not None:
        if args.sampler not in ("ddim", "dpmpp"):
            raise ValueError(f"--eta={args.eta}: is for ddim and dpmpp, not {args.sampler}")
        options["eta"] = args.eta
    if args.sampler == "ddpm" and model.config.learned_variance:
        options["variance"] = "learned_range"
    return SAMPLERS[args.sampler](model.schedule, args.steps, **options)


def network_at(
    args: argparse.Namespace, model: UNet, w: float | None
) -> tuple[torch.nn.Module, float | None]:
    """The network that runs, optimized on the CPU, and the weight that the sampler combines at."""
    made = model.distilled
    network: torch.nn.Module = model
    if not model.config.conditional:
        if w:
            raise ValueError(f"--guidance={w}: {args.model} has no classes; leave it out")
        w = None
    elif model.config.guidance_max is not None:
        network, w = model.at_guidance(w or 0.0), None
    elif made is not None and made.guidance is not None:
        if w not in (None, made.guidance):
            raise ValueError(
                f"--guidance={w}: {args.model} was distilled at {made.guidance:g}; leave it out"
            )
        w = None
    else:
        w = w or 0.0
    if args.engine != "off" and torch.device(args.device).type == "cpu":
        network = _optimized(network, args.engine)
    return network, w


@lru_cache(maxsize=1)  # one engine serves all weights that are not an input
def _optimized(network: torch.nn.Module, dtype: str) -> torch.nn.Module:
    return optimize(network, dtype)
