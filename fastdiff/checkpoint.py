"""Checkpoints: safetensors for the numbers, JSON for everything else, never a pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from .errors import one_of
from .models import UNet, UNetConfig
from .prediction import PREDICTIONS
from .schedule import NoiseSchedule

ASSETS = Path(__file__).parent / "assets"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save(
    folder: str | Path,
    model: UNet,
    schedule: NoiseSchedule,
    prediction: str,
    class_names: tuple[str, ...] = (),
    training: dict[str, Any] | None = None,
    dtype: str = "float32",
) -> Path:
    """Write a model as `folder`/model.safetensors and config.json, which `load` reads.

    Args:
        folder: made if it is missing; a path ending in .safetensors writes that file, and the
            configuration beside it with the ending .json.
        model: the network; its parameters are stored, whatever device they are on.
        schedule, prediction: what samplers must use with it.
        class_names: one a label; may be empty.
        training: how it was trained, for the record; JSON values.
        dtype: stored precision, "float32", "float16" or "bfloat16"; `load` returns fp32.

    Returns:
        The path of the weights.
    """
    one_of("prediction", prediction, PREDICTIONS)
    one_of("dtype", dtype, STORED)
    weights, config = _paths(Path(folder))
    record = {
        "model": model.config.to_json(),
        "schedule": schedule.to_json(),
        "prediction": prediction,
        "class_names": list(class_names),
        "training": training or {},
    }
    text = json.dumps(record, indent=2) + "\n"
    weights.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(weights, {k: v.to(STORED[dtype]) for k, v in model.state_dict().items()})
    write_bytes(config, text.encode())
    return weights


def load(source: str | Path) -> UNet:
    """A trained U-Net, fp32 on the CPU and in eval mode.

    Its attributes `.config`, `.schedule`, `.prediction` and `.class_names` are all that a
    sampler needs to know.

    Args:
        source: the name of a shipped checkpoint ("fashion-mnist"), a folder that `save` or
            `fastdiff train` wrote, or a .safetensors file with its .json (or config.json).

    Raises:
        FileNotFoundError: there is no such checkpoint, or a part of it is missing.
        ValueError: a file is truncated or damaged, or does not fit the configuration.
    """
    path = Path(source)
    if not path.exists() and (ASSETS / path).is_dir():
        path = ASSETS / path
    if not path.exists():
        shipped = sorted(p.name for p in ASSETS.glob("*") if p.is_dir())
        raise FileNotFoundError(
            f"{source}: no such checkpoint; takes a folder, a .safetensors file, "
            f"or a shipped name: {', '.join(shipped)}"
        )
    weights, config = _paths(path)
    if not config.is_file():
        raise FileNotFoundError(f"{config}: missing; a checkpoint is {weights.name} and this file")
    try:
        record = json.loads(config.read_text())
        model = UNet(UNetConfig.from_json(record["model"]))
        schedule = NoiseSchedule.from_json(record["schedule"])
        prediction, names = record["prediction"], tuple(record["class_names"])
        one_of("prediction", prediction, PREDICTIONS)
    except KeyError as error:
        raise ValueError(f"{config}: lacks {error}; it was not written by fastdiff") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config}: {error}") from None
    tensors, _ = read_tensors(weights)
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


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path}: truncated, or no safetensors file ({error}); copy or train it again"
        ) from None


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all."""
    # contiguous_format: a channels-last weight must be stored in its logical order
    plain = {
        k: v.detach().cpu().contiguous(memory_format=torch.contiguous_format)
        for k, v in tensors.items()
    }
    write_bytes(path, to_bytes(plain, metadata))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _paths(path: Path) -> tuple[Path, Path]:
    """Weights and configuration of a checkpoint: a folder, or a .safetensors file."""
    if path.suffix != ".safetensors":
        return path / WEIGHTS, path / CONFIG
    own = path.with_suffix(".json")
    shared = path.with_name(CONFIG)
    return path, own if own.is_file() or path.name != WEIGHTS else shared
