"""diffusers' UNet2DModel as our UNet: the same function, with our training, engine and students."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ... import errors
from ...models import UNet, UNetConfig
from ...schedule import NoiseSchedule

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# (flip_sin_to_cos, freq_shift) by the name of our embedding
EMBEDDINGS = {(True, 0): "adm", (False, 1): "ddpm"}
# what must be as it is by default: our network has no such part
FIXED = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "add_attention": True,
    "class_embed_type": None,
}
# the blocks that we have, and whether they resample by a residual block
BLOCKS = {
    "DownBlock2D": False,
    "ResnetDownsampleBlock2D": True,
    "UpBlock2D": False,
    "ResnetUpsampleBlock2D": True,
}
# attend, and resample as downsample_type and upsample_type say
ATTENDING = ("AttnDownBlock2D", "AttnUpBlock2D")
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def from_diffusers(unet: Any, scheduler: Any = None) -> UNet:
    """A UNet with the weights, and to rounding the outputs, of a UNet2DModel; in eval mode.

    Labels are the peer's `class_labels`; -1 is "no class", which the peer does not have.

    Args:
        unet: a `diffusers.UNet2DModel`.
        scheduler: of diffusers, whose alphas_cumprod and prediction_type become the model's
            `schedule` and `prediction`.

    Raises:
        TypeError: it is no UNet2DModel, or the scheduler is none of diffusers'.
        ValueError: a part of it is none that our network has; says which.
    """
    if type(unet).__name__ != "UNet2DModel":
        raise TypeError(f"unet: is a {type(unet).__name__}, must be a diffusers UNet2DModel")
    if scheduler is not None and not hasattr(scheduler, "alphas_cumprod"):
        raise TypeError(
            f"scheduler: is a {type(scheduler).__name__}, must be one of diffusers'; or leave it "
            "out, and set the model's `schedule` and `prediction`"
        )
    config = _config(unet)
    with torch.device("meta"):
        model = UNet(config)
    given = unet.state_dict()
    state = {
        ours: _value(name, given, model.state_dict()[ours], config)
        for ours, name in names(model, unet).items()
    }
    model.load_state_dict(state, assign=True)
    model.to(next(unet.parameters()).device)
    if scheduler is not None:
        kind = scheduler.config.prediction_type
        if kind not in PREDICTIONS:
            raise ValueError(
                f"scheduler: prediction_type={kind!r}, must be one of {list(PREDICTIONS)}"
            )
        model.prediction = PREDICTIONS[kind]
        abar = scheduler.alphas_cumprod.double().cpu().numpy()
        model.schedule = NoiseSchedule.from_alphas_cumprod(abar)
    return model.eval()


def to_diffusers(model: UNet) -> Any:
    """A `diffusers.UNet2DModel` with the weights and outputs of a UNet, in eval mode.

    Its save_pretrained(folder) writes what `from_diffusers(UNet2DModel.from_pretrained(folder))`
    reads. "No class" (label -1) has no counterpart.

    Raises:
        TypeError: it is no UNet.
        ValueError: a part of the network is none that diffusers' has; says which.
    """
    from diffusers import UNet2DModel

    errors.is_a("model", model, UNet)
    config, default = model.config, UNetConfig()
    for name in ("patch_size", "vocabulary", "guidance_max", "predict_both", "rescale_residual"):
        if getattr(config, name) != getattr(default, name):
            raise ValueError(
                f"model: {name}={getattr(config, name)!r}; diffusers' network has no such part"
            )
    levels = range(len(config.channel_mult))
    widths = [config.width_at(level) for level in levels]
    if config.head_channels is None and config.heads != 1:
        raise ValueError(
            f"model: heads={config.heads}: must be 1, or head_channels given; diffusers counts "
            "channels a head"
        )
    if odd := [width for width in widths if width % config.norm_groups]:
        raise ValueError(
            f"model: norm_groups={config.norm_groups}: must divide all widths, not so {odd}"
        )
    flip, shift = next(k for k, v in EMBEDDINGS.items() if v == config.time_embedding)
    kinds = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    if not config.resblock_updown:
        kinds = ("DownBlock2D", "UpBlock2D")
    attends = [config.side_at(level) in config.attention_resolutions for level in levels]
    downs, ups = (
        [f"Attn{way}Block2D" if attend else kind for attend in attends]
        for way, kind in zip(("Down", "Up"), kinds, strict=True)
    )
    resampling = "resnet" if config.resblock_updown else "conv"
    unet: Any = UNet2DModel(
        sample_size=config.image_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=tuple(widths),
        layers_per_block=config.num_res_blocks,
        down_block_types=tuple(downs),
        up_block_types=tuple(reversed(ups)),
        downsample_type=resampling,
        upsample_type=resampling,
        downsample_padding=1 if config.downsample_padding == "both" else 0,
        attention_head_dim=config.head_channels,
        attn_norm_num_groups=config.norm_groups if config.scale_shift else None,
        norm_num_groups=config.norm_groups,
        norm_eps=config.norm_eps,
        dropout=config.dropout,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        num_class_embeds=config.num_classes,
        flip_sin_to_cos=flip,
        freq_shift=shift,
    )
    state = model.state_dict()
    given = unet.state_dict()
    for ours, name in names(model, unet).items():
        if match := re.fullmatch(r"(.*\.)to_q\.(weight|bias)", name):
            for letter, part in zip("qkv", _split(state[ours], config), strict=True):
                own = f"{match[1]}to_{letter}.{match[2]}"
                given[own] = part.reshape(given[own].shape)
        else:
            given[name] = state[ours].reshape(given[name].shape)
    unet.load_state_dict(given)
    return unet.to(state[ours].device).eval()


def names(model: UNet, unet: Any) -> dict[str, str]:
    """diffusers' name of each of our tensors; a "qkv" of ours has three, of which it is to_q."""
    modules = _modules(unet)
    theirs = {ours: peer for peer, ours in modules.items()}
    found = {}
    for name in model.state_dict():
        prefix = max((p for p in theirs if name.startswith(p + ".")), key=len)
        head, _, tail = name[len(prefix) + 1 :].rpartition(".")
        inner = {v: k for k, v in RESNET.items()} if "resnets" in theirs[prefix] else {}
        inner |= {"norm": "group_norm", "proj_out": "to_out.0", "qkv": "to_q"}
        if "samplers" in theirs[prefix]:
            inner |= {v: k for k, v in RESNET.items()}
        head = f"{inner.get(head, head)}." if head else ""
        found[name] = f"{theirs[prefix]}.{head}{tail}"
    return found


