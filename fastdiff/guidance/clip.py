"""Guidance by a noise-aware CLIP (Nichol et al. 2021, "GLIDE", section 2.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.clip import CLIP
from .outputs import as_taken, check_call


class CLIPGuidance(nn.Module):
    """The gradient of scale f(x_t, t) g(c) with respect to x_t: for `sampler.sample(gradient=...)`.

    With a table's classifier_scale s it shifts a step's mean by s Sigma times it (Nichol et al.
    2021, section 2.4); s = 1 is Bayes' rule where the score is log p(x_t, c) / (p(x_t) p(c)).
    Whatever else the network is told as cond, these captions guide.

        >>> sampler = DDPMSampler(schedule, 50, classifier_scale=2.0)  # doctest: +SKIP
        >>> guide = CLIPGuidance(clip, tokens)  # doctest: +SKIP
        >>> sampler.sample(model, shape, cond=tokens, gradient=guide)  # doctest: +SKIP

    Args:
        clip: in evaluation mode, on the device of the samples.
        tokens: int64 [B, text_length], a caption a sample.

    Raises:
        ValueError, TypeError: the CLIP does not take these tokens.
    """

    text: Tensor

    def __init__(self, clip: CLIP, tokens: Tensor) -> None:
        super().__init__()
        if not hasattr(clip, "text_features"):
            raise TypeError(f"clip: must be a CLIP, got {type(clip).__name__}")
        self.clip = clip
        with torch.no_grad():
            text = clip.scale * clip.text_features(tokens)
        self.register_buffer("text", text, persistent=False)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """The gradient, as x, at x fp32 [B, C, H, W] and t [B].

        Raises:
            ValueError: x is of another batch than the captions.
        """
        check_call(x, t)
        if len(x) != len(self.text):
            raise ValueError(f"tokens: are of {len(self.text)} captions, x of {len(x)} samples")
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            features = self.clip.image_features(as_taken(x, self.clip), t.clone())
            score = (features * self.text.clone()).sum()
            return torch.autograd.grad(score, x)[0]
