"""python bench/fifty_thousand.py: how long 50,000 images of 32x32 take, written to a file.

By the shipped students of 4 steps and of 1, and by DDPM's network for CIFAR-10 (random weights: the
time is the same) at 4 steps, of which a part is drawn and the time scaled. A thousand steps of that
network take "around 20 hours" for as many on a 2080 Ti (Song et al. 2021, "DDIM").
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from fastdiff import NoiseSchedule, UNet, UNetConfig, save

COUNT = 50_000
LITERATURE_HOURS = 20.0


def cifar10(folder: Path) -> Path:
    """A checkpoint of DDPM's network, with weights that are random and none zero."""
    torch.manual_seed(0)
    model = UNet(UNetConfig.ddpm_cifar10())
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.02)
    save(folder / "cifar10", model, NoiseSchedule.linear(1000), "eps")
    return folder / "cifar10"


def seconds(folder: Path, count: int, *words: str) -> float:
    """Of the whole command `fastdiff sample`, from its start to its end."""
    out = folder / "images.npz"
    command = [sys.executable, "-m", "fastdiff", "sample", "--num", str(count), "--out", str(out)]
    start = time.perf_counter()
    subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--part", type=int, default=1000, help="of CIFAR-10's (default 1000)")
    parser.add_argument("--engine", default="bfloat16", help="as for fastdiff sample")
    args = parser.parse_args(argv)
    how = "--engine", args.engine, "--batch", "250"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for steps in (4, 1):
            took = seconds(folder, args.count, "--model", f"fashion-mnist-{steps}", *how)
            print(f"fashion-mnist-{steps}: {args.count} images in {took:.1f} s")
        network = "--model", str(cifar10(folder)), "--steps", "4", *how[:2], "--batch", "50"
        few, many = (seconds(folder, n, *network) for n in (args.part // 2, args.part))
        each = (many - few) / (args.part - args.part // 2)  # without the start
        hours = each * COUNT / 3600
        print(
            f"DDPM's CIFAR-10 network at 4 steps: {1e3 * each:.1f} ms an image, {COUNT} in "
            f"{hours:.2f} h: 1/{LITERATURE_HOURS / hours:.0f} of {LITERATURE_HOURS:g} h"
        )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"most memory of a command: {peak:.0f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