def _modules(unet: Any) -> dict[str, str]:
    """Our module for each of diffusers'; its blocks are walked in the order of our stages."""
    ours = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding": "label_emb",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for side, way, blocks in (
        ("input", "down", unet.down_blocks),
        ("output", "up", unet.up_blocks),
    ):
        index = 1 if side == "input" else 0
        for i, block in enumerate(blocks):
            path, attends = f"{way}_blocks.{i}", hasattr(block, "attentions")
            for j in range(len(block.resnets)):
                ours[f"{path}.resnets.{j}"] = f"{side}_blocks.{index}.0"
                if attends:
                    ours[f"{path}.attentions.{j}"] = f"{side}_blocks.{index}.1"
                index += 1
            sampler = f"{way}samplers"
            if getattr(block, sampler, None):
                # downsampling is a stage of its own, upsampling the end of the last one
                at = f"{index}.0" if side == "input" else f"{index - 1}.{1 + attends}"
                index += side == "input"
                leaf = "" if hasattr(getattr(block, sampler)[0], "norm1") else ".conv"
                end = leaf and (".op" if side == "input" else ".conv")
                ours[f"{path}.{sampler}.0{leaf}"] = f"{side}_blocks.{at}{end}"
    return ours


def _value(name: str, given: dict[str, Tensor], like: Tensor, config: UNetConfig) -> Tensor:
    if match := re.fullmatch(r"(.*\.)to_q\.(weight|bias)", name):
        # our rows: head by head, each q, k and v
        parts = [given[f"{match[1]}to_{k}.{match[2]}"] for k in "qkv"]
        heads = config.heads_at(len(parts[0]))
        split = torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1)
        return split.reshape(like.shape)
    return given[name].reshape(like.shape)


