"""The Inception features that published Fréchet distances are about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .. import errors

BATCH = 50
FILE = "weights-inception-2015-12-05-6726825d.pth"


def inception_features(
    weights: str | Path, device: torch.device | str = "cpu", progress: bool = False
) -> Callable[[Tensor], Tensor]:
    """A function from uint8 images [N, 1 or 3, H, W] to features, fp32 [N, 2048].

    The network, its resizing and its weights are those of the original FID (Heusel et al. 2017)
    as torch-fidelity (0.3 or later) has them. Grey images are repeated in three channels.

    Args:
        weights: torch-fidelity's file, `weights-inception-2015-12-05-6726825d.pth` of its releases;
            nothing is downloaded.

    Raises:
        ModuleNotFoundError: torch-fidelity is missing.
        FileNotFoundError: the file is missing.
        ValueError: the file holds something else.
    """
    path = errors.path("weights", weights)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; takes torch-fidelity's {FILE}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ModuleNotFoundError(
            f"Inception features need torch-fidelity ({error}); pip install torch-fidelity"
        ) from None
    try:
        # torch-fidelity reads pickles without restraint: only one of mere tensors may reach it
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(
            f"{path}: is damaged, or holds more than tensors ({type(error).__name__}); "
            f"takes torch-fidelity's {FILE}"
        ) from None
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path}: holds other weights than torch-fidelity's {FILE} ({type(error).__name__})"
        ) from None
    network = network.to(device).eval()

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        found = []
        for part in tqdm(images.split(BATCH), desc="Inception", disable=not progress):
            (x,) = network(part.expand(-1, 3, -1, -1).to(device))
            found.append(x.cpu())
        return torch.cat(found)

    return features
