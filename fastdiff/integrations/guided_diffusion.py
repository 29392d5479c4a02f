"""guided-diffusion's and improved-diffusion's U-Nets and classifiers as ours.

Our parameters have their names, and our blocks their arithmetic: a checkpoint fits as it is, once
the flags of their scripts are our `UNetConfig`; and `model.state_dict()` is one of theirs.

| theirs | ours |
|---|---|
| num_channels | channels |
| image_size, num_res_blocks, dropout | the same |
| attention_resolutions "32,16,8" | attention_resolutions (32, 16, 8) |
| channel_mult "" | channel_mult that their scripts give the image size |
| num_heads, num_head_channels (-1: not given) | heads, head_channels |
| use_new_attention_order False, True | attention_order "legacy", "new" |
| use_scale_shift_norm, resblock_updown | scale_shift, resblock_updown |
| class_cond (1000 classes, or CIFAR-10's) | num_classes, of the checkpoint's embedding |
| learn_sigma | learned_variance |
| noise_schedule, diffusion_steps | schedule |
| predict_xstart | prediction "x0", else "eps" |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint import fit_state
from ..errors import one_of
from ..files import read_tensors
from ..models import UNet, UNetConfig
from ..models.encoder import EncoderUNet
from ..schedule import NoiseSchedule

# what their create_model gives an image size where channel_mult is ""
CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
SCHEDULES = {"linear": NoiseSchedule.linear, "cosine": NoiseSchedule.cosine}


def unet_config(
    image_size: int = 64,
    *,
    num_channels: int = 128,
    num_res_blocks: int = 2,
    num_heads: int = 4,
    num_heads_upsample: int = -1,
    num_head_channels: int = -1,
    attention_resolutions: str = "16,8",
    channel_mult: str = "",
    dropout: float = 0.0,
    class_cond: bool = False,
    learn_sigma: bool = False,
    use_scale_shift_norm: bool = True,
    resblock_updown: bool = False,
    use_new_attention_order: bool = False,
    num_classes: int = 1000,
) -> UNetConfig:
    """The UNetConfig of their network; names and defaults of the arguments are their flags'.

    num_classes: of a network with class_cond.

    Raises:
        ValueError: a flag has no counterpart here; says which.
    """
    if num_heads_upsample not in (-1, num_heads):
        raise ValueError(
            f"num_heads_upsample={num_heads_upsample}: must be num_heads={num_heads}, or -1; our "
            "network has as many heads on both sides"
        )
    mults = _numbers(channel_mult, float) if channel_mult else _mults(image_size)
    return UNetConfig(
        image_size=image_size,
        channels=num_channels,
        channel_mult=tuple(int(m) if m == int(m) else m for m in mults),
        num_res_blocks=num_res_blocks,
        attention_resolutions=_sides(attention_resolutions, image_size, len(mults)),
        heads=num_heads,
        head_channels=None if num_head_channels == -1 else num_head_channels,
        attention_order="new" if use_new_attention_order else "legacy",
        scale_shift=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        dropout=dropout,
        num_classes=num_classes if class_cond else None,
        learned_variance=learn_sigma,
    )


def from_guided_diffusion(
    checkpoint: str | Path | Mapping[str, Tensor],
    image_size: int = 64,
    *,
    diffusion_steps: int = 1000,
    noise_schedule: str = "linear",
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    allow_pickle: bool = False,
    **flags: Any,
) -> UNet:
    """A UNet with the weights and outputs of a checkpoint, fp32, in eval mode.

    Its `schedule` and `prediction` are set. Arguments are the flags of a published command, as
    they are; those of the network are `unet_config`'s.

    Args:
        checkpoint: a state dict, a .safetensors file, or a .pt file as they are published.
        allow_pickle: read a .pt file: by torch.load with weights_only, which runs no code of it.
            Before torch 2.10 a file made for it can corrupt memory there (CVE-2026-24747).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a flag has no counterpart here, a .pt file without `allow_pickle`, or weights
            that do not fit the flags; says which.
    """
    one_of("noise_schedule", noise_schedule, SCHEDULES)
    if rescale_timesteps and diffusion_steps != 1000:
        raise ValueError(
            f"rescale_timesteps=True: must be False with diffusion_steps={diffusion_steps}; our "
            "network is told the timestep itself"
        )
    config = unet_config(image_size, **flags)
    state, where = _state(checkpoint, allow_pickle)
    labels = state.get("label_emb.weight")
    if config.num_classes and labels is not None:
        config = replace(config, num_classes=len(labels))
    with torch.device("meta"):
        model = UNet(config)
    model = _filled(model, where, state)
    model.schedule = SCHEDULES[noise_schedule](diffusion_steps)
    model.prediction = "x0" if predict_xstart else "eps"
    return model


def classifier_config(
    image_size: int = 64,
    *,
    classifier_width: int = 128,
    classifier_depth: int = 2,
    classifier_attention_resolutions: str = "32,16,8",
    classifier_use_scale_shift_norm: bool = True,
    classifier_resblock_updown: bool = True,
) -> UNetConfig:
    """The UNetConfig of their classifier's way down; as `unet_config`."""
    mults = _mults(image_size)
    return UNetConfig(
        image_size=image_size,
        channels=classifier_width,
        channel_mult=mults,
        num_res_blocks=classifier_depth,
        attention_resolutions=_sides(classifier_attention_resolutions, image_size, len(mults)),
        head_channels=64,
        scale_shift=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
    )


