"""The networks that whole loops are timed on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

import fastdiff
from fastdiff import NoiseSchedule, UNet, UNetConfig
from fastdiff.ops import randn


@dataclass(frozen=True)
class Subject:
    """A network, what samplers need to know, and the same in diffusers' terms.

    `size` is an image's. `classes` is how many it is guided over, None: it is not guided; `null`
    is the label of no class. `text`: (tokens, size) of what it is told besides.
    """

    network: Any
    size: tuple[int, int, int]
    schedule: NoiseSchedule
    prediction: str
    config: dict[str, Any] = field(default_factory=dict)
    classes: int | None = None
    null: int = -1
    text: tuple[int, int] | None = None

    def example(self, batch: int, device: str) -> tuple[Tensor, ...]:
        """Arguments (x, t), (x, t, labels) or (x, t, text), different for each image."""
        x = randn((batch, *self.size), seed=0, device=device)
        t = torch.linspace(0, 999, batch, device=device).long()
        if self.text is not None:
            return x, t, randn((batch, *self.text), seed=1, device=device)
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
        given = (a.to(self.dtype) if a.is_floating_point() else a for a in rest)
        return super().forward(x.to(self.dtype, memory_format=torch.channels_last), *given)


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


def stable_diffusion() -> Subject:
    """The U-Net of Stable Diffusion 1.5 (its public configuration), with random weights."""
    crossing = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    with torch.device("meta"):
        network = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            down_block_types=(*(crossing[:1] * 3), "DownBlock2D"),
            up_block_types=("UpBlock2D", *(crossing[1:] * 3)),
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    network.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.dim() > 1:
                p.normal_(std=p[0].numel() ** -0.5)
            else:
                p.fill_(float("norm" in name and name.endswith("weight")))
    schedule = NoiseSchedule.scaled_linear(1000)
    return Subject(
        network.eval().requires_grad_(False), (4, 64, 64), schedule, "eps", text=(77, 768)
    )


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
