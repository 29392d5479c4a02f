"""The networks that whole loops are timed on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

import fastdiff
from fastdiff import NoiseSchedule, UNet, UNetConfig


@dataclass(frozen=True)
class Subject:
    """A network, what samplers need to know, and the same in diffusers' terms.

    `size` is an image's. `classes` is how many it is guided over; None: it is not guided.
    """

    network: Any
    size: tuple[int, int, int]
    schedule: NoiseSchedule
    prediction: str
    config: dict[str, Any] = field(default_factory=dict)
    classes: int | None = None


def fashion_mnist() -> Subject:
    """The shipped model."""
    model = fastdiff.load("fashion-mnist")
    assert model.schedule is not None and model.prediction is not None
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    classes = model.config.num_classes
    return Subject(model, (1, 32, 32), model.schedule, model.prediction, config, classes)


def cifar10() -> Subject:
    """The network of Ho et al. 2020 as diffusers has it, google/ddpm-cifar10-32's configuration.

    Its weights are random, which costs the same time.
    """
    network = UNet2DModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(128, 256, 256, 256),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    # clipped, a loop with random weights is chaotic: float32 is off by 4 % after 50 steps
    unclipped = {"clip_sample": False}
    return Subject(network, (3, 32, 32), NoiseSchedule.linear(1000), "eps", unclipped)


def cifar10_of_fastdiff() -> nn.Module:
    """The same layers in fastdiff's network."""
    return UNet(UNetConfig.ddpm_cifar10())


def prepared(network: Any, dtype: torch.dtype, device: str) -> Any:
    """The network for inference: channels-last, which is faster for every contender."""
    network = network.eval().requires_grad_(False)
    return network.to(device, dtype).to(memory_format=torch.channels_last)
