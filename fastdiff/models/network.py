"""What our networks share: what they were trained for, and ways to run their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import errors
from .blocks import Block, fuse
from .config import UNetConfig

if TYPE_CHECKING:
    from ..schedule import NoiseSchedule
    from .distilled import Distilled


class Network(nn.Module):
    """A network of the U-Net's blocks.

    Attributes:
        config: how it is built.
        schedule, prediction, class_names: how it was trained, for samplers; set by
            `fastdiff.load` and by the trainer, None and empty on a fresh network.
        distilled: of a student of `fastdiff.distill`, the timesteps it is to be sampled at and
            the guidance weight it has learned; else None.
        recompute: in training, keep only what goes in and out of each stage, and compute the
            stage again for its gradient (Chen et al. 2016): less memory, a third more time.
    """

    config: UNetConfig
    schedule: NoiseSchedule | None = None
    prediction: str | None = None
    class_names: tuple[str, ...] = ()
    distilled: Distilled | None = None
    fused = recompute = False

    @property
    def conditional(self) -> bool:
        """Whether it is told of an image: then its training data must have labels."""
        return self.config.conditional

    def check_images(self, x: Tensor, t: Tensor, weight: Any) -> None:
        """Raise ValueError or TypeError unless it takes images x at times t, as its weight is."""
        channels, multiple = self.config.in_channels, self.config.downsampling
        for name, value in (("x", x), ("t", t)):
            errors.is_tensor(name, value)
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"x of shape {tuple(x.shape)}: must be [B, {channels}, H, W]")
        height, width = x.shape[2:]
        if height % multiple or width % multiple or height < 1 or width < 1:
            raise ValueError(
                f"x of {height}x{width} pixels: height and width must be divisible "
                f"by {multiple}; pad the images"
            )
        if x.device != weight.device:
            raise ValueError(f"x on {x.device}: must be on {weight.device}, as the model")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x of dtype {x.dtype}: must be {weight.dtype}, as the model; convert")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t of shape {tuple(t.shape)}: must be [{x.shape[0]}], one an image")
        if t.dtype == torch.bool or t.is_complex():
            raise TypeError(f"t of dtype {t.dtype}: must be integer or floating point")

    def fresh(self) -> Self:
        """A network built as this one is, with weights of its own."""
        return type(self)(self.config)

    def fuse_blocks(self, fused: bool = True) -> Self:
        """Run the blocks on our ops, in place: faster to train, the same to rounding.

        GroupNorm with AdaGN and SiLU, and attention, become single ops with gradients of their
        own; on a CPU with AVX2 (in bfloat16 with AVX-512's dot product), 3x3 convolutions go by
        Winograd's minimal filtering, forward and backward. Parameters and state dict stay. There
        are no second derivatives.

        Args:
            fused: False goes back to plain torch.

        Returns:
            The network itself.
        """
        fuse(self, fused)
        self.fused = fused
        return self

    def compile_blocks(self, **options: Any) -> Self:
        """Fuse the blocks, and compile each residual and attention block, in place, as one graph.

        For GPUs: as `fuse_blocks`; without gradients the attention's norm becomes a part of its
        qkv projection, and torch.compile fuses the rest. The first call with a shape compiles for
        it. On the CPU `fuse_blocks` is for training, and `fastdiff.optimize` for inference.

        Args:
            options: those of torch.compile, as mode="max-autotune-no-cudagraphs".

        Returns:
            The network itself.
        """
        for module in self.fuse_blocks().modules():
            if isinstance(module, Block):
                module.compile_whole(**options)
        return self

    def _run(self, stage: nn.Module, x: Tensor, emb: Tensor, text: Tensor | None = None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(stage, x, emb, text, use_reentrant=False)
        return stage(x, emb, text)
