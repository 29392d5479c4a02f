"""The blocks of the U-Net, with guided-diffusion's parameter names."""

from __future__ import annotations

import inspect
import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .config import UNetConfig
from .conv import Conv3x3

M = TypeVar("M", bound=nn.Module)


def timestep_embedding(t: Tensor, channels: int, style: str) -> Tensor:
    """Sinusoidal embedding of t, fp32 [B, channels] (Vaswani et al. 2017, section 3.5).

    "adm": cos then sin of t 10000^(-i / half), i < half; "ddpm": sin then cos, half - 1.
    """
    half = channels // 2
    step = -math.log(10000.0) / (half if style == "adm" else half - 1)
    frequencies = torch.exp(step * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.to(torch.float32)[:, None] * frequencies[None]
    parts = (angles.cos(), angles.sin()) if style == "adm" else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)


def group_norm(channels: int, config: UNetConfig) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(config.norm_groups, channels), channels, eps=config.norm_eps)


def zeroed(module: M) -> M:
    """The module with zero parameters, so that its block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.pad_end = config.downsample_padding == "end"
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if self.pad_end else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(F.pad(x, (0, 1, 0, 1)) if self.pad_end else x)


class Block(nn.Module):
    """A block that runs in plain torch, or, where `fused` is set, on our ops.

    The two are equal to rounding and have the same gradients; only plain torch has second
    derivatives, and traces to the graph that `fastdiff.optimize` knows.
    """

    fused = False

    def compile_whole(self, **options: Any) -> None:
        """Compile the block as one graph; options are those of torch.compile."""
        # each block has a cache of its own: a network's blocks have more sizes than one holds
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            options = {"isolate_recompiles": True, **options}
        self.compile(fullgraph=True, **options)


def fuse(network: nn.Module, fused: bool = True) -> None:
    """Run a network's blocks and 3x3 convolutions on our ops, or in plain torch, in place."""
    for module in network.modules():
        if isinstance(module, Block | Conv3x3):
            module.fused = fused


def norm_silu(norm: Any, x: Tensor, **how: Any) -> Tensor:
    """The norm, AdaGN's scale and shift if given, and SiLU, as one op."""
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **how)


class ResBlock(Block):
    """Two convolutions and a skip, told the time and class by `emb`.

    AdaGN: h = GN(h) (1 + scale) + shift; otherwise h = GN(h + emb). A block that resamples does
    so between SiLU and the first convolution; its skip is resampled without a convolution.

    Args:
        resample: "up" doubles and "down" halves the resolution; None keeps it.
    """

    def __init__(
        self, channels: int, out_channels: int, config: UNetConfig, resample: str | None = None
    ) -> None:
        super().__init__()
        self.resample = resample
        self.scale_shift = config.scale_shift
        self.gain = math.sqrt(0.5) if config.rescale_residual else None
        width = out_channels * (2 if config.scale_shift else 1)
        self.in_layers = nn.Sequential(
            group_norm(channels, config), nn.SiLU(), Conv3x3(channels, out_channels)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(config.embedding_channels, width))
        self.out_layers = nn.Sequential(
            group_norm(out_channels, config),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            zeroed(Conv3x3(out_channels, out_channels)),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = self._resampled(norm_silu(norm, x) if self.fused else act(norm(x)))
        emb = self.emb_layers(emb)
        h = self._modulated(conv(h), emb) if self.scale_shift else self._normed(conv(h, emb))
        _, _, dropout, conv = self.out_layers
        h = conv(dropout(h), residual=self.skip_connection(self._resampled(x)))
        return h if self.gain is None else h * self.gain

    def _normed(self, h: Tensor) -> Tensor:
        norm, act = self.out_layers[0], self.out_layers[1]
        return norm_silu(norm, h) if self.fused else act(norm(h))

    def _modulated(self, h: Tensor, emb: Tensor) -> Tensor:
        norm, act = self.out_layers[0], self.out_layers[1]
        scale, shift = emb.chunk(2, dim=1)
        if self.fused:
            return norm_silu(norm, h, scale=scale, shift=shift)
        scale, shift = scale[:, :, None, None], shift[:, :, None, None]
        return act(torch.addcmul(shift, norm(h), 1 + scale))


class AttentionBlock(Block):
    """Self-attention over the pixels: x + proj(softmax(q k' / sqrt(ch)) v), ch channels a head.

    Where the network is told captions, their tokens have keys and values too, before the pixels'.
    The fused kernel scales q and k by ch^(-1/4) each, or does what is equal to it, and takes
    the softmax in fp32. qkv and proj_out are 1x1 convolutions over the flattened pixels.
    """

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = config.heads_at(channels)
        self.legacy = config.attention_order == "legacy"
        self.gain = math.sqrt(0.5) if config.rescale_residual else None
        self.norm = group_norm(channels, config)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        if config.vocabulary is not None:
            self.encoder_kv = nn.Conv1d(config.embedding_channels, 2 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        height, width = x.shape[2:]
        q, k, v = self._by_head(self._projected(x), 3)
        if text is not None:
            kv = F.linear(text, self.encoder_kv.weight.squeeze(2), self.encoder_kv.bias)
            text_k, text_v = self._by_head(kv, 2)
            k, v = torch.cat((text_k, k), 2), torch.cat((text_v, v), 2)
        attend = ops.attention if self.fused else F.scaled_dot_product_attention
        h = attend(q, k, v).transpose(1, 2).flatten(2)
        h = F.linear(h, self.proj_out.weight.squeeze(2), self.proj_out.bias)
        h = h.transpose(1, 2).unflatten(2, (height, width))
        return x + h if self.gain is None else (x + h) * self.gain

    def _by_head(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """The parts of a projection [B, tokens, parts C], each [B, heads, tokens, C / heads]."""
        order = (self.heads, parts) if self.legacy else (parts, self.heads)
        split = x.unflatten(2, (*order, x.shape[2] // (parts * self.heads)))
        return tuple(part.transpose(1, 2) for part in split.unbind(3 if self.legacy else 2))

    def _projected(self, x: Tensor) -> Tensor:
        """The normalised pixels through qkv, [B, H W, 3 C]."""
        norm, weight, bias = self.norm, self.qkv.weight.squeeze(2), self.qkv.bias
        if self.fused and x.is_cuda and not torch.is_grad_enabled():
            how = norm.num_groups, norm.weight, norm.bias, norm.eps
            return ops.group_norm_linear(x, *how, weight, bias)
        y = norm_silu(norm, x, silu=False) if self.fused else norm(x)
        return F.linear(y.flatten(2).transpose(1, 2), weight, bias)


class Stage(nn.Sequential):
    """Layers in order, of which residual blocks take the embedding, and attention the text."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, text: Tensor | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            else:
                x = layer(x, text) if isinstance(layer, AttentionBlock) else layer(x)
        return x