def classifier_from_guided_diffusion(
    checkpoint: str | Path | Mapping[str, Tensor],
    image_size: int = 64,
    *,
    classifier_pool: str = "attention",
    allow_pickle: bool = False,
    **flags: Any,
) -> EncoderUNet:
    """Their classifier of noisy images, fp32, in eval mode; as `from_guided_diffusion`.

    Arguments are the flags of their commands; those of the network are `classifier_config`'s.
    """
    config = classifier_config(image_size, **flags)
    state, where = _state(checkpoint, allow_pickle)
    last = next((state[k] for k in ("out.2.c_proj.bias", "out.3.bias") if k in state), None)
    with torch.device("meta"):
        model = EncoderUNet(config, 1000 if last is None else len(last), classifier_pool)
    return _filled(model, where, state)


M = TypeVar("M", bound=nn.Module)


def _filled(model: M, where: Path, state: dict[str, Tensor]) -> M:
    fit_state(where, model, state)
    model.load_state_dict({name: v.float() for name, v in state.items()}, assign=True)
    return model.eval()


def _mults(image_size: int) -> tuple[float, ...]:
    one_of("image_size", image_size, CHANNEL_MULT)
    return CHANNEL_MULT[image_size]


def _sides(text: str, image_size: int, levels: int) -> tuple[int, ...]:
    """The levels at which their network attends; a resolution that is none has no effect there."""
    return tuple(s for s in _numbers(text, int) if s in [image_size >> k for k in range(levels)])


def _state(
    checkpoint: str | Path | Mapping[str, Tensor], allow_pickle: bool
) -> tuple[dict[str, Tensor], Path]:
    if isinstance(checkpoint, Mapping):
        return dict(checkpoint), Path("checkpoint")
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        return read_tensors(path)[0], path
    if not allow_pickle:
        raise ValueError(
            f"{path}: is a pickle, read only if allow_pickle=True says so (by torch.load with "
            "weights_only, which runs no code of it; trust the file all the same before torch 2.10)"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # almost anything is raised for what is damaged
        raise ValueError(
            f"{path}: cannot be read: damaged, or more than tensors ({type(error).__name__}); "
            "fetch it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds no state dict; takes the network's weights alone")
    return state, path


def _numbers(text: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r}: must be numbers with commas between, as '32,16,8'") from None
