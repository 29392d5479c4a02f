"""The classifier's file, its accuracy and its features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .. import errors
from ..checkpoint import ASSETS, fit_state
from ..files import make_folder, read_tensors, write_bytes, write_tensors
from ..models.classifier import Classifier, ClassifierConfig
from ..spacing import sizes

SHIPPED = ASSETS / "fashion-mnist-classifier"
WEIGHTS, CONFIG = "classifier.safetensors", "config.json"
BATCH = 500


def save_classifier(
    folder: str | Path, model: Classifier, class_names: tuple[str, ...], training: dict[str, Any]
) -> None:
    """Write a classifier as `folder`/classifier.safetensors, in float16, and config.json."""
    folder = Path(folder)
    make_folder(folder)
    record = {
        "classifier": model.config.to_json(),
        "class_names": list(class_names),
        "training": training,
    }
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    write_tensors(folder / WEIGHTS, tensors)
    write_bytes(folder / CONFIG, (json.dumps(record, indent=2) + "\n").encode())


def load_classifier(folder: str | Path = SHIPPED) -> Classifier:
    """A trained classifier, fp32 on the CPU and in eval mode; by default the shipped one.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file is damaged, or the two do not fit.
    """
    path = errors.path("folder", folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; a classifier's folder has it beside {WEIGHTS}")
    try:
        record = json.loads(path.read_text())
        model = Classifier(ClassifierConfig.from_json(record["classifier"]))
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error}; it is no classifier's") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    weights = path.with_name(WEIGHTS)
    tensors, _ = read_tensors(weights)
    fit_state(weights, model, tensors)
    model.load_state_dict(tensors)
    return model.eval()


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """The fraction of uint8 images [N, C, H, W] that the classifier gives their label [N]."""
    errors.is_pictures("images", images)
    errors.per_sample("labels", labels, torch.int64, "images", images)
    if not len(images):
        raise ValueError("images: are none, must be one or more")
    _, predicted = describe(model, images)
    return (predicted == labels).double().mean().item()


def framed(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """uint8 images [N, C, h, w] in the middle of black ones of `shape`, (C, H, W).

    Raises ValueError where no frame makes them so.
    """
    errors.is_pictures("images", images)
    shape = sizes("shape", shape)
    if len(shape) != 3:
        raise ValueError(f"shape={shape}: must be (C, H, W)")
    (down, odd), (right, ragged) = (divmod(shape[k] - images.shape[k + 1], 2) for k in (1, 2))
    if images.shape[1] != shape[0] or odd or ragged or min(down, right) < 0:
        raise ValueError(
            f"images {tuple(images.shape[1:])}: must be {shape}, or smaller by an even number"
        )
    return F.pad(images, [right, right, down, down])


@torch.no_grad()
def describe(model: Classifier, images: Tensor, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Features, fp32 [N, D], and the likeliest classes, int64 [N], of uint8 images [N, C, H, W]."""
    errors.is_a("model", model, Classifier)
    errors.is_pictures("images", images)
    if (shape := tuple(images.shape[1:])) != model.shape:
        raise ValueError(
            f"images {shape}: the classifier takes {model.shape}; images of another kind need a "
            "classifier trained on them, or Inception's features"
        )
    device = model.head.weight.device
    features, classes = [], []
    for part in tqdm(images.split(BATCH), desc="features", disable=not progress):
        x = part.to(device).float().div_(127.5).sub_(1.0)
        found = model.features(x.contiguous(memory_format=torch.channels_last))
        features.append(found.cpu())
        classes.append(model.head(found).argmax(1).cpu())
    return torch.cat(features), torch.cat(classes)
