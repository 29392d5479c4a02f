"""The U-Net of the ADM family."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import errors
from .at_guidance import AtGuidance
from .blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    Stage,
    Upsample,
    group_norm,
    norm_silu,
    timestep_embedding,
    zeroed,
)
from .config import UNetConfig
from .network import Network
from .text import TextEncoder, check_tokens, empty_captions


def level_stage(channels: int, level: int, config: UNetConfig) -> Stage:
    """A residual block into the level, and attention where it attends."""
    width = config.width_at(level)
    stage = Stage(ResBlock(channels, width, config))
    if config.side_at(level) in config.attention_resolutions:
        stage.append(AttentionBlock(width, config))
    return stage


def down_path(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """The first convolution and the levels on the way down; the channels of each one's output."""
    channels = config.width_at(0)
    stem = nn.Conv2d(config.in_channels * config.patch_size**2, channels, 3, padding=1)
    blocks, skips = nn.ModuleList([Stage(stem)]), [channels]
    for level in range(len(config.channel_mult)):
        for _ in range(config.num_res_blocks):
            blocks.append(level_stage(channels, level, config))
            channels = config.width_at(level)
            skips.append(channels)
        if level < len(config.channel_mult) - 1:
            blocks.append(
                Stage(
                    ResBlock(channels, channels, config, "down")
                    if config.resblock_updown
                    else Downsample(channels, config)
                )
            )
            skips.append(channels)
    return blocks, skips


def middle(channels: int, config: UNetConfig) -> Stage:
    """The deepest level's block, attention and block."""
    return Stage(
        ResBlock(channels, channels, config),
        AttentionBlock(channels, config),
        ResBlock(channels, channels, config),
    )


