"""Small networks of every family the engine serves, with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import UNet, UNetConfig


def _ours(**how: Any) -> nn.Module:
    config = UNetConfig(image_size=16, channels=32, channel_mult=(1, 2), norm_groups=8, **how)
    return UNet(config)


def _diffusers() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )


def _diffusers_text() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _image(batch: int, side: int = 16, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, side, side, generator=generator)
    return x, torch.randint(0, 1000, (batch,), generator=generator)


def _labelled(batch: int) -> tuple[Tensor, ...]:
    return *_image(batch), torch.arange(batch) % 5 - 1


def _texted(batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return *_image(batch, channels=4), torch.randn(batch, 7, 32, generator=generator)


def _captioned(batch: int) -> tuple[Tensor, ...]:
    tokens = torch.randint(20, (batch, 5), generator=torch.Generator().manual_seed(3))
    return *_image(batch), tokens


_DDPM = {
    "attention_resolutions": (8,),
    "scale_shift": False,
    "time_embedding": "ddpm",
    "downsample_padding": "end",
}
_ADM = {
    "attention_resolutions": (16, 8),
    "head_channels": 16,
    "attention_order": "new",
    "resblock_updown": True,
    "num_classes": 4,
    "learned_variance": True,
}
_CAPTIONS = {
    "attention_resolutions": (8,),
    "head_channels": 32,
    "vocabulary": 20,
    "text_length": 5,
}

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "ddpm": (lambda: _ours(**_DDPM), _image),
    "adm": (lambda: _ours(**_ADM), _labelled),
    "edm": (lambda: _ours(attention_resolutions=(8,), rescale_residual=True), _image),
    "captions": (lambda: _ours(**_CAPTIONS), _captioned),
    "UNet2DModel": (_diffusers, _image),
    "UNet2DConditionModel": (_diffusers_text, _texted),
}


def network(name: str) -> nn.Module:
    """A network in evaluation mode, no layer of which is zero."""
    torch.manual_seed(0)
    model = NETWORKS[name][0]().eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def inputs(name: str, batch: int = 2) -> tuple[Tensor, ...]:
    return NETWORKS[name][1](batch)


def run(model: nn.Module, *args: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The output, in float64, of a network that computes in dtype."""
    given = [a.to(dtype) if a.is_floating_point() else a for a in args]
    with torch.no_grad():
        out = model(*given)
    return (out if isinstance(out, Tensor) else out.sample).double()
