"""The networks that whole loops are timed on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

import fastdiff
from fastdiff import NoiseSchedule, UNet, UNetConfig
from fastdiff.ops import randn


@dataclass(frozen=True)
class Subject:
    """A network, what samplers need to know, and the same in diffusers' terms.

    `size` is an image's. `classes` is how many it is guided over, None: it is not guided; `null`
    is the label of no class.
    """

    network: Any
    size: tuple[int, int, int]
    schedule: NoiseSchedule
    prediction: str
    config: dict[str, Any] = field(default_factory=dict)
    classes: int | None = None
    null: int = -1

    def example(self, batch: int, device: str) -> tuple[Tensor, ...]:
        """Arguments (x, t) or (x, t, labels), different for each image."""
        x = randn((batch, *self.size), seed=0, device=device)
        t = torch.linspace(0, 999, batch, device=device).long()
        if self.classes is None:
            return x, t
        labels = torch.arange(batch, device=device) % (self.classes + 1)
        return x, t, torch.where(labels == self.classes, self.null, labels)


class Bare(nn.Module):
    """A network whose output is a tensor, as exporters want it: diffusers' comes in a record."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.train(network.training)  # exporters restore the mode they find

    def forward(self, *args: Tensor) -> Tensor:
        out = self.network(*args)
        return getattr(out, "sample", out)


class Cast(Bare):
    """The same of a network that takes x in its own dtype."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(network)
        self.dtype = dtype

    def forward(self, *args: Tensor) -> Tensor:
        x, *rest = args
        return super().forward(x.to(self.dtype, memory_format=torch.channels_last), *rest)


def fashion_mnist() -> Subject:
    """The shipped model."""
    model = fastdiff.load("fashion-mnist")
    assert model.schedule is not None and model.prediction is not None
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    classes = model.config.num_classes
    return Subject(model, (1, 32, 32), model.schedule, model.prediction, config, classes)


def cifar10(classes: int | None = None) -> Subject:
    """The network of Ho et al. 2020 as diffusers has it, google/ddpm-cifar10-32's configuration.

    With classes, an embedding of these and of none is added to the time's. Its weights are random,
    which costs the same time.
    """
    torch.manual_seed(0)
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
        num_class_embeds=None if classes is None else classes + 1,
    )
    # clipped, a loop with random weights is chaotic: float32 is off by 4 % after 50 steps
    unclipped = {"clip_sample": False}
    return Subject(
        network.eval().requires_grad_(False), (3, 32, 32), NoiseSchedule.linear(1000), "eps",
        unclipped, classes, -1 if classes is None else classes,
    )  # fmt: skip


def adm(image_size: int) -> Subject:
    """guided-diffusion's ImageNet network of 64 or 256 pixels, with random weights."""
    torch.manual_seed(0)
    config = UNetConfig.adm(image_size)
    network = UNet(config).eval().requires_grad_(False)
    for p in network.parameters():
        if not p.any():  # its blocks and its output start at zero, which would hide an error
            p.normal_(std=0.02)
    size = (config.in_channels, image_size, image_size)
    return Subject(network, size, NoiseSchedule.linear(1000), "eps", classes=config.num_classes)


def prepared(network: Any, dtype: torch.dtype, device: str) -> Any:
    """The network for inference: channels-last, which is faster for every contender."""
    network = network.eval().requires_grad_(False)
    return network.to(device, dtype).to(memory_format=torch.channels_last)