class UNet(Network):
    """The U-Net of "Diffusion Models Beat GANs" (Dhariwal & Nichol 2021), and of DDPM.

    Parameters carry guided-diffusion's names, so that its state dicts load as they are.

    Example:
        >>> model = UNet(UNetConfig(channels=32, norm_groups=8))
        >>> model(torch.zeros(2, 3, 32, 32), torch.tensor([0, 999])).shape
        torch.Size([2, 3, 32, 32])

    Attributes:
        config: how it is built. The others are `Network`'s.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        errors.is_a("config", config, UNetConfig)
        self.config = config
        width, emb = config.channels, config.embedding_channels
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, emb)
        if config.vocabulary is not None:
            self.text, self.text_proj = TextEncoder(config), nn.Linear(emb, emb)
        if config.guidance_max is not None:
            last = zeroed(nn.Linear(emb, emb))  # so that a student starts as its teacher
            self.guidance_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), last)

        self.input_blocks, skips = down_path(config)
        channels, first = skips[-1], skips[0]
        self.middle_block = middle(channels, config)

        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(config.channel_mult))):
            for _ in range(config.num_res_blocks + 1):
                stage = level_stage(channels + skips.pop(), level, config)
                channels = config.width_at(level)
                self.output_blocks.append(stage)
            if level:
                stage.append(
                    ResBlock(channels, channels, config, "up")
                    if config.resblock_updown
                    else Upsample(channels)
                )

        outputs = config.out_channels * config.patch_size**2 * (2 if config.predict_both else 1)
        self.out = nn.Sequential(
            group_norm(channels, config),
            nn.SiLU(),
            zeroed(nn.Conv2d(first, outputs, 3, padding=1)),
        )

    def read(self, cond: Tensor | None, batch: int) -> Tensor | None:
        """The states [B, L, 4 channels] of captions' tokens; None of a network that has no text.

        Args:
            cond: [B, L] int64 tokens; None is `batch` empty captions.
        """
        if self.config.vocabulary is None:
            return None
        if cond is None:
            cond = empty_captions(batch, self.config.text_length, self.text_proj.weight.device)
        return self.text(cond)

    def embed(
        self,
        t: Tensor,
        cond: Tensor | None = None,
        w: Tensor | None = None,
        text: Tensor | None = None,
    ) -> Tensor:
        """The embedding of time, class or text, and weight, [B, 4 channels].

        In the parameters' dtype.

        Args:
            t: [B] timesteps, integer or floating point, on the training schedule's scale.
            cond: [B] int64 labels, -1 for "no class"; None is all -1.
            w: [B] guidance weights, of a network with `guidance_max`.
            text: what `read` returned.
        """
        dtype = next(self.time_embed.parameters()).dtype
        emb = self.time_embed(self._waves(t).to(dtype))
        if w is not None and self.config.guidance_max is not None:
            # the weights' range is spread over that of the timesteps
            emb = emb + self.guidance_embed(
                self._waves(1000 / self.config.guidance_max * w).to(dtype)
            )
        if text is not None:
            emb = emb + self.text_proj(text[:, -1])
        elif cond is not None:
            given = (cond >= 0)[:, None]
            emb = emb + torch.where(given, self.label_emb(cond.clamp(min=0)), 0.0)
        return emb

    def _waves(self, t: Tensor) -> Tensor:
        return timestep_embedding(t, self.config.channels, self.config.time_embedding)

    def denoise(self, x: Tensor, emb: Tensor, text: Tensor | None = None) -> Tensor:
        """The network on images [B, C, H, W] and what `embed` and `read` returned."""
        patch, skips = self.config.patch_size, []
        if patch > 1:
            x = F.pixel_unshuffle(x, patch)
        for stage in self.input_blocks:
            x = self._run(stage, x, emb, text)
            skips.append(x)
        x = self._run(self.middle_block, x, emb, text)
        for stage in self.output_blocks:
            x = self._run(stage, torch.cat((x, skips.pop()), dim=1), emb, text)
        norm, act, conv = self.out
        x = conv(norm_silu(norm, x) if self.fused else act(norm(x)))
        return F.pixel_shuffle(x, patch) if patch > 1 else x

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, w: Tensor | None = None
    ) -> Tensor:
        """The prediction for images x [B, C, H, W] at timesteps t [B] given labels cond [B].

        Of a network with a `vocabulary`, cond is captions' tokens, int64 [B, text_length].

        Returns [B, out_channels, H, W] in x's dtype; a learned variance is the second half of
        the channels. w: fp32 [B], guidance weights in 0 .. config.guidance_max, of a network that
        takes them; `at_guidance` settles them.

        Raises:
            ValueError, TypeError: wrong shapes, dtypes, labels or tokens; before any work.
        """
        self.check(x, t, cond, w)
        text = self.read(cond, len(x))
        out = self.denoise(x, self.embed(t, cond, w, text), text)
        return self._merged(out, x, t) if self.config.predict_both else out

    def _merged(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        assert self.schedule is not None  # as checked
        levels = np.stack((self.schedule.alpha, self.schedule.sigma))
        alpha, sigma = torch.tensor(levels, dtype=torch.float32, device=x.device)[:, t.long()].to(
            x.dtype
        )[..., None, None, None]
        x0, eps = out.to(x.dtype).chunk(2, 1)
        return sigma**2 * x0 + alpha * (x - sigma * eps)

    def at_guidance(self, w: float) -> AtGuidance:
        """This network with the guidance weight w, called as model(x, t, cond): for samplers."""
        return AtGuidance(self, w)

    @staticmethod
    def null_cond(cond: Tensor) -> Tensor:
        """Labels that mean "no class", or the tokens of empty captions, as many as `cond` has."""
        if cond.ndim == 2:
            return empty_captions(len(cond), cond.shape[1], cond.device)
        return torch.full_like(cond, -1)

    def check(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, w: Tensor | None = None
    ) -> None:
        """Raise ValueError or TypeError if `forward` does not take these; forward calls it."""
        config = self.config
        self.check_images(x, t, self.out[2].weight)
        for name, value in (("cond", cond), ("w", w)):
            if value is not None:
                errors.is_tensor(name, value)
        if config.predict_both and self.schedule is None:
            raise ValueError("schedule: predict_both needs it; set model.schedule")
        if (w is None) != (config.guidance_max is None):
            raise ValueError(
                f"w: was {'not ' * (w is None)}given, guidance_max is {config.guidance_max}; the "
                "two go together: model.at_guidance(w) is the network with a weight settled"
            )
        if w is not None and (w.shape != x.shape[:1] or not w.is_floating_point()):
            raise ValueError(
                f"w of shape {tuple(w.shape)}, {w.dtype}: must be [{x.shape[0]}], floating point"
            )
        if cond is not None and config.vocabulary is not None:
            check_tokens("cond", cond, len(x), config)
        elif cond is not None:
            self._check_labels(cond, len(x))

    def _check_labels(self, cond: Tensor, batch: int) -> None:
        classes = self.config.num_classes
        if classes is None:
            raise ValueError(
                "cond: this model is unconditional (num_classes is None); leave it out"
            )
        if cond.shape != (batch,):
            raise ValueError(f"cond of shape {tuple(cond.shape)}: must be [{batch}], one an image")
        if cond.dtype != torch.int64:
            raise TypeError(f"cond of dtype {cond.dtype}: must be int64 class labels")
        # on an accelerator the check would stall the stream at each call
        if cond.device.type == "cpu" and not torch.compiler.is_compiling() and cond.numel():
            low, high = torch.aminmax(cond)
            if low < -1 or high >= classes:
                raise ValueError(
                    f"cond with labels {low} .. {high}: must be 0 .. {classes - 1}, "
                    "or -1 for no class"
                )
