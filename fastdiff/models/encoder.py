"""The U-Net's way down as a network of its own, with one vector an image: ADM's classifier."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import is_a, one_of
from ..spacing import count
from .blocks import group_norm, timestep_embedding, zeroed
from .config import UNetConfig
from .network import Network
from .unet import down_path, middle

POOLS = ("attention", "adaptive")
UNLIKE = "num_classes", "vocabulary", "guidance_max", "learned_variance"


class AttentionPool(nn.Module):
    """The mean of all pixels attends to them (Radford et al. 2021); what it finds is projected."""

    def __init__(self, side: int, channels: int, head_channels: int, outputs: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        position = torch.randn(channels, side**2 + 1) / math.sqrt(channels)
        self.positional_embedding = nn.Parameter(position)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        x = torch.cat((x.mean(2, keepdim=True), x), 2) + self.positional_embedding.to(x.dtype)
        qkv = self.qkv_proj(x).unflatten(1, (3, self.heads, -1)).transpose(3, 4)
        q, k, v = qkv.unbind(1)
        found = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # the mean's alone is asked for
        return self.c_proj(found.transpose(2, 3).flatten(1, 2)).squeeze(2)


class EncoderUNet(Network):
    """A classifier of noisy images, told the timestep (Dhariwal & Nichol 2021, section 4).

        >>> model = EncoderUNet(UNetConfig(channels=32, norm_groups=8, head_channels=32), 10)
        >>> model(torch.zeros(2, 3, 32, 32), torch.tensor([0, 999])).shape
        torch.Size([2, 10])

    Args:
        config: of the U-Net whose way down it has; num_classes, vocabulary, guidance_max and
            learned_variance must be at their defaults.
        outputs: numbers an image, for a classifier its classes.
        pool: "attention" over the last level's pixels, or "adaptive", their mean.
    """

    def __init__(self, config: UNetConfig, outputs: int, pool: str = "attention") -> None:
        super().__init__()
        is_a("config", config, UNetConfig)
        count("outputs", outputs, 1, 1 << 20)
        one_of("pool", pool, POOLS)
        default = UNetConfig()
        for name in UNLIKE:
            if getattr(config, name) != getattr(default, name):
                raise ValueError(
                    f"{name}={getattr(config, name)}: must be {getattr(default, name)}; an encoder "
                    "has no such part"
                )
        self.config, self.outputs, self.pool = config, outputs, pool
        emb = config.embedding_channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.channels, emb), nn.SiLU(), nn.Linear(emb, emb)
        )
        self.input_blocks, skips = down_path(config)
        channels = skips[-1]
        self.middle_block = middle(channels, config)
        head: list[nn.Module] = [group_norm(channels, config), nn.SiLU()]
        if pool == "attention":
            side = config.side_at(len(config.channel_mult) - 1)
            each = channels // config.heads_at(channels)
            head.append(AttentionPool(side, channels, each, outputs))
        else:
            last = zeroed(nn.Conv2d(channels, outputs, 1))
            head += [nn.AdaptiveAvgPool2d((1, 1)), last, nn.Flatten()]
        self.out = nn.Sequential(*head)

    @property
    def conditional(self) -> bool:
        """It learns what an image's label is: its training data must have labels."""
        return True

    def fresh(self) -> EncoderUNet:
        """A network built as this one is, with weights of its own."""
        return EncoderUNet(self.config, self.outputs, self.pool)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits [B, outputs] of images [B, C, H, W], noised to timesteps t [B].

        Raises:
            ValueError, TypeError: wrong shapes or dtypes; before any work.
        """
        self.check_images(x, t, next(self.parameters()))
        side = self.config.image_size
        if self.pool == "attention" and x.shape[2:] != (side, side):
            raise ValueError(
                f"x of {x.shape[2]}x{x.shape[3]} pixels: must be {side}x{side}, whose places the "
                "attention over them has learned"
            )
        waves = timestep_embedding(t, self.config.channels, self.config.time_embedding)
        emb = self.time_embed(waves.to(next(self.parameters()).dtype))
        if self.config.patch_size > 1:
            x = F.pixel_unshuffle(x, self.config.patch_size)
        for stage in (*self.input_blocks, self.middle_block):
            x = self._run(stage, x, emb)
        return self.out(x)
