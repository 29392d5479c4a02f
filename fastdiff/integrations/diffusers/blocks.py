"""diffusers' residual blocks and attention on our ops, with gradients: for `patch`.

Equal to rounding, and with the same parameters. Under torch.compile and torch.export they are what
diffusers has, which is what a compiler knows to fuse.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ... import ops
from ...inplace import Fast, FusedConv2d
from ...models.blocks import norm_silu
from ...models.conv import fused


class FastResnetBlock2D(Fast, ResnetBlock2D):
    """GroupNorm, AdaGN and SiLU in one op; the convolutions add embedding and residual."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() or not self._fits(temb):
            return super().forward(input_tensor, temb, *args, **kwargs)
        x, h = input_tensor, norm_silu(self.norm1, input_tensor)
        resample = self.upsample or self.downsample
        if resample is not None:
            x, h = resample(x), resample(h)
        emb = None
        if self.time_emb_proj is not None:
            emb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            scale, shift = emb.chunk(2, dim=1)
            h = norm_silu(self.norm2, self.conv1(h), scale=scale, shift=shift)
        else:
            h = norm_silu(self.norm2, fused(self.conv1, h, emb))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        h = fused(self.conv2, self.dropout(h), None, x)
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor

    def _fits(self, temb: Tensor | None) -> bool:
        return (
            isinstance(self.nonlinearity, nn.SiLU)
            and all(_bare(conv, nn.Conv2d, FusedConv2d) for conv in (self.conv1, self.conv2))
            and all(_bare(norm, nn.GroupNorm) for norm in (self.norm1, self.norm2))
            and self.time_embedding_norm in ("default", "scale_shift")
            and (temb is not None or self.time_emb_proj is None)
        )


class FastAttnProcessor(Fast, AttnProcessor2_0):
    """Self- or cross-attention by `ops.attention`, its norm by `ops.group_norm_silu`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        given = hidden_states, encoder_hidden_states, attention_mask
        if torch.compiler.is_compiling() or attention_mask is not None or not _plain(attn):
            return super().__call__(attn, *given, temb, *args, **kwargs)
        x = hidden_states
        size = x.shape[2:] if x.dim() == 4 else None
        h = x if size is not None else x.transpose(1, 2)
        if attn.group_norm is not None:
            h = norm_silu(attn.group_norm, h, silu=False)
        h = h.flatten(2).transpose(1, 2)
        context = h if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            project(y).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for project, y in ((attn.to_q, h), (attn.to_k, context), (attn.to_v, context))
        )
        h = ops.attention(q, k, v).transpose(1, 2).flatten(2)
        h = attn.to_out[1](attn.to_out[0](h))
        if size is not None:
            h = h.transpose(1, 2).unflatten(2, size)
        if attn.residual_connection:
            h = h + x
        return h if attn.rescale_output_factor == 1 else h / attn.rescale_output_factor


def _plain(attn: Any) -> bool:
    """Whether nothing but a GroupNorm, on images, is to be done beside attention."""
    alone = attn.spatial_norm is attn.norm_q is attn.norm_k is None and not attn.norm_cross
    return alone and (attn.group_norm is None or _bare(attn.group_norm, nn.GroupNorm))


def _bare(layer: nn.Module, *kinds: type) -> bool:
    """Whether a layer is what its weights say: one of these kinds, and none listens to its call."""
    return type(layer) in kinds and not (layer._forward_hooks or layer._forward_pre_hooks)
