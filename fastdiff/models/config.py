"""The U-Net's configuration: one frozen record that the code, the JSON and the docs share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import one_of
from ..record import Record

_CHOICES = {
    "attention_order": ("legacy", "new"),
    "time_embedding": ("adm", "ddpm"),
    "downsample_padding": ("both", "end"),
}
_POSITIVE = (
    "image_size",
    "in_channels",
    "channels",
    "num_res_blocks",
    "attention_resolutions",
    "heads",
    "head_channels",
    "num_classes",
    "vocabulary",
    "text_length",
    "text_layers",
    "patch_size",
    "norm_groups",
)


@dataclass(frozen=True)
class UNetConfig(Record):
    """A U-Net of the ADM family (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs").

    The defaults are guided-diffusion's conventions; `ddpm_cifar10()` shows the DDPM ones.

    Attributes:
        image_size: side of the square images it is made for, in pixels.
        in_channels: image channels.
        patch_size: side of the squares of pixels that become one pixel of as many more channels
            before the first convolution, and pixels again after the last (Hoogeboom et al. 2023,
            "Simple diffusion"): at 2, a fourth of the work.
        channels: width of the first level; a level has `channels * channel_mult[level]`.
        channel_mult: one factor a level; each level halves the resolution of the one before.
        num_res_blocks: residual blocks a level on the way down (one more on the way up).
        attention_resolutions: sides of a level, in its own pixels, at which blocks are followed by
            attention; the middle of the network always attends.
        heads: attention heads; ignored when `head_channels` is given.
        head_channels: channels of each attention head.
        attention_order: how a checkpoint's qkv rows are laid out: "legacy" is head by head,
            each head q, k, v; "new" is all q, then all k, then all v.
        scale_shift: AdaGN, GN(h) (1 + scale) + shift; otherwise the embedding is added.
        resblock_updown: resample inside residual blocks (BigGAN), not by plain convolutions.
        rescale_residual: multiply each block's sum by 1/sqrt(2) (EDM's skip_scale).
        dropout: probability, before the last convolution of each residual block.
        num_classes: labels 0 .. num_classes - 1, and -1 for "no class"; None: unconditional.
        vocabulary: the network is told captions, as tokens 0 .. vocabulary - 1 (Nichol et al. 2021,
            "GLIDE"): a transformer reads them, its last token's state is added to the embedding of
            time, and all states are keys and values of every attention; None: it is told none.
            Tokens 0, 1 and 2 are padding, start and end (`fastdiff.models.text`).
        text_length: tokens of a caption, padded; of no account without a vocabulary, as the next.
        text_layers: blocks of the transformer.
        guidance_max: the network has the guidance weight w as an input, from 0 to this (Meng et al.
            2022, "On Distillation of Guided Diffusion Models"); None: it has not.
        learned_variance: the output has a second set of channels, the variance's.
        predict_both: output x0 merged from a prediction of x0 and one of eps, each as much as it
            knows at t: sigma^2 x0 + alpha (x_t - sigma eps) (Salimans & Ho 2022, section 4). Needs
            the model's `schedule`; its prediction is "x0".
        norm_groups: groups of GroupNorm; the greatest divisor shared with the width is used.
        norm_eps: epsilon of GroupNorm.
        time_embedding: "adm" (cosines first, frequencies over half) or "ddpm" (sines first,
            over half - 1).
        downsample_padding: "both" pads the strided convolution on every side, "end" only right
            and below, as DDPM does.
    """

    image_size: int = 32
    in_channels: int = 3
    patch_size: int = 1
    channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    heads: int = 1
    head_channels: int | None = None
    attention_order: str = "legacy"
    scale_shift: bool = True
    resblock_updown: bool = False
    rescale_residual: bool = False
    dropout: float = 0.0
    num_classes: int | None = None
    vocabulary: int | None = None
    text_length: int = 16
    text_layers: int = 2
    guidance_max: float | None = None
    learned_variance: bool = False
    predict_both: bool = False
    norm_groups: int = 32
    norm_eps: float = 1e-5
    time_embedding: str = "adm"
    downsample_padding: str = "both"

    @classmethod
    def ddpm_cifar10(cls) -> UNetConfig:
        """The CIFAR-10 network of Ho et al. 2020 (35,746,307 parameters)."""
        return cls(
            scale_shift=False,
            dropout=0.1,
            norm_eps=1e-6,
            time_embedding="ddpm",
            downsample_padding="end",
        )

    @classmethod
    def adm(cls, image_size: int) -> UNetConfig:
        """guided-diffusion's published class-conditional ImageNet network for 64, 128 or 256."""
        published: dict[int, dict[str, Any]] = {
            64: {
                "channels": 192,
                "channel_mult": (1, 2, 3, 4),
                "num_res_blocks": 3,
                "head_channels": 64,
                "attention_order": "new",
                "dropout": 0.1,
            },
            128: {"channels": 256, "channel_mult": (1, 1, 2, 3, 4), "heads": 4},
            256: {"channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "head_channels": 64},
        }
        one_of("image_size", image_size, published)
        return cls(
            image_size=image_size,
            attention_resolutions=(32, 16, 8),
            resblock_updown=True,
            num_classes=1000,
            learned_variance=True,
            **published[image_size],
        )

    @property
    def out_channels(self) -> int:
        """Channels of the output: the image's, twice with a learned variance."""
        return self.in_channels * (2 if self.learned_variance else 1)

    @property
    def conditional(self) -> bool:
        """Whether the network is told of an image: its class, or its caption."""
        return self.num_classes is not None or self.vocabulary is not None

    @property
    def embedding_channels(self) -> int:
        """Width of the embedding of time and class."""
        return 4 * self.channels

    @property
    def downsampling(self) -> int:
        """Factor between the image's side and the deepest level's."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)

    def side_at(self, level: int) -> int:
        """Side of the square feature maps of a level."""
        return self.image_size // self.patch_size >> level

    def width_at(self, level: int) -> int:
        """Channels of a level."""
        return int(self.channel_mult[level] * self.channels)

    def heads_at(self, channels: int) -> int:
        """Attention heads of a block that is `channels` wide."""
        return channels // self.head_channels if self.head_channels else self.heads

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _POSITIVE:
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if any(number is not None and number < 1 for number in numbers):
                raise ValueError(f"{name}={value}: must be 1 or more")
        for name, choices in _CHOICES.items():
            one_of(name, getattr(self, name), choices)
        if not self.channel_mult:
            raise ValueError("channel_mult=(): must have a factor for each level, one at least")
        if any(mult <= 0 or mult * self.channels % 1 for mult in self.channel_mult):
            raise ValueError(
                f"channel_mult={self.channel_mult}: must be above 0 and, times channels="
                f"{self.channels}, a whole number of channels"
            )
        if self.vocabulary is not None:
            self._check_text(self.vocabulary)
        if self.predict_both and self.learned_variance:
            raise ValueError("predict_both, learned_variance: are both set; choose one")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout!r}: must be in [0, 1)")
        if self.guidance_max is not None and not self.guidance_max > 0.0:
            raise ValueError(f"guidance_max={self.guidance_max!r}: must be greater than 0, or None")
        if not self.norm_eps > 0.0:
            raise ValueError(f"norm_eps={self.norm_eps!r}: must be greater than 0")
        if self.channels % 2:
            raise ValueError(f"channels={self.channels}: must be even (sines and cosines)")
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size={self.image_size}: must be divisible by {self.downsampling}, "
                f"which {len(self.channel_mult)} levels of patch_size={self.patch_size} need"
            )
        self._check_attention()

    def _check_text(self, vocabulary: int) -> None:
        if self.num_classes is not None:
            raise ValueError("num_classes, vocabulary: are both set; choose one")
        if vocabulary < 3 or self.text_length < 2:
            raise ValueError(
                f"vocabulary={vocabulary}, text_length={self.text_length}: must be 3 and 2 or "
                "more, for the empty caption's start and end, and padding"
            )
        split = self.head_channels or self.heads
        if self.embedding_channels % split:
            name = "head_channels" if self.head_channels else "heads"
            raise ValueError(
                f"{name}={split}: must divide the {self.embedding_channels} channels of the text"
            )

    def _check_attention(self) -> None:
        sides = [self.side_at(level) for level in range(len(self.channel_mult))]
        if stray := sorted(set(self.attention_resolutions) - set(sides)):
            raise ValueError(
                f"attention_resolutions={self.attention_resolutions}: {stray} must be among the "
                f"levels' sides {sides}"
            )
        split = self.head_channels or self.heads
        for level, side in enumerate(sides):
            width = self.width_at(level)
            if (side in self.attention_resolutions or side == sides[-1]) and width % split:
                name = "head_channels" if self.head_channels else "heads"
                raise ValueError(f"{name}={split}: must divide the {width} channels at {side}px")
