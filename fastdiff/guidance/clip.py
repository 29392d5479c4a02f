"""Guidance by a noise-aware CLIP (Nichol et al. 2021, "GLIDE", section 2.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.clip import CLIP


def clip_gradient(clip: CLIP, tokens: Tensor) -> Callable[..., Tensor]:
    """The gradient of scale f(x_t, t) g(c) with respect to x_t, for `sampler.sample(gradient=...)`.

    With a table's classifier_scale s it shifts a step's mean by s Sigma times it (Nichol et al.
    2021, section 2.4); s = 1 is Bayes' rule where the score is log p(x_t, c) / (p(x_t) p(c)).
    Whatever else the network is told as cond, these captions guide.

        >>> sampler = DDPMSampler(schedule, 50, classifier_scale=2.0)  # doctest: +SKIP
        >>> guide = clip_gradient(clip, tokens)  # doctest: +SKIP
        >>> sampler.sample(model, shape, cond=tokens, gradient=guide)  # doctest: +SKIP

    Args:
        clip: in evaluation mode, on the device of the samples.
        tokens: int64 [B, text_length], a caption a sample.

    Returns:
        gradient(x, t, cond=None), like x: x fp32 [B, C, H, W], t [B].

    Raises:
        ValueError, TypeError: the CLIP does not take these tokens; later, x of another batch.
    """
    with torch.no_grad():
        text = clip.scale * clip.text_features(tokens)

    def gradient(x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        if len(x) != len(text):
            raise ValueError(f"tokens: are of {len(text)} captions, x of {len(x)} samples")
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            score = (clip.image_features(x, t) * text).sum()
            return torch.autograd.grad(score, x)[0]

    return gradient
