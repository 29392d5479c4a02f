"""Checkpoints: safetensors for the numbers, JSON for everything else, never a pickle."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import errors
from .errors import one_of
from .files import make_folder, read_tensors, stamp_of, write_bytes, write_tensors
from .models import UNet, UNetConfig
from .models.distilled import Distilled
from .models.encoder import EncoderUNet
from .models.network import Network
from .prediction import PREDICTIONS
from .schedule import NoiseSchedule

ASSETS = Path(__file__).parent / "assets"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save(
    folder: str | Path,
    model: Network,
    schedule: NoiseSchedule,
    prediction: str,
    class_names: tuple[str, ...] = (),
    training: dict[str, Any] | None = None,
    dtype: str = "float32",
    distilled: Distilled | None = None,
) -> Path:
    """Write a model as `folder`/model.safetensors and config.json, which `load` reads.

    Each is written whole or not at all. The weights carry the configuration too, and it carries
    their checksum: between the two, the new weights are loaded with their own configuration.

    Args:
        folder: made if it is missing; a path ending in .safetensors writes that file, and the
            configuration beside it with the ending .json.
        model: the network; its parameters are stored, whatever device they are on.
        schedule, prediction: what samplers must use with it.
        class_names: one a label; of captions, the words by token; may be empty.
        training: how it was trained, for the record; JSON values.
        dtype: stored precision, "float32", "float16" or "bfloat16"; `load` returns fp32.
        distilled: the timesteps and guidance weight of a student of `fastdiff.distill`.

    Returns:
        The path of the weights.

    Raises:
        OSError: a file cannot be written; says why and what to do, and leaves what was there.
    """
    errors.is_a("model", model, Network)
    errors.is_a("schedule", schedule, NoiseSchedule)
    one_of("prediction", prediction, PREDICTIONS)
    one_of("dtype", dtype, STORED)
    listed = isinstance(class_names, tuple | list)
    if not listed or not all(isinstance(name, str) for name in class_names):
        raise TypeError(f"class_names={class_names!r}: must be a tuple of str")
    if distilled is not None:
        errors.is_a("distilled", distilled, Distilled)
    if training is not None:
        errors.is_a("training", training, Mapping)
        try:
            json.dumps(training)
        except (TypeError, ValueError) as error:
            raise TypeError(f"training: must be JSON values ({error})") from None
    weights, config = _paths(errors.path("folder", folder))
    record = {
        "model": model.config.to_json(),
        "schedule": schedule.to_json(),
        "prediction": prediction,
        "class_names": list(class_names),
        "training": training or {},
    }
    if distilled is not None:
        record["distilled"] = distilled.to_json()
    if isinstance(model, EncoderUNet):
        record["classifier"] = {"outputs": model.outputs, "pool": model.pool}
    tensors = {k: v.to(STORED[dtype]) for k, v in model.state_dict().items()}
    make_folder(weights.parent)
    stamp = write_tensors(weights, tensors, {"config": json.dumps(record)})
    text = json.dumps({**record, "weights": stamp}, indent=2) + "\n"
    write_bytes(config, text.encode())
    return weights


def load(source: str | Path) -> UNet:
    """A trained U-Net, fp32 on the CPU and in eval mode.

    Its attributes `.config`, `.schedule`, `.prediction`, `.class_names` and, of a student,
    `.distilled` are all that a sampler needs to know.

    Args:
        source: the name of a shipped checkpoint ("fashion-mnist"), a folder that `save` or
            `fastdiff train` wrote, or a .safetensors file with its .json (or config.json).

    Raises:
        FileNotFoundError: there is no such checkpoint, or a part of it is missing.
        ValueError: a file is truncated or damaged, or does not fit the configuration.

    Warns if the configuration beside the weights is missing or of other weights, and their own is
    used.
    """
    model = _load(source)
    if not isinstance(model, UNet):
        raise ValueError(
            f"{source}: holds a classifier of noisy images; "
            "fastdiff.guidance.load_classifier reads it"
        )
    return model


def load_encoder(source: str | Path) -> EncoderUNet:
    """A trained classifier of noisy images, as `fastdiff train --task classifier` writes it.

    Its `.schedule` and `.class_names` say what it was trained on. Arguments and errors as `load`.
    """
    model = _load(source)
    if not isinstance(model, EncoderUNet):
        raise ValueError(f"{source}: holds no classifier; fastdiff.load reads it")
    return model


def _load(source: str | Path) -> Network:
    path = errors.path("source", source)
    if not path.exists() and (ASSETS / path).is_dir():
        path = ASSETS / path
    if not path.exists():
        shipped = sorted(p.parent.name for p in ASSETS.glob(f"*/{WEIGHTS}"))
        raise FileNotFoundError(
            f"{source}: no such checkpoint; takes a folder, a .safetensors file, "
            f"or a shipped name: {', '.join(shipped)}"
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError(
            f"{source}: takes a folder, or a .safetensors file; of a published .pt file "
            "fastdiff.integrations.guided_diffusion.from_guided_diffusion makes a model"
        )
    weights, config = _paths(path)
    if not weights.is_file():
        raise FileNotFoundError(
            f"{weights}: missing; takes a folder that fastdiff train or save wrote"
        )
    tensors, metadata = read_tensors(weights)
    if "config" in metadata and stamp_of(weights) is None:  # `save` writes both
        raise ValueError(f"{weights}: its checksum's place is damaged; copy or train it again")
    try:
        record = _configuration(weights, config, metadata)
        shape = UNetConfig.from_json(record["model"])
        classifier = record.get("classifier")
        model: Network = UNet(shape) if classifier is None else EncoderUNet(shape, **classifier)
        schedule = NoiseSchedule.from_json(record["schedule"])
        prediction, names = record["prediction"], tuple(record["class_names"])
        one_of("prediction", prediction, PREDICTIONS)
        if "distilled" in record:
            model.distilled = Distilled.from_json(record["distilled"])
    except KeyError as error:
        raise ValueError(f"{config}: lacks {error}; it was not written by fastdiff") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config}: {error}") from None
    fit_state(weights, model, tensors)
    model.load_state_dict({k: v.float() for k, v in tensors.items()})
    model.schedule, model.prediction, model.class_names = schedule, prediction, names
    return model.eval()


def fit_state(path: Path, model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError, naming the file, unless the tensors have the model's names and shapes."""
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    complaints = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{k} {found[k]} (must be {wanted[k]})"
            for k in wanted
            if k in found and found[k] != wanted[k]
        ],
    }
    said = [
        f"{len(keys)} tensors {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for what, keys in complaints.items()
        if keys
    ]
    if said:
        raise ValueError(f"{path}: does not fit its configuration; {'; '.join(said)}")


def _configuration(weights: Path, config: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """What `config` says, or what the weights carry where it is missing or of other weights."""
    if config.is_file():
        record = json.loads(config.read_text())
        if not isinstance(record, dict):
            raise TypeError(f"holds {type(record).__name__}, must be an object")
        if record.get("weights") == metadata.get("fastdiff"):
            return record
        wrong = f"of other weights than {weights.name}"
        if "config" not in metadata:
            raise ValueError(f"{wrong}; if it does fit them, remove 'weights' from it")
    else:
        wrong = "missing"
        if "config" not in metadata:
            raise FileNotFoundError(
                f"{config}: missing; a checkpoint is {weights.name} and this file"
            )
    warnings.warn(
        f"{config}: {wrong}; used the configuration that {weights.name} carries", stacklevel=3
    )
    return json.loads(metadata["config"])


def _paths(path: Path) -> tuple[Path, Path]:
    """Weights and configuration of a checkpoint: a folder, or a .safetensors file."""
    if path.suffix != ".safetensors":
        return path / WEIGHTS, path / CONFIG
    own = path.with_suffix(".json")
    shared = path.with_name(CONFIG)
    return path, own if own.is_file() or path.name != WEIGHTS else shared
