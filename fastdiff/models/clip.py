"""A noise-aware CLIP: how well a caption fits a noisy image (Nichol et al. 2021, section 2.4)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import is_batch, is_tensor
from .config import UNetConfig
from .encoder import EncoderUNet
from .text import TextEncoder, check_tokens

MOST = 100.0  # of the scale (Radford et al. 2021, section 2.5)


class CLIP(nn.Module):
    """Vectors of noisy images and of captions, and their products: scores (Radford et al. 2021).

        >>> config = UNetConfig(channels=32, norm_groups=8, vocabulary=24, text_length=6)
        >>> tokens = torch.tensor([[1, 5, 2, 0, 0, 0], [1, 6, 7, 2, 0, 0]])
        >>> CLIP(config)(torch.zeros(2, 3, 32, 32), torch.tensor([0, 999]), tokens).shape
        torch.Size([2, 2])

    Args:
        config: of a U-Net that is told captions: the image's side is its way down, the text's side
            its text encoder.
        outputs: numbers of a vector.
    """

    def __init__(self, config: UNetConfig, outputs: int = 128) -> None:
        super().__init__()
        self.config = config
        self.text = TextEncoder(config)
        self.text_proj = nn.Linear(config.embedding_channels, outputs, bias=False)
        self.image = EncoderUNet(replace(config, vocabulary=None), outputs)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """What products of unit vectors are multiplied by: learnt, at most 100."""
        return self.logit_scale.exp().clamp(max=MOST)

    def image_features(self, x: Tensor, t: Tensor) -> Tensor:
        """Unit vectors [B, outputs] of images [B, C, H, W], noised to timesteps t [B]."""
        return F.normalize(self.image(x, t))

    def text_features(self, tokens: Tensor) -> Tensor:
        """Unit vectors [B, outputs] of captions' tokens, int64 [B, text_length].

        Raises:
            ValueError, TypeError: other shapes, dtypes or tokens.
        """
        is_batch("tokens", tokens)
        check_tokens("tokens", tokens, len(tokens), self.config)
        return F.normalize(self.text_proj(self.text(tokens)[:, -1]))

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """The scores [images, captions] of all pairs: scale f(x_t, t) g(c)."""
        return self.scale * self.image_features(x, t) @ self.text_features(tokens).mT


def contrastive_loss(scores: Tensor, tokens: Tensor) -> Tensor:
    """The symmetric contrastive loss of a batch of pairs, a scalar; 0 where all is known.

        (KL(p || softmax(scores)) + KL(p || softmax(scores'))) / 2,   p_ij = [c_i = c_j] / n_i

    the mean over rows, n_i being how often the caption c_i is in the batch. So an image fits every
    place where its caption stands, and a caption every image that has it: none of these is a wrong
    pair. With all captions different it is the loss of Radford et al. 2021, figure 3. Its minimum
    is at log p(x, c) / (p(x) p(c)), up to a constant, whatever the captions' frequencies: what
    guidance needs the gradient of. To leave equal captions out of the sums would move it.

    Args:
        scores: [B, B], of image i and caption j.
        tokens: int64 [B, L], the captions'.

    Raises:
        ValueError: scores are not square, or not of as many captions.
    """
    is_tensor("scores", scores)
    is_batch("tokens", tokens)
    if tokens.dim() != 2 or not scores.is_floating_point():
        raise ValueError(
            f"tokens: of shape {tuple(tokens.shape)}, scores {scores.dtype}: must be [B, L], and "
            "floating point"
        )
    if scores.shape != (len(tokens), len(tokens)):
        raise ValueError(
            f"scores: have shape {tuple(scores.shape)}, must be [B, B] of {len(tokens)} captions"
        )
    equal = (tokens[:, None] == tokens).all(2).to(scores.dtype)
    wanted = equal / equal.sum(1, keepdim=True)
    of_image = F.kl_div(scores.log_softmax(1), wanted, reduction="batchmean")
    of_caption = F.kl_div(scores.mT.log_softmax(1), wanted, reduction="batchmean")
    return (of_image + of_caption) / 2