def _split(qkv: Tensor, config: UNetConfig) -> tuple[Tensor, ...]:
    """q, k and v rows of our qkv [3 C, ...], each head after head."""
    heads = config.heads_at(len(qkv) // 3)
    order, dim = ((heads, 3, -1), 1) if config.attention_order == "legacy" else ((3, heads, -1), 0)
    return tuple(part.flatten(0, 1) for part in qkv.unflatten(0, order).unbind(dim))


def _config(unet: Any) -> UNetConfig:
    """The UNetConfig of the same network."""
    config = unet.config
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"unet: {name}={config[name]!r}; our network has it {value!r} only")
    downs, ups = list(config.down_block_types), list(config.up_block_types)
    # the deepest level does not go further down, nor the first further up
    attends = [name in ATTENDING for name in downs]
    by_blocks = _by_blocks(downs[:-1], config.downsample_type)
    if [name in ATTENDING for name in reversed(ups)] != attends or (
        _by_blocks(ups[:-1], config.upsample_type) != by_blocks
    ):
        raise ValueError(
            f"unet: down_block_types={downs} and up_block_types={ups}: must be of the same kinds, "
            "in reverse"
        )
    embedding = EMBEDDINGS.get((config.flip_sin_to_cos, config.freq_shift))
    if embedding is None:
        raise ValueError(
            f"unet: flip_sin_to_cos={config.flip_sin_to_cos}, freq_shift={config.freq_shift}: must "
            f"be one of {list(EMBEDDINGS)}"
        )
    widths, groups = config.block_out_channels, config.norm_num_groups
    if any(width % widths[0] for width in widths):
        raise ValueError(f"unet: block_out_channels={widths}: must be multiples of the first")
    scale_shift = config.resnet_time_scale_shift == "scale_shift"
    usual = (groups,) if scale_shift else (None, groups)
    if config.attn_norm_num_groups not in usual:
        raise ValueError(
            f"unet: attn_norm_num_groups={config.attn_norm_num_groups}: must be norm_num_groups, "
            f"{groups}"
        )
    learned = config.out_channels == 2 * config.in_channels
    if not learned and config.out_channels != config.in_channels:
        raise ValueError(
            f"unet: out_channels={config.out_channels}: must be in_channels={config.in_channels}, "
            "or twice as many"
        )
    side = config.sample_size
    if not isinstance(side, int):
        raise ValueError(f"unet: sample_size={side!r}: must be an int, the side of its images")
    return UNetConfig(
        image_size=side,
        in_channels=config.in_channels,
        channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=config.layers_per_block,
        attention_resolutions=tuple(side >> k for k, attend in enumerate(attends) if attend),
        head_channels=config.attention_head_dim,
        scale_shift=scale_shift,
        resblock_updown=by_blocks,
        dropout=config.dropout,
        num_classes=config.num_class_embeds,
        learned_variance=learned,
        norm_groups=groups,
        norm_eps=config.norm_eps,
        time_embedding=embedding,
        downsample_padding="both" if config.downsample_padding else "end",
    )


def _by_blocks(types: list[str], resampling: str) -> bool:
    """Whether blocks that resample do so by residual blocks."""
    for name in types:
        if name not in BLOCKS and name not in ATTENDING:
            raise ValueError(f"unet: block {name!r}: must be one of {[*BLOCKS, *ATTENDING]}")
    found = {BLOCKS.get(name, resampling == "resnet") for name in types}
    if len(found) > 1:
        raise ValueError(f"unet: blocks {types}: must all resample alike")
    return found == {True}
