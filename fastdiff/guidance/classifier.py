"""Classifier guidance (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs", section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import errors
from .outputs import as_taken, check_call


class ClassifierGuidance(nn.Module):
    """The gradient of ln p(y | x_t) with respect to x_t: for `sampler.sample(gradient=...)`.

    The scale is the sampler's `classifier_scale`: DDPM's mean moves by scale Sigma g (the paper's
    Algorithm 1), DDIM's eps by -scale sigma g (Algorithm 2), after the clip. In x0 that is
    sigma^2 / alpha g: where a schedule ends with alpha near 0 the classifier's error is magnified,
    and `guidance_interval=(0, 20)` keeps DDIM from asking it there. The classes y are the
    conditions that the sampled model is given; or `labels`, for a model that takes none.

    Args:
        classifier: called as classifier(x, t); gives logits [B, classes] of noisy images:
            `fastdiff.guidance.load_classifier` reads one.
        labels: int64 [B], the classes, of each call's images.

    Example:
        >>> from fastdiff import DDPMSampler, NoiseSchedule
        >>> guide = ClassifierGuidance(lambda x, t: x.mean((2, 3)), torch.tensor([0, 2]))
        >>> sampler = DDPMSampler(NoiseSchedule.cosine(1000), 5, classifier_scale=2.0)
        >>> sampler.sample(lambda x, t: x, (2, 3, 8, 8), gradient=guide).shape
        torch.Size([2, 3, 8, 8])
    """

    labels: Tensor | None

    def __init__(self, classifier: nn.Module, labels: Tensor | None = None) -> None:
        super().__init__()
        errors.is_callable("classifier", classifier)
        if labels is not None:
            errors.is_tensor("labels", labels)
        self.classifier = classifier
        self.register_buffer("labels", labels, persistent=False)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The gradient, as x, at x [B, C, H, W] and t [B]; cond: int64 [B], the classes.

        Raises:
            ValueError, TypeError: no classes, or classes or logits that do not fit.
        """
        check_call(x, t)
        labels = cond if self.labels is None else self.labels
        if labels is None:
            raise ValueError("labels: guidance needs classes; give labels, or sample with cond")
        errors.per_sample("labels", labels, torch.int64, "x", x)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            logits = self.classifier(as_taken(x, self.classifier), t.clone())
            errors.is_tensor("classifier: its output", logits)
            if logits.dim() != 2 or len(logits) != len(x):
                raise ValueError(
                    f"classifier: its output has shape {tuple(logits.shape)}, must be "
                    f"({len(x)}, classes): logits"
                )
            errors.in_range("labels", labels, logits.shape[1])
            chosen = F.log_softmax(logits.float(), 1).gather(1, labels.clone()[:, None])
            return torch.autograd.grad(chosen.sum(), x)[0]
