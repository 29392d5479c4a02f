"""A small classifier of images, whose last features say what an image shows."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..record import Record
from ..spacing import count


@dataclass(frozen=True)
class ClassifierConfig(Record):
    """The shape of a `Classifier`.

    Attributes:
        image_size: height and width of its images.
        in_channels: 1 is grey.
        widths: channels of each level: a convolution, then the largest of each 2x2 pixels. The
            last is the number of features.
        depths: residual convolutions of each level, after those.
        num_classes: labels it tells apart.
    """

    image_size: int = 32
    in_channels: int = 1
    widths: tuple[int, ...] = (48, 96, 128)
    depths: tuple[int, ...] = (1, 1, 1)
    num_classes: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "in_channels", "num_classes"):
            count(name, getattr(self, name), 1)
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths={self.widths}: must be one or more, each 1 or more")
        if len(self.depths) != len(self.widths) or min(self.depths) < 0:
            raise ValueError(f"depths={self.depths}: must be {len(self.widths)}, each 0 or more")


class Classifier(nn.Module):
    """A residual network: x <- x + SiLU(BatchNorm(conv(x))), then the mean of each channel.

    Images are fp32 [B, C, H, W] in [-1, 1].
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = config.in_channels
        for width, depth in zip(config.widths, config.depths, strict=True):
            layers.append(_Layer(before, width, pool=True))
            layers += [_Layer(width, width, pool=False) for _ in range(depth)]
            before = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(before, config.num_classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of its images: (C, H, W)."""
        return self.config.in_channels, self.config.image_size, self.config.image_size

    def features(self, x: Tensor) -> Tensor:
        """What the last linear layer decides by: [B, widths[-1]]."""
        return self.layers(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.head(self.features(x))


class _Layer(nn.Module):
    def __init__(self, before: int, width: int, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.pool:
            return F.silu(self.norm(F.max_pool2d(y, 2)))
        return x + F.silu(self.norm(y))
