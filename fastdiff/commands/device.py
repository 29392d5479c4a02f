"""The flag that says where a network runs."""

from __future__ import annotations

import argparse

import torch


def add_device(parser: argparse.ArgumentParser) -> None:
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=usual, type=_usable, help="cpu, cuda or cuda:N")


def _usable(name: str) -> str:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        known = device.type in ("cpu", "cuda")
    except (RuntimeError, AssertionError):  # no device's name, or of one that torch cannot use
        known = False
    if not known:
        raise argparse.ArgumentTypeError(
            f"{name!r} is no device here, must be cpu, or cuda where `fastdiff doctor` finds a GPU"
        )
    return name
