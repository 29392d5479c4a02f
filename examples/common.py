"""What the loops share: the network, the scheduler, the data, and the two flags."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fastdiff.data import fashion_mnist


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--plain", action="store_true", help="without fastdiff")
    return parser.parse_args()


def network() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    )


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


def images(batch: int) -> DataLoader:
    """Fashion-MNIST, in [-1, 1], shuffled by a seed."""
    pixels = fashion_mnist(pad=2).images.float() / 127.5 - 1
    order = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(pixels), batch, shuffle=True, drop_last=True, generator=order)


class Said:
    """Prints the loss now and then, and in the end the time of a step after the first five."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.start = 0.0

    def __call__(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.item())
        if len(self.losses) == 5:
            self.start = time.perf_counter()
        if len(self.losses) % 50 == 0:
            print(f"step {len(self.losses)}: loss {self.losses[-1]:.4f}", flush=True)

    def finish(self) -> None:
        if (counted := len(self.losses) - 5) > 0:
            each = (time.perf_counter() - self.start) / counted
            print(f"{1e3 * each:.1f} ms a step, loss {self.losses[-1]:.6f}")
